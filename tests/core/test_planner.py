"""The planner against a world in virtual time (virtual.py): every action is checked there as it is performed."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.virtual import CHUNK, FAILS, MIB, World
from weightcache.core import planner as rules
from weightcache.core.bitmap import ChunkSet
from weightcache.core.bits import members, members_from_anywhere
from weightcache.core.events import (
    Blame,
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
    Reach,
    Tick,
    Via,
    Wake,
)
from weightcache.core.layout import ChunkPlan
from weightcache.core.loads import Load
from weightcache.core.peers import UNPROVEN_CHUNKS
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
        elif what < 0.5:
            peer.behaviour = draw.choice(BEHAVIOURS)
        elif len(wanted.plan):
            world.got(peer, blob, draw.sample(range(len(wanted.plan)), draw.randrange(len(wanted.plan))))

    blobs = [f"blob {index}" for index in range(draw.choice([1, 2, 5]))]
    for blob in blobs:
        world.at(draw.choice([0.0, 0.0, draw.random()]), lambda blob=blob: add(blob))
    for _ in range(draw.choice([0, 5, 40])):
        world.at(draw.choice([0.1, 1.0, 20.0]) * draw.random(), lambda blob=draw.choice(blobs): something(blob))
    return world


@pytest.mark.parametrize("first", range(0, 240, 20))
def test_every_load_ends_whatever_goes_wrong(first: int) -> None:
    for seed in range(first, first + 20):
        world = random_world(seed)
        try:
            world.run()
        except AssertionError as error:
            raise AssertionError(f"random_world({seed}) at {world.now:.3f} s: {error}") from error


def test_the_same_events_give_the_same_actions_in_every_process() -> None:
    def digest() -> str:
        found = hashlib.sha256()
        for seed in (3, 7, 12, 31):
            world = random_world(seed)
            world.run()
            found.update("\n".join(world.log).encode())
        return found.hexdigest()

    here = digest()
    assert digest() == here
    program = "from tests.core import test_planner as t\nt.print_digest()"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == here
