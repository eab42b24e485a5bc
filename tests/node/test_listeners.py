"""Who is told what a host gets: all who want it in a small swarm, in a large one neighbours (node/listeners.py)."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from weightcache.config import Address
from weightcache.core import neighbours
from weightcache.core.bitmap import ChunkSet
from weightcache.directory.base import Member
from weightcache.node import listeners
from weightcache.node.listeners import Listeners
from weightcache.node.swarm import Info, Peer, Place, State, Swarm
from weightcache.node.trust import Trust

FEW = 2 * neighbours.RINGS
BLOB = b"b" * 32
CHUNKS = 16


class OneBlob:
    """A shelf with some chunks of one blob; it writes down who told it what."""

    def __init__(self) -> None:
        self.had = ChunkSet(CHUNKS)
        self.loads = True
        self.told: dict[bytes, set[int]] = {}  # by peer: the chunks that it said to have
        self.readers: dict[bytes, set[int]] = {}
        self.idle: Counter[bytes] = Counter()  # by peer: how often it said to read nothing

    def find(self, source: str) -> bytes | None:
        return None

    def state(self, blob: bytes) -> State | None:
        return State(self.had.encode(), [] if self.loads else None)

    def manifest(self, blob: bytes) -> tuple[bytes, bool] | None:
        return None

    def places(self, ids: Sequence[bytes]) -> list[Place | None]:
        return [None for _ in ids]

    def peer_joined(self, peer: Peer) -> None: ...

    def peer_left(self, peer: Peer) -> None: ...

    def peer_state(self, peer: Peer, blob: bytes, state: State | None) -> None:
        if state is not None and isinstance(state.has, bytes):
            self.told.setdefault(peer.id, set()).update(ChunkSet.decode(state.has, CHUNKS))

    def peer_got(self, peer: Peer, blob: bytes, chunks: Sequence[int]) -> None:
        self.told.setdefault(peer.id, set()).update(chunks)

    def peer_reads(self, peer: Peer, blob: bytes, chunks: Sequence[int]) -> None:
        self.readers.setdefault(peer.id, set()).update(chunks)
        self.idle[peer.id] += not chunks

    def peer_quits(self, peer: Peer, blob: bytes) -> None: ...


class Host:
    def __init__(self) -> None:
        self.id = secrets.token_bytes(16)
        self.shelf = OneBlob()
        self.swarm = Swarm(self.id, None, self.shelf, Trust(lambda peer: None))
        self.port = 0

    def gets(self, chunk: int) -> None:
        self.shelf.had.add(chunk)
        self.swarm.announce(BLOB, chunk)

    def hears(self, other: Host) -> set[int]:
        return self.shelf.told.get(other.id, set())


@asynccontextmanager
async def fleet(count: int) -> AsyncIterator[list[Host]]:
    """Hosts that are all connected, and all want the blob."""
    hosts = [Host() for _ in range(count)]
    try:
        for host in hosts:
            host.port = host.swarm.listen(Address("127.0.0.1", 0))
            await host.swarm.introduce(Info("", f"127.0.0.1:{host.port}", f"127.0.0.1:{host.port}", "1"))
        for at, host in enumerate(hosts):
            host.swarm.members(Member("127.0.0.1", other.port, other.id) for other in hosts[:at])
        await until(lambda: all(len(host.swarm.peers) == count - 1 for host in hosts))
        await asyncio.gather(*(host.swarm.want([BLOB]) for host in hosts))
        await until(lambda: all(len(host.shelf.readers) == count - 1 for host in hosts))
        yield hosts
    finally:
        await asyncio.gather(*(host.swarm.close() for host in hosts))


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_in_a_small_swarm_all_hear_what_a_host_gets() -> None:
    async with fleet(4) as hosts:
        hosts[0].swarm.announce_reads(BLOB, [])
        hosts[0].gets(3)
        await until(lambda: all(host.hears(hosts[0]) == {3} for host in hosts[1:]))
        assert all(host.shelf.idle[hosts[0].id] == 1 for host in hosts[1:])  # when it joined: nobody waits for that


async def test_in_a_large_swarm_neighbours_do_and_news_of_reads_goes_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (neighbours, listeners):
        monkeypatch.setattr(module, "FEW", FEW)  # else it takes more hosts
    async with fleet(FEW + 8) as hosts:
        first, *others = hosts
        first.gets(3)
        first.swarm.announce_reads(BLOB, [5])
        await until(lambda: all(host.shelf.readers[first.id] == {5} for host in others))
        first.swarm.announce_reads(BLOB, [])
        await until(lambda: all(host.shelf.idle[first.id] == 2 for host in others))
        await until(lambda: any(host.hears(first) for host in others))
        near = [host for host in others if host.hears(first)]
        assert 0 < len(near) <= FEW < len(others)
        for host in near:
            host.gets(7)
        await until(lambda: all(first.hears(host) == {7} for host in near))  # neighbours are so both ways

        # Those near it leave: whoever is near it now hears what there is, without being told anything new.
        for host in near:
            host.swarm.unwant([BLOB])
        left = [host for host in others if host not in near]
        await until(lambda: all(host.hears(first) == {3} and first.hears(host) == set() for host in left))


def test_strangers_hear_nothing_and_other_datacenters_everything() -> None:
    me, far, *near = (secrets.token_bytes(16) for _ in range(neighbours.FEW + 12))
    own = Listeners(me)
    own.add(BLOB, far, remote=True)
    for peer in near:
        own.add(BLOB, peer, remote=False)
    assert sorted(own.neighbours(BLOB)) == sorted([far, *near])  # as long as this host does not load it
    own.load(BLOB)
    told = own.neighbours(BLOB)
    assert far in told
    assert len(told) <= FEW + 1
    assert own.new(BLOB) == []
    gone = next(peer for peer in told if peer != far)
    own.drop(BLOB, gone)
    assert set(own.new(BLOB)) == set(own.neighbours(BLOB)) - set(told)
    assert own.new(BLOB) == []
    own.unload(BLOB)
    for peer in (far, *near):
        own.drop_all(peer)
    assert BLOB not in own
    assert not list(own.neighbours(BLOB))
