"""Spans of time: what overlaps is one, what lies before the load is cut off, and there are never too many."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from weightcache.node.spans import GAP, MAX_SPANS, Spans, joined


def spans(*pairs: tuple[float, float]) -> Spans:
    made = Spans()
    for begin, end in pairs:
        made.add(begin, end)
    return made


def test_what_overlaps_or_nearly_touches_is_one() -> None:
    assert spans((1, 2), (1.5, 3), (3 + GAP / 2, 4), (5, 6)).spans == [(1, 4), (5, 6)]


def test_a_long_one_swallows_all_that_it_covers() -> None:
    assert spans((1, 2), (3, 4), (5, 6), (0, 7)).spans == [(0, 7)]


def test_files_together_since_the_load_began() -> None:
    assert joined([spans((1, 3), (8, 9)), spans((2, 5))], since=2) == [(0, 3), (6, 7)]


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1)), max_size=400))
def test_they_stay_ascending_apart_and_few(draws: list[tuple[float, float]]) -> None:
    pairs = sorted(((at, at + length) for at, length in draws), key=lambda pair: pair[1])
    found = spans(*pairs).spans
    assert len(found) <= MAX_SPANS
    assert all(before[1] + GAP < after[0] for before, after in itertools.pairwise(found))
    assert all(any(begin <= one[0] and one[1] <= end for begin, end in found) for one in pairs)
