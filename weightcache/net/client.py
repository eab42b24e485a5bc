"""A ``recv`` process: fetches chunks from peers and lands them in this host's blobs.

Theory of operation. One thread, one epoll loop; nothing blocks but the disk. The node says which chunk to get from
which peer and where it goes. A peer has up to ``streams`` connections (Stream), opened when they are first needed;
each carries up to ``pipeline`` requests, which the peer answers in order, so an answer to anything but the oldest is
garbage. The next one is sent when no more than AHEAD bytes are due, or what comes in a round trip: what exceeds the
receive window would leave the peer's queue whenever this process acknowledges, at the cost of *its* time if the peer is
near: with 16 MiB due it received at 0.7 of the speed from two peers, and took 1.5 times the CPU (bench/peer.py).

A chunk arrives in a warm buffer, and what has come of it is hashed at once: it is still in the cache, and the peer
fills the socket meanwhile (bench/landing.py has the numbers). While much is due the kernel wakes the loop only for
LOW_WATER bytes. When all of it is there, ``land`` compares and writes. Buffers are shared by all streams, the last
one used first.

Every request is answered once, with "got" or "failed", unless it was cancelled or its blob closed. What one answer did
wrong is charged to its request; the others of that connection fail as "reset".

    node -> receiver                                  receiver -> node
    ["config", {ReceiverConfig}]                      ["ready"]
    ["peer", peer, host, port]   a numeric address    ["got", [[request, chunk id, xxh3-128, length, seconds,
    ["forget", peer]                                      hashing, writing], ...]]
    ["blob", handle] + fd, writable                   ["failed", [[request, kind, detail, wait_ms], ...]]
    ["close", handle]
    ["get", peer, [[request, handle, blob, index, offset, length, chunk id or b""], ...]]
    ["cancel", [request, ...]]

Kinds of failure: refused (no connection), auth (handshake), reset (connection lost), stalled (no byte for ``idle``
seconds), garbage (not the protocol), length, mismatch (not the bytes of their id), missing, unknown, busy (the peer
says so), disk.
"""

from __future__ import annotations

import math
import mmap
import os
import socket
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from errno import EINPROGRESS
from select import EPOLLIN, EPOLLOUT
from typing import Any

from blake3 import blake3

from weightcache.core.ids import short
from weightcache.core.landing import ChunkMismatch, Spent, land
from weightcache.core.layout import CHUNK
from weightcache.core.wire import Frame, Kind, Link, Port, Role
from weightcache.errors import ProtocolError
from weightcache.net.channel import Channel, Message, close_all
from weightcache.net.handshake import DEADLINE, UNANSWERED, Handshake
from weightcache.net.loop import Loop, configuration
from weightcache.net.sockets import round_trip, tune

# Bytes for which the kernel wakes the loop while at least as many are due. Only for sockets that do not block: a
# blocking recv that has taken half of them sleeps until as many again have come, which may be never.
LOW_WATER = 512 << 10
AHEAD = CHUNK  # bytes: well below the least receive window that the kernel ends up with, which is 6 MiB
FASTEST = 3e9  # bytes a second that one such process takes
_SPARE_BUFFERS = 4  # kept for the next chunks
# Answers are told when they are HELD bytes, or HELD_SECONDS old, or nothing else is due: each message costs the node a
# turn, a commit and news to everyone, which for small chunks is more than the chunk itself.
HELD, HELD_SECONDS = 8 << 20, 0.003
_BATCH = 500  # answers in one message to the node
_DETAIL = 200  # characters of a failure's detail


@dataclass(frozen=True, slots=True)
class ReceiverConfig:
    """What the node tells a receiver. Times in seconds."""

    key: bytes | None = field(repr=False)
    node_id: bytes
    info: bytes = b""
    streams: int = 1  # connections to a peer
    pipeline: int = 8  # requests on one of them; the peer's own bound is 16
    idle: float = 10.0  # without a byte, while answers are due
    handshake: float = DEADLINE  # to connect and to know each other


class Fetch:
    """One chunk to get. ``dead``: nobody waits for it any more, though its answer may still come."""

    __slots__ = ("asked_at", "blob", "dead", "expected", "handle", "index", "length", "number", "offset")

    def __init__(
        self, number: int, handle: int, blob: bytes, index: int, offset: int, length: int, expected: bytes
    ) -> None:
        self.number = number
        self.handle = handle
        self.blob = blob
        self.index = index
        self.offset = offset
        self.length = length
        self.expected = expected
        self.asked_at = 0.0
        self.dead = False


class Arrival:
    """The chunk whose bytes are coming in: where they go, what they hash to so far."""

    __slots__ = ("buffer", "expected", "fetch", "got", "hasher", "spent")

    def __init__(self, fetch: Fetch, expected: bytes, buffer: memoryview) -> None:
        self.fetch = fetch
        self.expected = expected
        self.buffer = buffer
        self.got = 0
        self.hasher = blake3()
        self.spent = Spent()


class Stream:
    """One connection to a peer, and the requests it carries: ``queued`` (not sent yet), ``owed`` (sent, unanswered)."""

    __slots__ = (
        "ahead", "arrival", "connected", "deadline", "handshake", "link", "low_water", "moved_at", "out", "owed",
        "peer", "queued", "sock",
    )  # fmt: skip

    def __init__(self, peer: Peer, sock: socket.socket, config: ReceiverConfig, now: float) -> None:
        self.peer = peer
        self.sock = sock
        self.link = Link(Role.CLIENT, Port.BULK)
        self.handshake = Handshake(self.link, config.key, config.node_id, config.info, expected=peer.name)
        self.out = self.handshake.start()
        self.connected = False
        self.deadline = now + config.handshake
        self.moved_at = now
        self.low_water = 1
        self.ahead = AHEAD
        self.queued: deque[Fetch] = deque()
        self.owed: deque[Fetch] = deque()
        self.arrival: Arrival | None = None

    def load(self) -> int:
        """Requests it carries."""
        return len(self.queued) + len(self.owed) + (self.arrival is not None)

    def measure(self) -> None:
        """Set what may be due when the next request is sent."""
        self.ahead = max(AHEAD, int(round_trip(self.sock) * FASTEST))

    def has_room(self) -> bool:
        """Whether so little is due that the next request should be sent."""
        arriving = self.arrival.fetch.length - self.arrival.got if self.arrival else 0
        return arriving + sum(fetch.length for fetch in self.owed) <= self.ahead


class Peer:
    """Where a node is reached, and the connections there are to it."""

    __slots__ = ("host", "name", "port", "streams")

    def __init__(self, name: bytes, host: str, port: int) -> None:
        self.name = name
        self.host = host
        self.port = port
        self.streams: list[Stream] = []


class _Failure(Exception):
    """A stream cannot go on. ``kind`` is charged to its oldest request if ``one``, else to all of them."""

    def __init__(self, kind: str, detail: str, *, one: bool = False) -> None:
        super().__init__(detail)
        self.kind = kind
        self.one = one


def run_receiver(channel: Channel) -> None:
    """Fetch what the node asks for until the channel ends. The node's first message must be "config"."""
    settings = configuration(channel)
    if settings is not None:
        Receiver(channel, ReceiverConfig(**settings)).run()


class Receiver:
    """What the node and the peers may do to this process."""

    def __init__(self, channel: Channel, config: ReceiverConfig) -> None:
        self._channel = channel
        self._config = config
        self._loop = Loop(channel, min(1.0, config.idle / 4, config.handshake / 4))
        self._peers: dict[bytes, Peer] = {}
        self._handles: dict[int, int] = {}  # handle -> descriptor
        self._fetches: dict[int, Fetch] = {}  # by number, until answered or cancelled
        # Touched page by page, before anybody waits: on a virtual machine each may have to be fetched from below.
        self._buffers = [memoryview(bytearray(CHUNK))]
        self._buffers[0][:: mmap.PAGESIZE] = bytes(len(self._buffers[0][:: mmap.PAGESIZE]))
        self._got: list[list[Any]] = []
        self._held = 0  # bytes of them
        self._failed: list[list[Any]] = []

    def run(self) -> None:
        self._channel.send("ready")
        self._loop.run(self._on_message, self._on_tick, self._report)

    # The node

    def _on_message(self, message: Message) -> None:
        fields, fds = message
        match fields:
            case ["peer", bytes(name), str(host), int(port)]:
                known = self._peers.get(name)
                if known is None or (known.host, known.port) != (host, port):
                    self._forget(name)
                    self._peers[name] = Peer(name, host, port)
            case ["forget", bytes(name)]:
                self._forget(name)
            case ["blob", int(handle)]:
                (self._handles[handle],) = fds
            case ["close", int(handle)] if handle in self._handles:
                self._cancel(fetch.number for fetch in list(self._fetches.values()) if fetch.handle == handle)
                os.close(self._handles.pop(handle))
            case ["get", bytes(name), list(wanted)]:
                self._get(name, [Fetch(*fields) for fields in wanted])
            case ["cancel", list(numbers)]:
                self._cancel(numbers)
            case _:
                close_all(fds)
                raise ProtocolError(f"the node sent the receiver {str(fields[:1])[:40]}, which it does not know")

    def _forget(self, name: bytes) -> None:
        peer = self._peers.pop(name, None)
        for stream in list(peer.streams) if peer else ():
            self._end(stream, _Failure("reset", "the node forgot this peer"))

    def _cancel(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            fetch = self._fetches.pop(number, None)
            if fetch:
                fetch.dead = True

    def _get(self, name: bytes, fetches: list[Fetch]) -> None:
        peer = self._peers.get(name)
        for fetch in fetches:
            self._fetches[fetch.number] = fetch
            if peer is None:
                self._fail(fetch, "refused", f"no address is known for node {short(name)}")
            elif fetch.handle not in self._handles:
                self._fail(fetch, "disk", f"blob {short(fetch.blob)} is not open here")
            else:
                try:
                    self._stream(peer).queued.append(fetch)
                except _Failure as failure:
                    self._fail(fetch, failure.kind, str(failure))
        for stream in list(peer.streams) if peer else ():
            self._turn(stream, 0)

    def _fail(self, fetch: Fetch, kind: str, detail: str, wait_ms: int = 0) -> None:
        if self._fetches.pop(fetch.number, None) is not None:
            self._failed.append([fetch.number, kind, detail[:_DETAIL], wait_ms])

    def _report(self) -> None:
        """Tell the node what there is to tell, in as few messages as hold it."""
        late = time.monotonic() >= self._loop.alarm
        if not self._failed and self._fetches and self._held < HELD and not late:
            return
        self._held, self._loop.alarm = 0, math.inf
        for kind, answers in (("got", self._got), ("failed", self._failed)):
            for begin in range(0, len(answers), _BATCH):
                self._channel.send(kind, answers[begin : begin + _BATCH])
            answers.clear()

    # Peers

    def _stream(self, peer: Peer) -> Stream:
        """The peer's least busy connection; another one while there may be more and none is idle."""
        least = min(peer.streams, key=Stream.load, default=None)
        if least is not None and (not least.load() or len(peer.streams) >= self._config.streams):
            return least
        where = f"{peer.host} port {peer.port}"
        try:
            # A name would have to be looked up, and everything else would wait for that.
            flags = socket.AI_NUMERICHOST
            family, *_, address = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM, flags=flags)[0]
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise _Failure("refused", f"{where}: {error.strerror}") from None
        tune(sock)
        error_number = sock.connect_ex(address)
        if error_number not in (0, EINPROGRESS):
            sock.close()
            raise _Failure("refused", f"{where}: {os.strerror(error_number)}")
        stream = Stream(peer, sock, self._config, self._loop.now)
        peer.streams.append(stream)
        return stream

    def _turn(self, stream: Stream, events: int) -> None:
        """One connection's turn. Whatever goes wrong ends that connection only."""
        try:
            if events and not stream.connected:
                self._connected(stream)
            elif events & ~EPOLLOUT:  # also a hang-up: what came before it is still to be read
                self._receive(stream)
            self._ask(stream)
            self._watch(stream)
        except _Failure as failure:
            self._end(stream, failure)
        except ProtocolError as error:
            kind = "garbage" if stream.handshake.done else "auth"
            self._end(stream, _Failure(kind, str(error), one=stream.handshake.done))
        except OSError as error:
            self._end(stream, _Failure("reset", error.strerror or str(error)))

    def _connected(self, stream: Stream) -> None:
        error = stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise _Failure("refused", f"{stream.peer.host} port {stream.peer.port}: {os.strerror(error)}")
        stream.connected = True

    def _receive(self, stream: Stream) -> None:
        arrival, link = stream.arrival, stream.link
        try:
            if arrival is None:
                count = stream.sock.recv_into(link.space())
                link.filled(count)
            else:
                count = stream.sock.recv_into(arrival.buffer[arrival.got : arrival.fetch.length])
                self._arrived(stream, arrival, count)
        except BlockingIOError:
            return
        if not count and stream.handshake.done:
            raise _Failure("reset", "the peer closed the connection")
        if not count:
            raise _Failure("auth", UNANSWERED)
        stream.moved_at = self._loop.now
        if not stream.handshake.done:
            stream.out += stream.handshake.advance()
            stream.measure()
        while stream.handshake.done and (frame := link.receive()):
            self._on_frame(stream, frame)

    def _on_frame(self, stream: Stream, frame: Frame) -> None:
        number, *rest = frame.fields
        if not stream.owed or stream.owed[0].number != number:
            raise _Failure("garbage", f"an answer to request {number}, which is not the oldest", one=True)
        fetch = stream.owed[0]
        if frame.kind is Kind.NO:
            reason, wait_ms = rest
            stream.owed.popleft()
            self._fail(fetch, reason, "", wait_ms)
            return
        length, chunk = rest
        if length != fetch.length:
            raise _Failure("length", f"{length} bytes for a chunk of {fetch.length}", one=True)
        stream.owed.popleft()
        if fetch.expected and chunk != fetch.expected:
            self._fail(
                fetch, "mismatch", f"the peer has chunk {short(chunk)} where {short(fetch.expected)} was expected"
            )
            fetch.dead = True
        buffer = self._buffers.pop() if self._buffers else memoryview(bytearray(CHUNK))
        stream.arrival = arrival = Arrival(fetch, chunk, buffer)
        raw = stream.link.take(length)
        buffer[: len(raw)] = raw
        self._arrived(stream, arrival, len(raw))

    def _arrived(self, stream: Stream, arrival: Arrival, count: int) -> None:
        """The next ``count`` bytes of a chunk are in its buffer."""
        if not arrival.fetch.dead:
            began = time.perf_counter()
            arrival.hasher.update(arrival.buffer[arrival.got : arrival.got + count])
            arrival.spent.hashing += time.perf_counter() - began
        arrival.got += count
        stream.link.moved(count)
        if not stream.link.bytes_left:
            stream.arrival = None
            self._land(arrival)
            self._release(arrival)

    def _land(self, arrival: Arrival) -> None:
        fetch, spent = arrival.fetch, arrival.spent
        if fetch.dead:
            return
        data = arrival.buffer[: fetch.length]
        try:
            chunk, check = land(
                self._handles[fetch.handle], fetch.offset, [data], arrival.expected, arrival.hasher, spent
            )
        except ChunkMismatch as error:
            self._fail(fetch, "mismatch", str(error))
        except OSError as error:
            self._fail(fetch, "disk", error.strerror or str(error))
        else:
            del self._fetches[fetch.number]
            now = time.monotonic()
            if not self._got:
                self._loop.alarm = now + HELD_SECONDS
            self._held += fetch.length
            seconds = now - fetch.asked_at
            self._got.append([fetch.number, chunk, check, fetch.length, seconds, spent.hashing, spent.writing])

    def _release(self, arrival: Arrival) -> None:
        if len(self._buffers) < _SPARE_BUFFERS:
            self._buffers.append(arrival.buffer)

    def _ask(self, stream: Stream) -> None:
        """Send what waits: requests while there is room for them."""
        if stream.handshake.done:
            while stream.queued and len(stream.owed) < self._config.pipeline and stream.has_room():
                fetch = stream.queued.popleft()
                if fetch.dead:
                    continue
                if not stream.owed and stream.arrival is None:
                    stream.moved_at = self._loop.now
                stream.out += stream.link.send(Kind.GET, fetch.number, fetch.blob, fetch.index)
                stream.owed.append(fetch)
                fetch.asked_at = time.monotonic()
        if stream.out and stream.connected:
            try:
                stream.out = stream.out[stream.sock.send(stream.out) :]
            except BlockingIOError:
                pass

    def _watch(self, stream: Stream) -> None:
        arrival = stream.arrival
        self._set_low_water(stream, min(LOW_WATER, arrival.fetch.length - arrival.got) if arrival else 1)
        events = EPOLLIN | (EPOLLOUT if stream.out or not stream.connected else 0)
        self._loop.watch(stream.sock.fileno(), events, lambda events: self._turn(stream, events))

    def _set_low_water(self, stream: Stream, size: int) -> None:
        if size != stream.low_water:
            stream.low_water = size
            stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def _on_tick(self) -> None:
        now, config = self._loop.now, self._config
        for stream in [stream for peer in self._peers.values() for stream in peer.streams]:
            if not stream.connected and now > stream.deadline:
                self._end(stream, _Failure("refused", f"no connection within {config.handshake:g} s"))
            elif not stream.handshake.done and now > stream.deadline:
                self._end(stream, _Failure("stalled", f"no handshake within {config.handshake:g} s"))
            elif stream.owed or stream.arrival:
                stream.measure()
                if now - stream.moved_at > config.idle:
                    self._end(stream, _Failure("stalled", f"no byte for {config.idle:g} s"))
                elif now - stream.moved_at > self._loop.tick:
                    self._set_low_water(stream, 1)  # a trickle is not a stall

    def _end(self, stream: Stream, failure: _Failure) -> None:
        """Close a connection; its requests fail."""
        stream.peer.streams.remove(stream)
        self._loop.forget(stream.sock.fileno())
        stream.sock.close()
        arrival = stream.arrival
        if arrival:
            self._release(arrival)
        kind = failure.kind
        for fetch in [*([arrival.fetch] if arrival else ()), *stream.owed, *stream.queued]:
            self._fail(fetch, kind, str(failure))
            kind = "reset" if failure.one else kind
