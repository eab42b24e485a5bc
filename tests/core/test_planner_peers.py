"""The planner and its peers: who is asked, who is late, who fails; in virtual time (virtual.py)."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise

import pytest

from tests.core.virtual import MIB, World
from weightcache.core import loads
from weightcache.core import peers as limits
from weightcache.core import planner as rules
from weightcache.core.bitmap import ChunkSet
from weightcache.core.events import Done, Fetch, GiveUp, Got, Kind, LoadAdded, PeerHas, Reach
from weightcache.core.layout import CHUNK, ChunkPlan
from weightcache.core.peers import UNPROVEN_CHUNKS, Peers
from weightcache.core.planner import Planner

# -- who is asked


def test_the_origin_waits_for_a_busy_peer() -> None:
    world = World(1)
    peer = world.add_peer("seed", "busy", wait=0.2)
    wanted = world.want("blob", 50, reach=Reach.RANGED)
    world.has(peer, "blob")
    world.at(3.0, lambda: setattr(peer, "behaviour", "good"))
    world.run()
    assert isinstance(wanted.end, Done)
    assert len(wanted.order) == 50
    # The first reads were asked for before any peer was known; none was after.
    assert {when for when, _ in world.origin.reads} <= {0.0}


def test_a_peer_that_is_always_busy_does_not_keep_the_origin_waiting_forever() -> None:
    world = World(1)
    wanted_by_others = world.add_peer("seed", "busy", wait=1e9)
    wanted = world.want("blob", 50, reach=Reach.RANGED)
    world.has(wanted_by_others, "blob")
    world.run()
    assert isinstance(wanted.end, Done)
    assert wanted.ended_at < 2 * rules.BUSY_PATIENCE + rules.LONGEST_BUSY


def test_a_faster_peer_gives_more_and_a_slow_one_does_not_hold_up_the_end() -> None:
    world = World(1)
    fast, slow = world.add_peer("fast", rate=1e9), world.add_peer("slow", rate=20e6)
    wanted = world.want("blob", 200, CHUNK)
    world.has(fast, "blob")
    world.has(slow, "blob")
    world.run()
    assert isinstance(wanted.end, Done)
    assert len(world.asked_of(slow)) < len(world.asked_of(fast)) / 10
    assert wanted.ended_at < 3.5  # 1.7 s by the fast one alone


def test_few_send_at_once_and_much_is_on_its_way() -> None:
    world = World(1)
    for number in range(200):
        world.add_peer(f"peer {number}", rate=1e9)
    world.want("blob", 2_000)
    most_senders = most = 0
    for peer in list(world.peers.values()):
        world.has(peer, "blob")

    def watch() -> bool:
        nonlocal most_senders, most
        most_senders = max(most_senders, len({flight.fetch.via for flight in world.flights.values()}))
        most = max(most, len(world.flights))
        return False

    world.run(watch)
    assert most_senders <= 16
    assert most >= 32


def test_all_peers_together_owe_a_bounded_amount() -> None:
    world = World(1)
    for number in range(10):
        world.add_peer(f"peer {number}", rate=1e9)
    wanted = world.want("blob", 800, CHUNK)
    most = 0
    for peer in list(world.peers.values()):
        world.has(peer, "blob")

    def watch() -> bool:
        nonlocal most
        most = max(most, world.owed_once())
        return False

    world.run(watch)
    assert isinstance(wanted.end, Done)
    assert limits.HOST_BYTES <= most < limits.HOST_BYTES + CHUNK


def test_a_chunk_that_one_partial_holder_has_is_found_among_thousands() -> None:
    world = World(1)
    peer = world.add_peer("peer")
    wanted = world.want("blob", 5_000, 1024)
    world.got(peer, "blob", [4_321])
    assert [fetch.chunks for _, fetch in world.fetches] == [(4_321,)]
    world.run(lambda: bool(wanted.order))
    world.drop("blob")
    world.run()


def test_a_swarm_that_grows_slowly_is_waited_for() -> None:
    world = World(1)
    peer = world.add_peer("peer")
    wanted = world.want("blob", 10)
    for chunk in range(10):
        world.at(20.0 * (chunk + 1), partial(world.got, peer, "blob", [chunk]))
    world.run()
    assert isinstance(wanted.end, Done)
    assert wanted.order == list(range(10))


def test_equals_share_and_a_lower_rank_goes_first() -> None:
    world = World(1)
    peer = world.add_peer("peer", rate=100e6)
    loads = {name: world.want(name, 300, rank=1) for name in ("one", "two")}
    for name in loads:
        world.has(peer, name)
    world.run(0.5)
    counts = [len(wanted.order) for wanted in loads.values()]
    assert min(counts) >= 10
    assert abs(counts[0] - counts[1]) <= 4
    before = len(world.fetches)
    loads["first"] = world.want("first", 30, CHUNK, rank=0)  # its chunks are larger: small ones must not slip past them
    world.has(peer, "first")
    world.run()
    after = [fetch.blob for _, fetch in world.fetches[before:]]
    assert after[:30] == [b"first"] * 30
    assert min(loads, key=lambda name: loads[name].ended_at) == "first"
    assert all(isinstance(wanted.end, Done) for wanted in loads.values())


def test_a_load_whose_turn_comes_late_is_not_given_up() -> None:
    world = World(1)
    peer = world.add_peer("peer", rate=50e6)
    first, last = world.want("first", 1000, CHUNK, rank=0), world.want("last", 3, rank=1)
    world.has(peer, "first")
    world.has(peer, "last")
    world.run()
    assert isinstance(first.end, Done)
    assert isinstance(last.end, Done)
    assert first.ended_at > loads.PATIENCE + rules.HEARTBEAT


# -- who is late


def test_a_late_request_is_hedged() -> None:
    world = World(1)
    silent, good = world.add_peer("silent", "silent"), world.add_peer("good", rate=50e6)
    wanted = world.want("blob", 200)
    world.has(silent, "blob")
    world.has(good, "blob")
    world.run()
    assert isinstance(wanted.end, Done)
    assert world.hedged == len(world.asked_of(silent)) * MIB >= UNPROVEN_CHUNKS * MIB
    assert wanted.ended_at == pytest.approx(200 * MIB / good.rate, rel=0.05)
    assert {(blame.via, blame.kind) for _, blame in wanted.blames} == {(silent.name, Kind.STALLED)}


def test_past_the_hard_deadline_a_chunk_comes_from_elsewhere() -> None:
    world = World(1)
    silent = [world.add_peer(f"silent {number}", "silent") for number in range(2)]
    world.origin.behaviour = "dead"
    wanted = world.want("blob", 4, reach=Reach.NONE)
    for peer in silent:
        world.has(peer, "blob")
    world.run(5.0)
    assert not wanted.blames  # nothing comes from anyone: that may be this host
    assert len(world.flights) == 4
    good = world.add_peer("good")
    world.has(good, "blob")
    world.run()
    assert isinstance(wanted.end, Done)
    assert {fetch.via for _, fetch in world.fetches[4:]} == {good.name}
    assert {blame.kind for _, blame in wanted.blames} == {Kind.STALLED}
    assert wanted.ended_at < rules.HARD_FACTOR * (rules.SOFT_DEADLINE + 1.0)


def test_a_silent_peer_does_not_keep_the_origin_waiting() -> None:
    world = World(1)
    silent = world.add_peer("silent", "silent")
    wanted = world.want("blob", 500, had=range(500))  # so that it has been heard of before
    wanted = world.want("large", 500)
    world.has(silent, "large")
    assert len(world.flights) == UNPROVEN_CHUNKS
    world.drop("large")
    wanted = world.want("again", 500, reach=Reach.RANGED, had=range(0, 500, 2))
    world.has(silent, "again")
    world.run()
    assert isinstance(wanted.end, Done)
    assert wanted.ended_at < rules.SOFT_DEADLINE + 4.0
    assert len(world.asked_of(silent)) <= 3 * UNPROVEN_CHUNKS


def test_a_stall_of_this_host_is_blamed_on_nobody() -> None:
    world = World(1)
    for number in range(10):
        world.add_peer(f"peer {number}")
    wanted = world.want("blob", 2_000, reach=Reach.RANGED)
    for peer in list(world.peers.values()):
        world.has(peer, "blob")
    world.run(0.2)
    reads = len(world.origin.reads)
    world.stalled_until = 6.0
    world.run()
    assert isinstance(wanted.end, Done)
    assert wanted.blames == []
    assert world.hedged == 0
    assert len(world.origin.reads) == reads


def test_alarms_are_few() -> None:
    world = World(1)
    peer = world.add_peer("peer", rate=100e6)
    wanted = world.want("blob", 2_000)
    world.has(peer, "blob")
    world.run()
    assert wanted.ended_at > 20
    assert world.wakes < 20
    assert sum("Wake" in line for line in world.log) < 40


# -- who fails


def test_a_liar_is_not_asked_again_and_named_in_the_end() -> None:
    world = World(1)
    liar = world.add_peer("liar", "lying")
    wanted = world.want("blob", 50)
    world.has(liar, "blob")
    world.run()
    assert isinstance(wanted.end, GiveUp)
    assert wanted.end.error == "LoadFailed"
    assert liar.name.hex()[:12] in wanted.end.message
    assert "mismatch: lying peer" in wanted.end.message
    assert loads.PATIENCE <= wanted.ended_at <= loads.PATIENCE + rules.HEARTBEAT
    asked = len(world.asked_of(liar))
    assert asked <= UNPROVEN_CHUNKS

    world.leave(liar)  # leaving and coming back clears nothing
    liar.present = True
    again = world.want("blob", 50, reach=Reach.RANGED)
    world.has(liar, "blob")
    world.run()
    assert isinstance(again.end, Done)
    assert len(world.asked_of(liar)) == asked

    world.now += rules.LIAR_REST
    liar.behaviour = "good"
    late = world.want("blob", 50)
    world.has(liar, "blob")
    world.run()
    assert isinstance(late.end, Done)


def test_nothing_more_is_expected_of_a_liar() -> None:
    world = World(1)
    peer = world.add_peer("peer")
    world.want("blob", 200)
    world.has(peer, "blob")
    world.run(lambda: len(world.flights) > 20)
    world._fail(next(iter(world.flights.values())).fetch, Kind.GARBAGE)
    assert not world.flights
    world.drop("blob")
    world.run()


def test_nothing_more_is_expected_of_a_peer_that_fell_silent() -> None:
    world = World(1)
    peer = world.add_peer("peer", rate=1e9)
    wanted = world.want("blob", 400)
    world.has(peer, "blob")
    world.run(0.1)
    peer.behaviour = "silent"
    world.run(8.0)
    assert len(world.flights) > 20
    world.run(lambda: len(world.flights) <= 20)
    assert not world.flights
    peer.behaviour = "good"
    world.run()
    assert isinstance(wanted.end, Done)


def test_a_load_does_not_live_forever_on_newcomers_that_deliver_nothing() -> None:
    world = World(1)
    wanted = world.want("blob", 100)

    def join(number: int) -> None:
        if wanted.end is None:
            world.has(world.add_peer(f"peer {number}", "silent"), "blob")

    for number in range(200):
        world.at(3.0 * number, partial(join, number))
    world.run()
    assert isinstance(wanted.end, GiveUp)
    assert "stalled" in wanted.end.message
    assert loads.LONGEST_STALL <= wanted.ended_at <= loads.LONGEST_STALL + rules.HEARTBEAT


def test_when_nothing_is_on_its_way_every_chunk_is_looked_at() -> None:
    world = World(1)
    resting, other = world.add_peer("resting", "refusing"), world.add_peer("other", rate=1e6)
    world.want("blob", 3_000, 1024)
    world.has(resting, "blob", range(2_999))
    world.run(0.1)
    assert not world.flights
    assert world.planner.rest(resting.name, world.now) > 0
    world.want("more", 1)
    world.has(other, "more", [])  # it is open, and has nothing
    world.got(other, "blob", [2_999])
    assert [flight.fetch.chunks for flight in world.flights.values()] == [(2_999,)]
    world.drop("more")
    world.drop("blob")
    world.run()


def test_a_failing_peer_rests_longer_each_time_and_one_outage_counts_once() -> None:
    world = World(1)
    peer = world.add_peer("peer")
    wanted = world.want("blob", 100)
    world.has(peer, "blob")
    world.run(lambda: len(world.flights) > 20)
    flights = [flight.fetch for flight in world.flights.values()]
    peer.behaviour = "refusing"
    for fetch in flights:  # the connection goes down, and all that was asked for on it
        world._fail(fetch, Kind.RESET)
    assert len(wanted.blames) == 1
    world.run()
    assert isinstance(wanted.end, GiveUp)
    assert peer.name.hex()[:12] in wanted.end.message
    rests = [blame.rest for _, blame in wanted.blames]
    assert len(rests) >= 4
    assert all(later > sooner for sooner, later in pairwise(rests))
    assert len(world.asked_of(peer)) <= len(wanted.order) + len(flights) + len(rests)  # a chunk to prove itself with


def test_who_lacks_a_chunk_keeps_the_others() -> None:
    world = World(1)
    peer = world.add_peer("peer", "missing")
    wanted = world.want("blob", 50, reach=Reach.RANGED, had=range(10))
    world.at(0.0015, lambda: setattr(peer, "behaviour", "good"))
    world.has(peer, "blob")
    world.run()
    assert isinstance(wanted.end, Done)
    assert wanted.blames == []


def test_a_peer_that_leaves_is_replaced_at_once() -> None:
    world = World(1)
    leaving, staying = world.add_peer("leaving"), world.add_peer("staying")
    wanted = world.want("blob", 500)
    world.has(leaving, "blob")
    world.has(staying, "blob")
    world.run(0.1)
    world.leave(leaving)
    world.run()
    assert isinstance(wanted.end, Done)
    assert wanted.ended_at < 2.0


def test_peers_that_come_and_go_leave_nothing_behind() -> None:
    world = World(1)
    wanted = world.want("blob", 5)
    for number in range(200):
        peer = world.add_peer(f"peer {number}", "refusing")
        world.got(peer, "blob", [0])
        world.run(world.now + 0.01)
        world.leave(peer)
    world.run()
    assert isinstance(wanted.end, GiveUp)
    assert "197 other peers" in wanted.end.message
    assert len(wanted.end.message) < 1_000
    world.now += rules.LONGEST_REST
    world.want("another", 1)
    assert len(world.planner._peers) == 0
    world.drop("another")
    world.run()


def test_a_pardoned_peer_is_asked_again_at_once() -> None:
    world = World(1)
    peer = world.add_peer("peer", "lying")
    wanted = world.want("blob", 20)
    world.has(peer, "blob")
    world.run(1.0)
    assert world.planner.rest(peer.name, world.now) > 0
    peer.behaviour = "good"
    world.pardon(peer)
    assert world.planner.rest(peer.name, world.now) == 0
    assert world.flights
    world.run()
    assert isinstance(wanted.end, Done)


# -- what is learned


def test_whom_to_ask_is_drawn_by_rate_and_by_what_is_owed() -> None:
    peers, draw = Peers(), random.Random(1)
    fast, slow = peers.meet(b"fast", 0.0), peers.meet(b"slow", 0.0)
    fast.rate = 3 * slow.rate

    def share() -> float:
        return sum(peers.sample(0b11, MIB, draw) == b"fast" for _ in range(4_000)) / 4_000

    assert share() == pytest.approx(3 / 4, abs=0.03)
    peers.owe(fast, 8 * MIB, 0.0)
    assert share() == pytest.approx(3 / 12, abs=0.03)
    many = [peers.meet(bytes([number]), 0.0) for number in range(100)]
    everyone = sum(1 << peer.slot for peer in many)
    drawn = {peers.sample(everyone, MIB, draw) for _ in range(2_000)}
    assert drawn == {peer.name for peer in many}


def test_bursts_of_tiny_chunks_do_not_make_a_peer_look_fast() -> None:
    planner, size, count = Planner(1), 1 << 10, 2_000
    plan = ChunkPlan(count * size, range(0, count * size, size))
    actions = planner.handle(LoadAdded(b"blob", plan, ChunkSet(count), 0, Reach.NONE), 0.0)
    actions = planner.handle(PeerHas(b"peer", b"blob", None), 0.0)
    now, got = 0.0, 0
    while got < count:
        asked = [action for action in actions if isinstance(action, Fetch)]
        actions = []
        now += len(asked) * size / 1e6  # 1 MB/s, seen by this host in bursts
        for fetch in asked:
            actions += planner.handle(Got(fetch.request, fetch.chunks[0]), now)
            got += 1
    assert planner.rate(b"peer") == pytest.approx(1e6, rel=0.5)
    assert planner.rest(b"peer", now) == 0.0
