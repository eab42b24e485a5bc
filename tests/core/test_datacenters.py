"""Peers of other datacenters: asked where policy says so, and once a datacenter; one host, then fleets."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import pytest

from tests.core.herd import BLOB, Herd, Host
from tests.core.virtual import MIB, World
from weightcache.core.events import Done, GiveUp, PeerMet, Reach
from weightcache.core.layout import CHUNK, ChunkPlan

ORIGIN_FIRST = ("local", "origin", "remote")
REMOTE_FIRST = ("local", "remote", "origin")
NEVER = ("local", "origin")


@pytest.mark.parametrize("prefer", [ORIGIN_FIRST, REMOTE_FIRST, NEVER])
def test_whom_a_lone_host_asks_is_policy(prefer: tuple[str, ...]) -> None:
    world = World(1, prefer=prefer)
    far = world.add_peer("far", remote=True)
    wanted = world.want("blob", 50, CHUNK)  # it has no origin, until the peer is known
    world.drop("blob")
    wanted = world.want("again", 50, CHUNK, reach=Reach.RANGED)
    reads = len(world.origin.reads)  # that are under way by now
    world.has(far, "again")
    world.run()
    assert isinstance(wanted.end, Done)
    if prefer == REMOTE_FIRST:
        assert len(world.origin.reads) == reads
        assert len(world.asked_of(far)) == 50 - reads
    else:
        assert not world.asked_of(far)


@pytest.mark.parametrize("prefer", [ORIGIN_FIRST, REMOTE_FIRST, NEVER])
def test_who_is_near_goes_before_all(prefer: tuple[str, ...]) -> None:
    world = World(2, prefer=prefer)
    near, far = world.add_peer("near"), world.add_peer("far", remote=True)
    wanted = world.want("blob", 50, CHUNK)
    world.has(near, "blob")
    world.has(far, "blob")
    world.run()
    assert isinstance(wanted.end, Done)
    assert not world.asked_of(far)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("prefer", [ORIGIN_FIRST, REMOTE_FIRST])
def test_what_the_origin_does_not_give_comes_from_afar(prefer: tuple[str, ...], seed: int) -> None:
    world = World(seed, prefer=prefer)
    world.origin.behaviour = "dead"
    far = world.add_peer("far", remote=True)
    partly = world.add_peer("partly", remote=True)
    wanted = world.want("blob", 60, CHUNK, reach=Reach.RANGED)
    world.has(far, "blob", range(40))
    world.has(partly, "blob", range(30, 60))
    world.run()
    assert isinstance(wanted.end, Done)
    assert wanted.ended_at < 15
    unreached = World(seed, prefer=NEVER)
    unreached.origin.behaviour = "dead"
    far = unreached.add_peer("far", remote=True)
    wanted = unreached.want("blob", 60, CHUNK, reach=Reach.RANGED)
    unreached.has(far, "blob")
    unreached.run()
    assert isinstance(wanted.end, GiveUp)
    assert wanted.ended_at < 30


@pytest.mark.parametrize("behaviour", ["refusing", "resetting", "lying", "busy", "missing", "unknown", "silent"])
@pytest.mark.parametrize("prefer", [ORIGIN_FIRST, REMOTE_FIRST])
def test_one_that_fails_afar_costs_little(prefer: tuple[str, ...], behaviour: str) -> None:
    world = World(3, prefer=prefer)
    bad = world.add_peer("bad", behaviour, remote=True)
    wanted = world.want("blob", 60, CHUNK, reach=Reach.RANGED)
    world.has(bad, "blob")
    world.run()
    assert isinstance(wanted.end, Done)
    assert wanted.ended_at < 40


def test_a_peer_that_comes_back_may_be_elsewhere() -> None:
    world = World(1, prefer=NEVER)
    peer = world.add_peer("peer", remote=True)
    world.leave(peer)
    peer.present, peer.remote = True, False
    world.feed(PeerMet(peer.name, remote=False))
    wanted = world.want("blob", 20, MIB)
    world.has(peer, "blob")
    world.run()
    assert isinstance(wanted.end, Done)
    nobody = world.add_peer("nobody")  # in the slot of one that was remote
    world.has(nobody, "blob")


# -- fleets: two datacenters, the first of which has it all

SIZE = 240_000_000
LINK = 50e6


class Datacenters(Herd):
    """Hosts with an even number are in one datacenter, the others in another. Counts what crosses."""

    def __init__(self, seed: int, hosts: int, prefer: tuple[str, ...], origin: float = LINK) -> None:
        draw, starts, at = random.Random(seed), [], 0
        while at < SIZE:
            starts.append(at)
            at += draw.choice([1, 2, 4, 8]) * MIB
        self.prefer = prefer
        self.crossed: Counter[int] = Counter()  # chunk -> how often
        super().__init__(seed, hosts, ChunkPlan(SIZE, tuple(starts)), LINK, origin, prefer=prefer)

    def remote(self, one: Host, other: Host) -> bool:
        return (self.hosts.index(one) - self.hosts.index(other)) % 2 == 1

    def settle(self, has: list[Host]) -> list[Host]:
        """These have it all; the others, who start within a second."""
        for host in self.hosts:
            for other in self.hosts:
                self.feed(host, PeerMet(other.name, remote=self.remote(host, other)))
        for host in has:
            host.had, host.end = set(range(len(self.plan))), Done(BLOB)
        cold = [host for host in self.hosts if host not in has]
        for host in cold:
            self.at(self.random.random(), partial(self.start, host))
        return cold

    def end(self) -> float:
        """Run it; how often each byte crossed from one datacenter to the other."""
        self.run()
        assert all(isinstance(host.end, Done) for host in self.hosts)
        return sum(self.plan.span(chunk)[1] * times for chunk, times in self.crossed.items()) / SIZE

    def arrives(self, host: Host, sender: Host | None, chunk: int) -> None:
        if sender is not None and self.remote(host, sender):
            self.crossed[chunk] += 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("prefer", "origin", "crossing"), [(ORIGIN_FIRST, 1, 0), (REMOTE_FIRST, 0, 1), (NEVER, 1, 0)])
def test_a_datacenter_takes_each_byte_once(prefer: tuple[str, ...], origin: int, crossing: int, seed: int) -> None:
    fleet = Datacenters(seed, 12, prefer)
    fleet.settle(fleet.hosts[::2])
    crossed, read = fleet.end(), fleet.egress / SIZE
    print(f"seed {seed}: {crossed:.3f} crossed, {read:.3f} read, {fleet.now:.1f} s")
    assert crossing * 0.95 <= crossed <= crossing * 1.1, seed
    assert origin * 0.95 <= read <= origin * 1.1, seed
    assert fleet.now <= 1.8 * SIZE / LINK + 1.0, seed


@pytest.mark.parametrize("seed", range(2))
def test_when_nobody_has_it_each_datacenter_reads_it_or_takes_what_the_other_has(seed: int) -> None:
    for prefer, read in ((ORIGIN_FIRST, 2.1), (NEVER, 2.1), (REMOTE_FIRST, 2.1)):
        fleet = Datacenters(seed, 12, prefer)
        fleet.settle([])
        crossed = fleet.end()
        assert 1.0 <= fleet.egress / SIZE <= read, seed
        assert crossed <= (1.1 if prefer == REMOTE_FIRST else 0.0), seed
