"""A sudden loss is not believed at once; everything else is."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcache.directory.base import Changed, Member, View
from weightcache.directory.steady import MANY, SteadyDirectory, SteadyView

HOLD = 10.0


def members(*numbers: int) -> View:
    return frozenset(Member("host", number) for number in numbers)


def test_most_of_many_vanishing_at_once_are_kept_for_the_hold() -> None:
    view = SteadyView(HOLD)
    everyone = members(*range(8))
    view.update(everyone, 0.0)
    assert view.update(members(0, 1), 100.0) == everyone
    assert view.due == 110.0
    assert view.look(109.9) == everyone
    assert view.look(110.0) == members(0, 1)


def test_a_loss_that_comes_one_by_one_is_the_same_loss() -> None:
    view = SteadyView(HOLD)
    view.update(members(*range(8)), 0.0)
    for gone in range(1, 8):
        view.update(members(*range(gone, 8)), 1.0 + gone / 100)
    assert view.view == members(4, 5, 6, 7)  # half were believed gone, and do not come back
    assert view.look(1.0 + HOLD + 1) == members(7)


@pytest.mark.parametrize(("before", "after"), [(8, 4), (3, 0), (1, 0), (MANY, MANY // 2)])
def test_smaller_losses_and_smaller_views_are_believed_at_once(before: int, after: int) -> None:
    view = SteadyView(HOLD)
    view.update(members(*range(before)), 0.0)
    assert view.update(members(*range(after)), 1.0) == members(*range(after))


def test_newcomers_are_believed_during_a_hold_and_a_recovery_ends_it() -> None:
    view = SteadyView(HOLD)
    everyone = members(*range(6))
    view.update(everyone, 0.0)
    assert view.update(members(9), 1.0) == everyone | members(9)
    assert view.update(everyone, 2.0) == everyone
    assert view.due is None


def test_a_fleet_that_is_replaced_is_believed_at_once() -> None:
    view = SteadyView(HOLD)
    view.update(members(*range(8)), 0.0)
    assert view.update(members(*range(100, 108)), 1.0) == members(*range(100, 108))


@given(st.lists(st.tuples(st.floats(0, 15), st.frozensets(st.integers(0, 9))), max_size=30))
def test_everyone_seen_is_in_the_view_and_nobody_stays_longer_than_the_hold(
    steps: list[tuple[float, frozenset[int]]],
) -> None:
    view = SteadyView(HOLD)
    now, last_seen = 0.0, dict.fromkeys(members(*range(10)), float("-inf"))
    seen: View = frozenset()
    for wait, numbers in steps:
        now += wait
        last_seen |= dict.fromkeys(seen, now)
        seen = members(*numbers)
        last_seen |= dict.fromkeys(seen, now)
        believed = view.update(seen, now)
        assert seen <= believed
        assert all(now - last_seen[member] < HOLD for member in believed - seen)
    while view.due is not None:
        view.look(view.due)
    assert view.view == seen


class Scripted:
    """A directory whose view the test sets."""

    def __init__(self) -> None:
        self.now: View = frozenset()
        self.tell: Changed = lambda view: None

    async def start(self, me: Member, changed: Changed) -> None:
        self.tell = changed

    async def close(self) -> None:
        pass

    def view(self) -> View:
        return self.now


async def test_the_directory_tells_of_the_loss_when_the_hold_is_over() -> None:
    inner, told = Scripted(), asyncio.Queue[View]()
    steady = SteadyDirectory(inner, hold=0.2)
    await steady.start(Member("me", 1), told.put_nowait)
    inner.tell(members(1, 2, 3, 4))
    assert await told.get() == members(1, 2, 3, 4)
    started = asyncio.get_running_loop().time()
    inner.tell(frozenset())
    assert steady.view() == members(1, 2, 3, 4)
    assert await asyncio.wait_for(told.get(), 5) == frozenset()
    assert asyncio.get_running_loop().time() - started >= 0.19
    inner.tell(members(1, 2, 3, 4))
    inner.tell(frozenset())
    await steady.close()
    assert told.qsize() == 1  # the four; after close nothing is told
