"""Frames over an asyncio transport (uvloop's too): handshake and its deadline, liveness, back-pressure.

What the frames mean is the owner's business (net/control.py). Received bytes go straight into the link's buffer.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, cast

from weightcache.core.wire import Frame, Kind, Link, Role
from weightcache.errors import AuthError, ProtocolError, WeightcacheError
from weightcache.net.handshake import UNANSWERED, Handshake

SILENT_TICKS = 3  # ticks without a byte from the peer after which it counts as dead
MAX_UNREAD = 64 << 20  # bytes sent that the peer has not taken


class PeerUnreachable(WeightcacheError):
    """The peer cannot be reached, does not answer, or the connection to it was lost."""


class Owner(Protocol):
    """Who uses a stream. ``on_lost`` comes exactly once, whether ``on_open`` came before or not."""

    def on_open(self) -> None: ...
    def on_frame(self, frame: Frame) -> None: ...
    def on_lost(self, error: WeightcacheError | None) -> None: ...


class Unproven:
    """Connections whose handshake is not done: at most ``limit``, the oldest gives way."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._streams: dict[FrameStream, None] = {}

    def add(self, stream: FrameStream) -> None:
        if len(self._streams) >= self._limit:
            oldest = next(iter(self._streams))
            self.discard(oldest)
            oldest.close(now=True)
        self._streams[stream] = None

    def discard(self, stream: FrameStream) -> None:
        self._streams.pop(stream, None)

    def close(self) -> None:
        """Close them all."""
        for stream in list(self._streams):
            stream.close(now=True)


class FrameStream(asyncio.BufferedProtocol):
    """One connection. ``deadline``: seconds for the handshake; ``tick``: seconds of silence before a ping.

    Ticks are counted, not time: when this host itself has been stopped for a minute, that proves nothing about the
    peer.
    """

    def __init__(
        self, link: Link, handshake: Handshake, owner: Owner, unproven: Unproven, *, deadline: float, tick: float
    ) -> None:
        self.handshake = handshake
        self._unproven = unproven
        self._deadline = deadline
        self._link = link
        self._owner = owner
        self._tick = tick
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle
        self._error: WeightcacheError | None = None
        self.remote_host = ""  # the IP address at the other end
        self._silent = 0
        self._reading = True
        self._writable = asyncio.Event()
        self._writable.set()

    def send(self, kind: Kind, *fields: Any) -> None:
        """Send a frame, unless the connection is closing. Raises ProtocolError if it is too large.

        A peer that leaves more than MAX_UNREAD bytes unread is cut off: dropping some of what it is told would be
        worse.
        """
        if self._transport.is_closing():
            return
        frame = self._link.send(kind, *fields)
        if self._transport.get_write_buffer_size() > MAX_UNREAD:
            self.close(PeerUnreachable("the peer does not read what it is sent"))
        else:
            self._transport.write(frame)

    async def drain(self) -> None:
        """Wait until the peer has taken enough of what was sent before."""
        await self._writable.wait()

    def close(self, error: WeightcacheError | None = None, *, now: bool = False) -> None:
        """Close, after what was sent has gone out; ``now``, or with an ``error`` to tell the owner, at once."""
        self._error = self._error or error
        if error or now:
            self._transport.abort()
        else:
            self._transport.close()

    def pause(self) -> None:
        """Take no more frames, so that the peer has to wait, until ``resume``."""
        if self._reading:
            self._reading = False
            self._transport.pause_reading()

    def resume(self) -> None:
        """Take frames again, first those that have come already."""
        if not self._reading:
            self._reading = True
            self._read_frames()
        if self._reading and not self._transport.is_closing():
            self._transport.resume_reading()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.remote_host = str((transport.get_extra_info("peername") or ("gone",))[0])
        self._timer = self._loop.call_later(self._deadline, self._on_deadline)
        self._unproven.add(self)
        self._transport.write(self.handshake.start())

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._link.space()

    def buffer_updated(self, nbytes: int) -> None:
        self._silent = 0
        self._link.filled(nbytes)
        self._read_frames()

    def eof_received(self) -> bool:
        if not self.handshake.done and self._link.role is Role.CLIENT:
            self._error = self._error or AuthError(UNANSWERED)
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._unproven.discard(self)
        self._writable.set()
        if self._error is None and error is not None:
            self._error = PeerUnreachable(f"the connection was lost: {error}")
        self._owner.on_lost(self._error)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # What comes

    def _read_frames(self) -> None:
        try:
            if self.handshake.done or self._shake_hands():
                while self._reading and not self._transport.is_closing() and (frame := self._link.receive()):
                    self._on_frame(frame)
        except ProtocolError as error:
            self._error = error
            self._transport.write(self.handshake.farewell)
            self._transport.close()

    def _shake_hands(self) -> bool:
        self._transport.write(self.handshake.advance())
        if self.handshake.done:
            self._unproven.discard(self)
            self._timer.cancel()
            self._timer = self._loop.call_later(self._tick, self._on_tick)
            self._owner.on_open()
        return self.handshake.done

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind is Kind.PING:
            self.send(Kind.PONG)
        elif frame.kind is not Kind.PONG:
            self._owner.on_frame(frame)

    def _on_deadline(self) -> None:
        self.close(ProtocolError(f"no handshake within {self._deadline:g} s"))

    def _on_tick(self) -> None:
        self._silent += self._reading
        if self._silent >= SILENT_TICKS:
            self.close(PeerUnreachable(f"the peer has been silent for {SILENT_TICKS * self._tick:g} s"))
            return
        if self._silent and not self._transport.is_closing():
            self.send(Kind.PING)
        self._timer = self._loop.call_later(self._tick, self._on_tick)
