"""The planner against a world in virtual time (virtual.py): every action is checked there as it is performed."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.virtual import FAILS, MIB, World
from weightcache.core import planner as rules
from weightcache.core.bitmap import ChunkSet
from weightcache.core.bits import members, members_from_anywhere
from weightcache.core.events import (
    Cancel,
    Done,
    Event,
    Failed,
    Fetch,
    GiveUp,
    Got,
    Kind,
    LoadAdded,
    LoadRemoved,
    PeerGot,
    PeerHas,
    PeerLeft,
    PeerPardoned,
    PeerQuits,
    PeerReads,
    Reach,
    Tick,
    Wake,
)
from weightcache.core.layout import CHUNK, ChunkPlan
from weightcache.core.loads import Load
from weightcache.core.neighbours import Crowd
from weightcache.core.planner import Planner

BEHAVIOURS = ["good", "good", "silent", *FAILS]


def random_plan(draw: random.Random) -> ChunkPlan:
    starts, at = [], 0
    for _ in range(draw.choice([0, 1, 2, 10, 40])):
        starts.append(at)
        at += draw.choice([draw.randrange(1, 4096), draw.randrange(1, 2 * MIB), CHUNK])
    return ChunkPlan(at, tuple(starts))


def random_world(seed: int) -> World:
    """Some loads, some peers, an origin; whatever can go wrong does, at random moments."""
    world = World(seed, streams=random.Random(seed).choice([1, 2, 8]))
    draw = random.Random(seed + 1)
    world.origin.behaviour = draw.choice(["good", "good", "flaky", "dead", "fatal"])
    for index in range(draw.choice([0, 1, 2, 5, 20])):
        rate = draw.choice([1e6, 50e6, 1e9])
        world.add_peer(f"peer {index}", draw.choice(BEHAVIOURS), rate=rate, wait=draw.choice([0.0, 0.05, 1e9]))

    def add(blob: str) -> None:
        if blob.encode() in world.unfinished:
            return
        plan = random_plan(draw)
        some = draw.sample(range(len(plan)), len(plan) // 2)
        had, local = set(some[::2]), set(some[1::2])
        bad = {chunk for chunk in local if draw.random() < 0.3}
        reach = draw.choice([Reach.NONE, Reach.RANGED, Reach.RANGED, Reach.STREAM])
        world.want_plan(blob, plan, draw.randrange(3), reach, had, local, bad, attempts=draw.choice([1, 5]))
        for peer in world.peers.values():
            if peer.present and draw.random() < 0.7:
                whole = draw.random() < 0.4
                world.has(peer, blob, None if whole else draw.sample(range(len(plan)), len(plan) // 3))
            elif peer.present and draw.random() < 0.5:
                world.reads(peer, blob, ())

    def something(blob: str) -> None:
        wanted = world.wanted.get(blob.encode())
        peer = draw.choice(list(world.peers.values())) if world.peers else None
        what = draw.random()
        if wanted is None or blob.encode() not in world.unfinished:
            add(blob)  # again: after it was dropped, given up, or done
        elif what < 0.1:
            world.drop(blob)
        elif peer is None:
            world.origin.behaviour = draw.choice(["good", "flaky", "dead"])
        elif not peer.present:
            peer.present, peer.behaviour = True, draw.choice(BEHAVIOURS)
            world.has(peer, blob)
        elif what < 0.3:
            world.leave(peer)
        elif what < 0.35:
            world.pardon(peer)
        elif what < 0.5:
            peer.behaviour = draw.choice(BEHAVIOURS)
        elif what < 0.6:
            world.reads(peer, blob, draw.sample(range(len(wanted.plan)), len(wanted.plan) // 4))
        elif what < 0.65:
            world.feed(PeerQuits(peer.name, blob.encode()))
        elif len(wanted.plan):
            world.got(peer, blob, draw.sample(range(len(wanted.plan)), draw.randrange(len(wanted.plan))))

    blobs = [f"blob {index}" for index in range(draw.choice([1, 2, 5]))]
    for blob in blobs:
        world.at(draw.choice([0.0, 0.0, draw.random()]), partial(add, blob))
    for _ in range(draw.choice([0, 5, 40])):
        world.at(draw.choice([0.1, 1.0, 20.0]) * draw.random(), partial(something, draw.choice(blobs)))
    return world


@pytest.mark.parametrize("first", range(0, 240, 20))
def test_every_load_ends_whatever_goes_wrong(first: int) -> None:
    for seed in range(first, first + 20):
        world = random_world(seed)
        try:
            world.run()
        except AssertionError as error:
            raise AssertionError(f"random_world({seed}) at {world.now:.3f} s: {error}") from error


def digest() -> str:
    """All that the planner decided in a few worlds."""
    found = hashlib.sha256()
    for seed in (3, 7, 12, 31):
        world = random_world(seed)
        world.run()
        found.update("\n".join(world.log).encode())
    return found.hexdigest()


def test_the_same_events_give_the_same_actions_in_every_process() -> None:
    here = digest()
    assert digest() == here
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", "from tests.core.test_planner import digest; print(digest())"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == here


# -- any events at all

CHUNKS = 6
blobs = st.sampled_from([b"a" * 32, b"b" * 32])
names = st.sampled_from([b"1", b"2", b"3"])
chunks = st.lists(st.integers(-1, CHUNKS), max_size=CHUNKS)
chunk_sets = st.sets(st.integers(0, CHUNKS - 1)).map(lambda some: ChunkSet(CHUNKS, some))
any_events = st.one_of(
    st.builds(
        lambda blob, had, rank, origin: LoadAdded(
            blob, ChunkPlan(CHUNKS * MIB, range(0, CHUNKS * MIB, MIB)), had, rank, origin, 2, (0, 3)
        ),
        blobs,
        chunk_sets,
        st.integers(0, 1),
        st.sampled_from(Reach),
    ),
    st.builds(LoadRemoved, blobs),
    st.builds(PeerHas, names, blobs, st.none() | chunk_sets | st.just(ChunkSet(CHUNKS + 9, [CHUNKS + 8]))),
    st.builds(PeerGot, names, blobs, chunks),
    st.builds(PeerReads, names, blobs, chunks),
    st.builds(PeerQuits, names, blobs),
    st.builds(PeerLeft, names),
    st.builds(PeerPardoned, names),
    st.builds(Got, st.integers(0, 40), st.integers(-1, CHUNKS)),
    st.builds(Failed, st.integers(0, 40), st.sampled_from(Kind), st.text(max_size=5), st.floats()),
    st.just(Tick()),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(), st.lists(st.tuples(any_events, st.floats(0, 30)), max_size=60))
def test_any_events_in_any_order_leave_the_books_right(seed: int, events: list[tuple[Event, float]]) -> None:
    planner, now = Planner(seed), 0.0
    known: dict[int, bytes] = {}
    loads: set[bytes] = set()
    for event, later in events:
        now += later
        if isinstance(event, LoadAdded):
            loads.add(event.blob)
        elif isinstance(event, LoadRemoved):
            loads.discard(event.blob)
        for action in planner.handle(event, now):
            match action:
                case Fetch():
                    assert action.request not in known
                    assert action.blob in loads
                    known[action.request] = action.blob
                case Cancel(request):
                    assert request in known
                case Done(blob) | GiveUp(blob):
                    assert blob in loads
                    loads.discard(blob)
                case Wake(at):
                    assert now < at <= now + rules.HEARTBEAT
    assert planner._loads.keys() == loads
    for blob in sorted(loads):
        planner.handle(LoadRemoved(blob), now)
    assert not planner._requests
    assert (planner._peers.owed, planner._peers.owing, planner._reading, planner._copying) == (0, 0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["learn", "gain", "lose", "lack"]), chunk_sets)))
def test_a_load_knows_who_has_what(steps: list[tuple[int, str, ChunkSet]]) -> None:
    plan = ChunkPlan(CHUNKS, range(CHUNKS))
    load = Load.begin(LoadAdded(b"", plan, ChunkSet(CHUNKS), 0, Reach.NONE), b"me", Crowd(b""), 0.0)
    has: dict[int, set[int]] = {slot: set() for slot in range(4)}
    for slot, what, some in steps:
        if what == "lose":
            load.lose(slot)
            has[slot].clear()
        else:
            getattr(load, what)(slot, some)
            has[slot] = {"learn": set(some), "gain": has[slot] | set(some), "lack": has[slot] - set(some)}[what]
        for chunk in range(CHUNKS):
            holders = {slot for slot in has if chunk in has[slot]}
            assert set(members(load.complete | load.holders[chunk])) == holders
            assert bool(load.held >> chunk & 1) == bool(load.holders[chunk])


@given(st.integers(0, 1 << 70), st.integers())
def test_a_walk_from_anywhere_meets_every_member_once(mask: int, seed: int) -> None:
    assert sorted(members_from_anywhere(mask, random.Random(seed))) == [n for n in range(71) if mask >> n & 1]
