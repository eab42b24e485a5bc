"""Peers of other datacenters: asked where policy says so, and once a datacenter; one host, then fleets."""

from __future__ import annotations

import random

import pytest

from tests.core.virtual import MIB, World
from weightcache.core.events import Done, GiveUp, PeerMet, Reach
from weightcache.core.layout import CHUNK, ChunkPlan
from weightcache.core.turns import ORIGIN_READ
from weightcache.tools.sim_fleet import Blob, Fleet

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
        assert len(world.asked_of(far)) == 50 - reads * (ORIGIN_READ // CHUNK)
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


# -- fleets: two datacenters

SIZE = 240_000_000
LINK = 50e6


def play(seed: int, prefer: tuple[str, ...], *, warm: bool) -> tuple[Fleet, float, float]:
    """Twelve hosts in two datacenters start within a second; those of the first have it all, if they are ``warm``. How
    often each byte was read from the origin, and crossed from one datacenter to the other."""
    draw, starts, at = random.Random(seed), [], 0
    while at < SIZE:
        starts.append(at)
        at += draw.choice([1, 2, 4, 8]) * MIB
    fleet = Fleet(seed, [Blob(b"b" * 32, ChunkPlan(SIZE, tuple(starts)))], LINK, LINK, prefer=prefer)
    hosts = [fleet.add(warm=warm and not number % 2, place=number % 2) for number in range(12)]
    for host in hosts[1::2] if warm else hosts:
        fleet.start(host, draw.random())
    fleet.run()
    assert all(not why for host in hosts for _, why in host.ended.values())
    return fleet, fleet.egress / SIZE, fleet.crossed / SIZE


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("prefer", "origin", "crossing"), [(ORIGIN_FIRST, 1, 0), (REMOTE_FIRST, 0, 1), (NEVER, 1, 0)])
def test_a_datacenter_takes_each_byte_once(prefer: tuple[str, ...], origin: int, crossing: int, seed: int) -> None:
    fleet, read, crossed = play(seed, prefer, warm=True)
    print(f"seed {seed}: {crossed:.3f} crossed, {read:.3f} read, {fleet.now:.1f} s")
    assert crossing * 0.95 <= crossed <= crossing * 1.1, seed
    assert origin * 0.95 <= read <= origin * 1.1, seed
    assert fleet.now <= 1.8 * SIZE / LINK + 1.0, seed


@pytest.mark.parametrize("seed", range(2))
def test_when_nobody_has_it_each_datacenter_reads_it_or_takes_what_the_other_has(seed: int) -> None:
    for prefer in (ORIGIN_FIRST, NEVER, REMOTE_FIRST):
        _, read, crossed = play(seed, prefer, warm=False)
        assert 1.0 <= read <= 2.1, seed
        assert crossed <= (1.1 if prefer == REMOTE_FIRST else 0.0), seed
