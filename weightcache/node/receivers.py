"""The ``recv`` processes of a node: one, and more of them while those that run are busy.

Theory of operation. One process receives, hashes and writes what one core can. Who wants a chunk does not care which of
them fetches it; it stays with that one until it is answered. Each process has a connection of its own to a peer, from
its first chunk on. A chunk goes to the process that owes least among those that know the peer; to one that does not
know it yet only when that one owes ENOUGH to be busy. So a slow peer has one connection, and a fast one one from each.

The first process starts as soon as there are peers. When one that runs spends BUSY of its time on hashing and writing,
the next is started; it gets chunks once it is up, so that none waits for a start. Of one that dies all is forgotten,
what it owed is lost, and the others go on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from weightcache.address import Address
from weightcache.node.processes import BulkProcess

ENOUGH = 2  # chunks that keep a process busy: one that comes, and one that was asked for meanwhile
BUSY = 0.5  # the share of its time that a process may hash and write before it gets another beside it
WINDOW = 0.05  # seconds over which that is measured
_BATCH = 256  # chunks in one message


class _Receiver:
    """One process: what it knows, and what it owes."""

    def __init__(
        self,
        config: dict[str, Any],
        heard: Callable[[_Receiver, list[Any], tuple[int, ...]], None],
        died: Callable[[_Receiver, str], None],
    ) -> None:
        self.process = BulkProcess("recv", config, partial(heard, self), partial(died, self))
        self.asked: dict[bytes, list[list[Any]]] = {}  # of each peer, and not sent yet
        self.reset()

    def reset(self) -> None:
        self.up = False
        self.peers: set[bytes] = set()
        self.handles: set[int] = set()
        self.owed: dict[int, tuple[int, int]] = {}  # request -> handle, bytes
        self.bytes = 0  # of all these
        self.worked = self.since = 0.0  # seconds of work, and when they began to count

    def settle(self, request: int) -> None:
        """It owes an answer no longer."""
        self.bytes -= self.owed.pop(request, (0, 0))[1]


def _owed(one: _Receiver) -> int:
    return one.bytes


class Receivers:
    """At most ``count`` processes. ``heard(message)``: what they say of requests; ``lost(requests, reason)``: one of
    them has ended by itself, and these will not be answered."""

    def __init__(
        self,
        count: int,
        config: dict[str, Any],
        heard: Callable[[list[Any]], object],
        lost: Callable[[Collection[int], str], None],
    ) -> None:
        self._heard = heard
        self._lost = lost
        self._all = [_Receiver(config, self._on_message, self._on_death) for _ in range(count)]
        self._loop = asyncio.get_running_loop()

    @property
    def processes(self) -> list[BulkProcess]:
        return [one.process for one in self._all]

    @property
    def up(self) -> bool:
        """Whether any can begin at once."""
        return any(one.up for one in self._all)

    def start(self) -> None:
        """Have one ready: a first load should not wait for it."""
        if not any(one.process.running for one in self._all):
            self._all[0].process.start()

    async def stop(self) -> None:
        await asyncio.gather(*(one.process.stop() for one in self._all))

    def fetch(self, peer: bytes, address: Address | None, fd: int, row: list[Any]) -> None:
        """Ask a peer for a chunk, at the next ``send``. ``row`` is [request, handle, blob, index, offset, length, chunk
        id or b""]; ``fd``: where that handle's chunks go, still the caller's."""
        request, handle, *_, length, _ = row
        one = self._choose(peer)
        if peer not in one.peers and address is not None:
            one.peers.add(peer)
            one.process.send("peer", peer, address.host, address.port)
        if handle not in one.handles:
            one.handles.add(handle)
            one.process.send("blob", handle, fds=[os.dup(fd)])
        if not one.owed:
            one.worked, one.since = 0.0, self._loop.time()
        one.owed[request] = handle, length
        one.bytes += length
        one.asked.setdefault(peer, []).append(row)

    def _choose(self, peer: bytes) -> _Receiver:
        self.start()
        able = [one for one in self._all if one.up] or [one for one in self._all if one.process.running] or self._all
        least = min((one for one in able if peer in one.peers), key=_owed, default=None)
        return least if least is not None and len(least.owed) < ENOUGH else min(able, key=_owed)

    def send(self) -> None:
        """Send what was asked for since the last time."""
        for one in self._all:
            for peer, rows in one.asked.items():
                for first in range(0, len(rows), _BATCH):
                    one.process.send("get", peer, rows[first : first + _BATCH])
            one.asked.clear()

    def cancel(self, requests: Sequence[int]) -> None:
        """These are not answered any more, unless they are already."""
        for one in self._all:
            if mine := [request for request in requests if request in one.owed]:
                one.process.send("cancel", mine)
                for request in mine:
                    one.settle(request)

    def close(self, handle: int) -> None:
        """Let go of a blob; what is under way to it is not answered any more."""
        for one in self._all:
            if handle in one.handles:
                one.handles.remove(handle)
                one.process.send("close", handle)
                for request in [request for request, (whose, _) in one.owed.items() if whose == handle]:
                    one.settle(request)

    def forget(self, peer: bytes) -> None:
        """Close the connections to a peer."""
        for one in self._all:
            if peer in one.peers:
                one.peers.remove(peer)
                one.process.send("forget", peer)

    def _on_message(self, one: _Receiver, message: list[Any], fds: Sequence[int]) -> None:
        match message:
            case ["ready"]:
                one.up = True
            case ["got", rows]:
                for request, *_, hashing, writing in rows:
                    one.settle(request)
                    one.worked += hashing + writing
                self._grow(one)
            case ["failed", rows]:
                for request, *_ in rows:
                    one.settle(request)
        self._heard(message)

    def _grow(self, one: _Receiver) -> None:
        """Start another process, if this one is busy and none is being started."""
        now = self._loop.time()
        if (spent := now - one.since) < WINDOW:
            return
        if one.worked >= BUSY * spent and all(one.up == one.process.running for one in self._all):
            idle = [one for one in self._all if not one.up]
            if idle:
                idle[0].process.start()
        one.worked, one.since = 0.0, now

    def _on_death(self, one: _Receiver, reason: str) -> None:
        lost = list(one.owed)
        one.reset()
        self._lost(lost, reason)
