"""Who is whose neighbour in a swarm (neighbours.py), and that chunks reach all of a fleet of hundreds that way."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcache.core.neighbours import FEW, RINGS, Crowd, Rings
from weightcache.tools.simulate import Scenario, play

BLOB = b"b" * 32


def names(count: int, seed: int = 0) -> list[bytes]:
    draw = random.Random(seed)
    return [draw.randbytes(32) for _ in range(count)]


def rings(members: list[bytes]) -> Rings:
    found = Rings(BLOB)
    for name in members:
        found.join(name)
    return found


def steps(of: Rings, start: bytes) -> tuple[int, int]:
    """How many members can be reached from one, and in how many steps."""
    reached, edge, taken = {start}, [start], -1
    while edge:
        edge = list(dict.fromkeys(other for name in edge for other in of.near(name) if other not in reached))
        reached.update(edge)
        taken += 1
    return len(reached), taken


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 120), st.randoms(use_true_random=False))
def test_neighbours_agree_and_reach_everybody_whoever_came_and_went(hosts: int, draw: random.Random) -> None:
    everybody, strangers = names(hosts, draw.randrange(1000)), names(20, draw.randrange(1000, 2000))
    swarm = Rings(BLOB)
    come = draw.sample(everybody + strangers, hosts + 20)
    for name in come:
        swarm.join(name)
        swarm.near(draw.choice(come))  # what was asked before is not believed after
    for name in draw.sample(strangers, 20):
        swarm.quit(name)
        swarm.near(draw.choice(everybody))
    again = rings(everybody)
    for name in everybody:
        near = swarm.near(name)
        assert sorted(near) == sorted(again.near(name))
        assert len(near) <= FEW if hosts <= FEW + 1 else len(near) <= 2 * RINGS
        assert all(name in swarm.near(other) for other in near)
        assert hosts > FEW + 1 or len(near) == hosts - 1
    assert steps(swarm, everybody[0])[0] == hosts


def test_thousands_are_reached_in_a_few_steps() -> None:
    everybody = names(3000)
    assert steps(rings(everybody), everybody[0]) == (3000, 4)


def test_who_comes_or_goes_moves_only_his_neighbours() -> None:
    newcomer, *others = names(500)
    swarm = rings(others)
    before = {name: swarm.near(name) for name in others}
    swarm.join(newcomer)
    changed = [name for name in others if swarm.near(name) is not before[name]]
    assert sorted(changed) == sorted(swarm.near(newcomer))
    swarm.quit(newcomer)
    assert all(sorted(swarm.near(name)) == sorted(before[name]) for name in others)
    assert swarm.near(newcomer) == ()


def test_a_crowd_has_the_same_homes_whenever_it_is_asked_first() -> None:
    first, second, everybody = Crowd(BLOB), Crowd(BLOB), names(40)
    first.homes(200)
    for crowd in (first, second):
        for name in everybody:
            crowd.join(name)
        crowd.quit(everybody[3])
    assert len(first) == len(second) == 39
    homes = second.homes(200)
    assert [first.homes(200).home(part) for part in range(200)] == [homes.home(part) for part in range(200)]


@pytest.mark.parametrize("trouble", [{}, {"churn": 0.05, "stragglers": 0.02}])
def test_a_fleet_of_more_than_neighbours_reads_the_origin_once(trouble: dict[str, float]) -> None:
    found = play(Scenario(100, 120_000_000, 4 << 20, 12.5e8, 5e8, spread=0.1, seed=3, **trouble))  # type: ignore[arg-type]
    assert not found["failed"]
    assert found["egress"] <= (1.15 if trouble else 1.05)
    assert found["messages_per_host_and_chunk"] <= found["messages_bound"] == 2 * RINGS + 2
