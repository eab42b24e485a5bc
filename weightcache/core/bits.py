"""Sets of small numbers as integers, a bit each: union, intersection and "is there any" cost one operation."""

from __future__ import annotations

import random
from collections.abc import Iterator


def members(mask: int) -> Iterator[int]:
    """The members of ``mask``, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def members_from_anywhere(mask: int, draw: random.Random) -> Iterator[int]:
    """The members of ``mask``, ascending from a random place and round."""
    start = int(draw.random() * mask.bit_length())
    for member in members(mask >> start):
        yield start + member
    yield from members(mask & ((1 << start) - 1))


def between(numbers: range) -> int:
    """The set of some numbers that follow one another."""
    return (1 << len(numbers)) - 1 << numbers.start
