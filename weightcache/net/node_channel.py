"""The node's face of a channel to a bulk process: the same messages, awaited."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

from weightcache.errors import WeightcacheError
from weightcache.net.channel import Channel, Message, close_all

_MAX_BACKLOG = 256  # messages queued before `send` waits
_MAX_UNREAD = 256  # messages received ahead of `receive`


class ChannelClosed(WeightcacheError):
    """The bulk process at the other end has ended."""


class NodeChannel:
    """Wraps one end of a channel for the running event loop. Use it from that loop only."""

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        self._loop = asyncio.get_running_loop()
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._room.set()
        self._reading = self._writing = self._closed = False
        self._watch_reads(True)

    async def send(self, *fields: Any, fds: Sequence[int] = ()) -> None:
        """Send ``[*fields]`` and ``fds`` (now the channel's) in order; waits while too much is queued.

        Raises ChannelClosed when the process has ended, ProtocolError for a message that is too large.
        """
        self.post(*fields, fds=fds)
        await self._room.wait()

    def post(self, *fields: Any, fds: Sequence[int] = ()) -> None:
        """Like ``send``, without waiting: for messages whose number something else bounds."""
        self._channel.send(*fields, fds=fds)
        self._after_write()
        if self._channel.ended:
            raise ChannelClosed("the bulk process has ended: its channel is closed")

    async def receive(self) -> Message | None:
        """The next message (its descriptors are the caller's to close), or None once the process has ended."""
        message = await self._messages.get()
        if message is None:
            self._messages.put_nowait(None)  # for whoever asks again
        elif not self._channel.ended:
            self._watch_reads(True)
        return message

    def close(self) -> None:
        """Close this end, upon which the bulk process ends. What was not received is dropped."""
        if self._closed:
            return
        self._closed = True
        self._watch_reads(False)
        self._watch_writes(False)
        self._channel.close()
        while not self._messages.empty():
            message = self._messages.get_nowait()
            close_all(message.fds if message else ())
        self._messages.put_nowait(None)
        self._room.set()

    def _on_readable(self) -> None:
        while (message := self._channel.receive()) is not None:
            self._messages.put_nowait(message)
            if self._messages.qsize() >= _MAX_UNREAD:
                self._watch_reads(False)
                return
        if self._channel.ended:
            self._watch_reads(False)
            self._messages.put_nowait(None)

    def _on_writable(self) -> None:
        self._channel.flush()
        self._after_write()

    def _after_write(self) -> None:
        backlog = self._channel.backlog
        self._watch_writes(backlog > 0)
        if backlog > _MAX_BACKLOG:
            self._room.clear()
        elif backlog <= _MAX_BACKLOG // 2:
            self._room.set()

    def _watch_reads(self, on: bool) -> None:
        if on and not self._reading:
            self._loop.add_reader(self._channel.fileno(), self._on_readable)
        elif self._reading and not on:
            self._loop.remove_reader(self._channel.fileno())
        self._reading = on

    def _watch_writes(self, on: bool) -> None:
        if on and not self._writing:
            self._loop.add_writer(self._channel.fileno(), self._on_writable)
        elif self._writing and not on:
            self._loop.remove_writer(self._channel.fileno())
        self._writing = on
