"""The planner's loads: from the origin and from this host's own disk, begun, ended and dropped; in virtual time."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.core.virtual import World
from weightcache.core import loads
from weightcache.core import planner as rules
from weightcache.core.events import Done, GiveUp, Kind, Reach, Via
from weightcache.core.layout import CHUNK
from weightcache.core.turns import FIRST_READS, ORIGIN_READ

# -- the origin


def test_a_dead_origin_and_a_failing_peer_are_waited_for_in_vain() -> None:
    world = World(1)
    world.origin.behaviour = "dead"
    peer = world.add_peer("peer", "refusing")
    wanted = world.want("blob", 20, reach=Reach.RANGED)
    world.has(peer, "blob")
    world.run()
    assert isinstance(wanted.end, GiveUp)
    assert wanted.end.error == "OriginUnavailable"
    assert world.origin.detail in wanted.end.message
    assert peer.name.hex()[:12] in wanted.end.message
    assert loads.PATIENCE <= wanted.ended_at <= loads.PATIENCE + rules.HEARTBEAT


def test_a_dead_origin_is_asked_a_few_times_by_one_read_at_a_time() -> None:
    world = World(1)
    world.origin.behaviour = "dead"
    wanted = world.want("blob", 1_000, reach=Reach.RANGED)
    world.run()
    assert isinstance(wanted.end, GiveUp)
    assert wanted.end.error == "OriginUnavailable"
    assert len(world.origin.reads) == FIRST_READS + 4
    retries = [when for when, _ in world.origin.reads[FIRST_READS - 1 :]]
    pauses = [later - sooner for sooner, later in pairwise(retries)]
    assert pauses[-1] > pauses[0] >= rules.FIRST_PAUSE / 2
    assert wanted.ended_at < 15


def test_one_failed_read_does_not_stop_the_others() -> None:
    world = World(1)
    wanted = world.want("blob", 100, CHUNK, reach=Reach.RANGED)
    world._fail(next(iter(world.flights.values())).fetch, Kind.UNAVAILABLE)
    assert len(world.flights) == FIRST_READS - 1
    world.run(lambda: len(wanted.order) >= FIRST_READS * ORIGIN_READ // CHUNK)
    assert len(world.flights) == world.streams
    world.run()
    assert isinstance(wanted.end, Done)


def test_an_origin_that_recovers_is_used_again_at_full_width() -> None:
    world = World(1)
    world.origin.behaviour = "dead"
    wanted = world.want("blob", 100, CHUNK, reach=Reach.RANGED)
    world.at(2.0, lambda: setattr(world.origin, "behaviour", "good"))
    world.run(lambda: len(wanted.order) >= FIRST_READS * ORIGIN_READ // CHUNK)
    assert len(world.flights) == world.streams
    world.run()
    assert isinstance(wanted.end, Done)


def test_the_last_word_of_the_origin_ends_the_load() -> None:
    world = World(1)
    world.origin.behaviour, world.origin.detail = "fatal", "s3://bucket/key changed\nunderneath"
    wanted = world.want("blob", 20, reach=Reach.RANGED)
    world.run()
    assert wanted.end == GiveUp(b"blob", "OriginUnavailable", "s3://bucket/key changed underneath")


def test_small_neighbours_are_read_from_the_origin_together() -> None:
    world = World(1)
    wanted = world.want("blob", 2_000, 64 << 10, reach=Reach.RANGED)
    world.run()
    assert isinstance(wanted.end, Done)
    assert len(world.origin.reads) < 3 * 2_000 * (64 << 10) / ORIGIN_READ


def test_a_stream_is_read_once_and_starts_over_when_it_breaks() -> None:
    world = World(5)
    wanted = world.want("blob", 40, reach=Reach.STREAM, had=[0, 7])
    assert [fetch.chunks for _, fetch in world.fetches] == [tuple(sorted(set(range(40)) - {0, 7}))]
    world.run(lambda: len(wanted.order) == 20)
    ((number, flight),) = world.flights.items()
    world._fail(flight.fetch, Kind.RESET, "connection lost", error="OriginUnavailable")
    world.run()
    assert isinstance(wanted.end, Done)
    assert [fetch.whole for _, fetch in world.fetches] == [True, True]
    assert world.fetches[1][1].request != number
    assert set(world.fetches[1][1].chunks) == set(range(40)) - {0, 7} - set(wanted.order[:20])


@pytest.mark.parametrize("peers", [0, 1])
def test_what_a_local_copy_cannot_give_comes_from_elsewhere(peers: int) -> None:
    world = World(1)
    wanted = world.want("blob", 30, reach=Reach.RANGED, local=range(30), bad_local=range(0, 30, 3))
    for number in range(peers):
        world.has(world.add_peer(f"peer {number}"), "blob")
    world.run()
    assert isinstance(wanted.end, Done)
    elsewhere = {chunk for _, fetch in world.fetches if fetch.via is not Via.LOCAL for chunk in fetch.chunks}
    assert elsewhere == set(range(0, 30, 3))
    assert (not world.origin.reads) == bool(peers)
    assert {blame.via for _, blame in wanted.blames} == {Via.LOCAL}


# -- loads that come and go


def test_a_load_removed_in_mid_flight_leaves_the_other_alone() -> None:
    world = World(1)
    peer = world.add_peer("peer", rate=100e6)
    kept = world.want("kept", 50)
    world.want("dropped", 50)
    for name in ("kept", "dropped"):
        world.has(peer, name)
    world.run(0.1)
    assert {flight.fetch.blob for flight in world.flights.values()} == {b"kept", b"dropped"}
    world.drop("dropped")
    world.run()
    assert isinstance(kept.end, Done)
    again = world.want("dropped", 50)
    world.has(peer, "dropped")
    world.run()
    assert isinstance(again.end, Done)


def test_nothing_missing_is_done_at_once() -> None:
    world = World(1)
    assert isinstance(world.want("had", 5, had=range(5)).end, Done)
    assert isinstance(world.want("empty", 0).end, Done)
    world.run()
