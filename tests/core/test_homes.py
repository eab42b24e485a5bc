"""Who reads what from the origin: homes (homes.py), whose turn it is (turns.py), and fleets that start together."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.virtual import World
from weightcache.core import turns as rules
from weightcache.core.bitmap import ChunkSet
from weightcache.core.bits import members
from weightcache.core.events import Cancel, Done, Event, Fetch, LoadAdded, PeerQuits, PeerReads, Reach
from weightcache.core.homes import Homes
from weightcache.core.layout import CHUNK, ChunkPlan
from weightcache.core.planner import Planner
from weightcache.core.turns import parts

BLOB = b"b" * 32


def names(count: int, seed: int = 0) -> list[bytes]:
    draw = random.Random(seed)
    return [draw.randbytes(32) for _ in range(count)]


def homes(me: bytes, others: list[bytes], count: int) -> Homes:
    found = Homes(BLOB, count)
    for other in [me, *others]:
        found.join(other)
    return found


# -- homes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 12), st.randoms(use_true_random=False))
def test_every_part_has_one_home_wherever_one_looks(count: int, hosts: int, draw: random.Random) -> None:
    everybody = names(hosts, draw.randrange(1000))
    views = []
    for me in everybody:
        others = [name for name in everybody if name != me]
        strangers = names(3, draw.randrange(1000, 2000))  # were members for a while
        order = draw.sample(others + strangers, len(others) + len(strangers))
        view = homes(me, order, count)
        for name in draw.sample(strangers, len(strangers)):
            view.quit(name)
        views.append(view)
        assert len(view) == hosts
        assert [view.home(part) for part in range(count)] == [views[0].home(part) for part in range(count)]
        assert set(members(view.share(me))) == {part for part in range(count) if view.home(part) == me}
    assert sum(view.share(me) for view, me in zip(views, everybody, strict=True)) == (1 << count) - 1


def test_shares_are_even() -> None:
    for hosts, count in ((2, 3000), (8, 3000), (100, 3000), (3, 36)):
        everybody = names(hosts)
        view = homes(everybody[0], everybody[1:], count)
        shares = [sum(view.home(part) == name for part in range(count)) for name in everybody]
        mean = count / hosts
        assert max(shares) <= mean + 4 * mean**0.5
        assert min(shares) >= mean - 4 * mean**0.5


def test_who_comes_or_goes_moves_only_his_share() -> None:
    me, newcomer, *others = names(20)
    view = homes(me, others, 2000)
    before = [view.home(part) for part in range(2000)]
    view.join(newcomer)
    after = [view.home(part) for part in range(2000)]
    assert {new for old, new in zip(before, after, strict=True) if old != new} == {newcomer}
    assert 50 < after.count(newcomer) < 150
    view.quit(newcomer)
    assert [view.home(part) for part in range(2000)] == before


def test_a_reach_grows_from_little_to_everything_and_differs_between_members() -> None:
    everybody = names(10)
    reaches = [(homes(me, [other for other in everybody if other != me], 1000), me) for me in everybody]
    counts = [sum(view.reach(me, 2.0) >> part & 1 for view, me in reaches) for part in range(1000)]
    assert 1.8 < sum(counts) / 1000 < 2.2
    for view, me in reaches:
        assert view.reach(me, 0.0) == 0
        assert view.reach(me, 1.0) & view.reach(me, 4.0) == view.reach(me, 1.0)
        assert view.reach(me, 10.0) == (1 << 1000) - 1


def test_one_more_among_a_thousand_costs_little() -> None:
    me, *others = names(1001)
    view = homes(me, others, 3000)
    spent = []
    for other in others[:50]:
        began = time.perf_counter()
        view.quit(other)
        view.join(other)
        spent.append(time.perf_counter() - began)
    assert sorted(spent)[25] < 0.02


@given(st.lists(st.integers(1, CHUNK), max_size=50))
def test_a_part_is_what_one_read_brings(lengths: list[int]) -> None:
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    found = parts(ChunkPlan(sum(lengths), starts))
    chunks = [list(part) for part in found]
    assert [chunk for part in chunks for chunk in part] == list(range(len(lengths)))
    assert all(sum(lengths[chunk] for chunk in part) <= rules.ORIGIN_READ for part in chunks)
    assert all(sum(lengths[c] for c in a) + lengths[b[0]] > rules.ORIGIN_READ for a, b in pairwise(chunks))


# -- turns, for one host


@pytest.mark.parametrize("reach", [Reach.RANGED, Reach.STREAM])
def test_what_homes_never_bring_is_read_all_the_same(reach: Reach) -> None:
    for seed in range(10):
        world = World(seed)
        peers = [world.add_peer(f"peer {index}") for index in range(9)]
        wanted = world.want("blob", 200, reach=reach)
        for peer in peers:
            world.reads(peer, "blob", range(0, 200, 9))  # so they say
        world.run()
        assert isinstance(wanted.end, Done), seed
        assert wanted.ended_at < 30, seed


def test_a_large_swarm_reads_in_order_and_not_all_at_once() -> None:
    planner = Planner(seed=1, me=b"me 1")
    plan = ChunkPlan(400 * rules.ORIGIN_READ, range(0, 400 * rules.ORIGIN_READ, rules.ORIGIN_READ))
    many = rules.READING // rules.ORIGIN_READ
    peers = [b"peer %d" % number for number in range(many + 16)]
    readers = [(peer, [number] if number < many else []) for number, peer in enumerate(peers)]

    def asks(event: Event, now: float) -> list[int]:
        return [action.chunks[0] for action in planner.handle(event, now) if isinstance(action, Fetch)]

    assert not asks(LoadAdded(b"blob", plan, ChunkSet(400), 1, Reach.RANGED, readers=readers), 0.0)
    assert not asks(LoadAdded(b"later", plan, ChunkSet(400), 2, Reach.RANGED), 0.0)  # that one has no line: it waits
    begun = [chunk for peer in peers[:many] for chunk in asks(PeerReads(peer, b"blob", ()), 0.01)]
    assert begun == [112]  # of its share the first that nobody has begun


@pytest.mark.parametrize(
    ("other", "later", "gives_way"), [(b"a", 0.01, True), (b"z", 0.01, False), (b"a", rules.SETTLE + 0.1, False)]
)
def test_of_two_that_begin_to_read_the_same_at_once_one_gives_way(other: bytes, later: float, gives_way: bool) -> None:
    planner = Planner(seed=1, me=b"m")
    plan = ChunkPlan(40 * CHUNK, range(0, 40 * CHUNK, CHUNK))
    actions = planner.handle(LoadAdded(b"blob", plan, ChunkSet(40), 1, Reach.RANGED), 0.0)
    first, second = (action for action in actions if isinstance(action, Fetch))
    actions = planner.handle(PeerReads(other, b"blob", first.chunks[1:]), later)
    assert [action for action in actions if isinstance(action, Cancel)] == [Cancel(first.request)] * gives_way
    asked = {chunk for action in actions if isinstance(action, Fetch) for chunk in action.chunks}
    assert not asked & {*first.chunks[1:], *second.chunks}


def test_a_member_that_quits_leaves_its_share_at_once() -> None:
    world = World(1)
    peer = world.add_peer("peer")
    wanted = world.want("blob", 400, CHUNK, reach=Reach.RANGED)
    world.reads(peer, "blob", ())
    world.at(0.5, lambda: world.feed(PeerQuits(peer.name, b"blob")))
    world.run()
    assert isinstance(wanted.end, Done)
    assert wanted.ended_at < 1.1 * 400 * (0.02 + CHUNK / world.origin.rate) / world.streams + 1.0
