"""What holds the planner back: this host's own disk, and the operator's bandwidth caps."""

from __future__ import annotations

import pytest

from weightcache.core.bitmap import ChunkSet
from weightcache.core.events import (
    Action,
    Congested,
    Done,
    Fetch,
    GiveUp,
    Got,
    LoadAdded,
    PeerHas,
    Reach,
    Tick,
    Via,
    Wake,
)
from weightcache.core.layout import CHUNK, plan
from weightcache.core.loads import PATIENCE
from weightcache.core.planner import Planner
from weightcache.core.turns import ORIGIN_READ

BLOB, PEER = bytes(32), b"p" * 16
COUNT = 40
PLAN = plan(COUNT * CHUNK, None)


def added(origin: Reach = Reach.RANGED) -> LoadAdded:
    return LoadAdded(BLOB, PLAN, ChunkSet(COUNT), 2, origin)


def fetches(actions: list[Action]) -> list[Fetch]:
    return [action for action in actions if isinstance(action, Fetch)]


def run(planner: Planner, actions: list[Action], latency: float) -> list[tuple[float, int]]:
    """Deliver every request after ``latency`` seconds, to the end; (when, bytes) of all that was asked for."""
    asked: list[tuple[float, int]] = []
    now, wake, due = 0.0, float("inf"), []
    while True:
        for action in actions:
            match action:
                case Fetch():
                    asked.append((now, sum(PLAN.span(chunk)[1] for chunk in action.chunks)))
                    due += [(now + latency, action.request, chunk) for chunk in action.chunks]
                case Wake(at):
                    wake = at
                case Done():
                    return asked
                case GiveUp():
                    raise AssertionError(action.message)
        due.sort()
        now = min(wake, due[0][0] if due else float("inf"))
        assert now < 1e6, "it sleeps forever"
        if due and due[0][0] <= now:
            _, request, chunk = due.pop(0)
            actions = planner.handle(Got(request, chunk), now)
        else:
            wake = float("inf")
            actions = planner.handle(Tick(), now)


def test_nothing_is_asked_for_while_the_disk_is_behind() -> None:
    planner = Planner(1)
    assert planner.handle(Congested(True), 0.0) == []
    assert not fetches(planner.handle(added(), 1.0))
    later = 1.0 + 10 * PATIENCE
    actions = planner.handle(Tick(), later)
    assert not fetches(actions)
    assert not [action for action in actions if isinstance(action, GiveUp)], "a slow disk is no reason to give up"
    assert fetches(planner.handle(Congested(False), later + 1))


def test_what_was_asked_for_before_still_lands() -> None:
    planner = Planner(1)
    first = fetches(planner.handle(added(), 0.0))[0]
    planner.handle(Congested(True), 0.1)
    for chunk in first.chunks:
        assert not fetches(planner.handle(Got(first.request, chunk), 0.2))
    assert fetches(planner.handle(Congested(False), 0.3))


@pytest.mark.parametrize("via", [Via.ORIGIN, PEER])
def test_a_cap_bounds_what_is_asked_for_over_time(via: Via | bytes) -> None:
    rate = 50e6
    origin = via is Via.ORIGIN
    planner = Planner(1, origin_rate=rate if origin else None, peer_rate=None if origin else rate)
    actions = planner.handle(added(Reach.RANGED if origin else Reach.NONE), 0.0)
    if not origin:
        actions += planner.handle(PeerHas(PEER, BLOB, None), 0.0)
    asked = run(planner, actions, latency=0.01)
    assert sum(size for _, size in asked) == COUNT * CHUNK
    total = 0
    for when, size in asked:
        total += size
        assert total <= rate * (when + 0.1) + 2 * ORIGIN_READ, f"{total} bytes were asked for by {when:.2f} s"
    assert asked[-1][0] >= 0.8 * COUNT * CHUNK / rate, "the cap was not what held it back"


def test_a_cap_on_the_origin_does_not_slow_peers() -> None:
    planner = Planner(1, origin_rate=1.0)
    actions = planner.handle(added(), 0.0) + planner.handle(PeerHas(PEER, BLOB, None), 0.0)
    asked = run(planner, actions, latency=0.01)
    assert asked[-1][0] < 5.0
