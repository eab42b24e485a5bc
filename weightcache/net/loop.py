"""The loop of a bulk process: one thread, epoll, the channel to the node, and a clock that forgives the disk."""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable
from typing import Any

from weightcache.errors import ProtocolError
from weightcache.net.channel import Channel, Message

_MESSAGES = 64  # of the node in one round


def configuration(channel: Channel) -> dict[str, Any] | None:
    """Wait for the node's first message, ["config", {...}]; None when the node is gone. Raises ProtocolError."""
    while (message := channel.receive()) is None:
        if channel.ended:
            return None
        select.select([channel], [], [])
    match message.fields:
        case ["config", dict(settings)]:
            return settings
    raise ProtocolError("the node's first message is not the configuration")


class Loop:
    """Calls back for what is watched, and every ``tick`` seconds.

    ``now`` counts seconds, for deadlines. A round that blocks in a file's read or write advances it by one tick at
    most: peers are not to be blamed for this host's disk. ``alarm``: the next round begins at this ``time.monotonic()``
    at the latest.
    """

    def __init__(self, channel: Channel, tick: float) -> None:
        self.now = 0.0
        self.tick = tick
        self.alarm = math.inf
        self._channel = channel
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """From now on call ``callback(events)`` when ``events`` (EPOLLIN, EPOLLOUT) or an error occur on ``fd``."""
        before = self._watched.get(fd)
        if before is None:
            self._epoll.register(fd, events)
        elif before[0] != events:
            self._epoll.modify(fd, events)
        self._watched[fd] = (events, callback)

    def forget(self, fd: int) -> None:
        """Stop watching ``fd``, before it is closed."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def run(
        self, on_message: Callable[[Message], None], on_tick: Callable[[], None], after_round: Callable[[], None]
    ) -> None:
        """Run until the channel ends. ``after_round`` is called after every wake-up."""

        def on_channel(events: int) -> None:
            for _ in range(_MESSAGES):
                message = self._channel.receive()
                if message is None:
                    break
                on_message(message)
            self._channel.flush()

        last = time.monotonic()
        next_tick = self.now + self.tick
        while not self._channel.ended:
            wanted = select.EPOLLIN | (select.EPOLLOUT if self._channel.backlog else 0)
            self.watch(self._channel.fileno(), wanted, on_channel)
            ready = self._epoll.poll(max(0.0, min(self.tick, self.alarm - time.monotonic())))
            now = time.monotonic()
            self.now += min(now - last, self.tick)
            last = now
            for fd, events in ready:
                watched = self._watched.get(fd)
                if watched is not None:  # else an earlier callback of this round closed it
                    watched[1](events)
            if self.now >= next_tick:
                next_tick = self.now + self.tick
                on_tick()
            after_round()
        self._epoll.close()
