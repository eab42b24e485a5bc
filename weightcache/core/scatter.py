"""Who takes a chunk first: so that a chunk leaves the host that has it once or twice, and spreads from there.

Theory of operation. In a swarm everyone wants every chunk as soon as one member has it. If all asked that member, its
uplink would be the queue for as long as the swarm is large, and all others' would idle. So a chunk spreads in waves:
while few have it few may ask for it, about one for each that has it; their copies serve the next wave. Nobody asks who
goes first: a host and its neighbours (neighbours.py), of whom alone it hears what they have, are ranked for each chunk
by the order that also picks its home (homes.py), and those of the lowest ranks go first. For the first copy out of a
complete holder, whom everybody knows, all members are ranked, strangers included.

A member that could use more and finds nothing that it may ask for gets eager: step by step it takes part in earlier
waves, until it asks for whatever there is. So no chunk waits for a member that is gone or slow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from weightcache.core.homes import Order, prime_from
from weightcache.core.neighbours import Rings

SHARING = 4  # times as many may ask where each sees but its neighbours: else by chance nobody may, here and there


class Scatter:
    """For one blob; chunks are sets of bits."""

    def __init__(self, me: bytes, blob: bytes, chunks: int, rings: Rings) -> None:
        self._me = me
        self._blob = blob
        self._rings = rings
        self._prime = prime_from(chunks)
        self._places = Order.of(me, blob, self._prime).places(chunks, self._prime)
        self._ranks = [0] * chunks  # of this member among its neighbours, for each chunk
        self._near: tuple[bytes, ...] = ()
        self._below: dict[int, int] = {}  # chunks for which its rank is below so many
        self.idle: float | None = None  # since when it could use more

    @property
    def alone(self) -> bool:
        """Whether nobody else loads the blob."""
        return len(self._rings) <= 1

    def turn(self, wanted: int, levels: list[int], complete: int, eager: int) -> Iterator[int]:
        """Of the ``wanted`` chunks, which somebody has, those that this member may ask for, those of the earliest wave
        first. ``levels``: the chunks that at least 1, 2, 4 ... partial holders have; so many are ``complete``."""
        self._look()
        others = len(self._rings) - 1
        sharing = 1 if others <= len(self._near) else SHARING
        for level in range(-1, len(levels)):
            found = wanted
            if level >= 0:
                found &= levels[level]
            if level + 1 < len(levels):
                found &= ~levels[level + 1]
            limit = (complete + (2 << level if level >= 0 else 0)) * sharing << eager
            if level < 0 and others > len(self._near):
                found &= self._early(limit / (others + 1))
            elif found and limit <= len(self._near):
                found &= self._first(limit)
            if found:
                yield found

    def _first(self, limit: int) -> int:
        found = self._below.get(limit)
        if found is None:
            found = self._below[limit] = _chunks(rank < limit for rank in self._ranks)
        return found

    def _early(self, share: float) -> int:
        """The chunks for which this member is among the first ``share`` of all, strangers included, as far as its own
        place tells."""
        limit = min(int(share * self._prime) + 1, self._prime)
        found = self._below.get(-limit)
        if found is None:
            found = self._below[-limit] = _chunks(place < limit for place in self._places)
        return found

    def _look(self) -> None:
        """Who are the neighbours now?"""
        near = self._rings.near(self._me)
        if near is not self._near:
            before, self._near = self._near, near
            for name in near:
                if name not in before:
                    self._rank(name, 1)
            for name in before:
                if name not in near:
                    self._rank(name, -1)
            self._below.clear()

    def _rank(self, name: bytes, change: int) -> None:
        """A neighbour ahead of this one, for some of the chunks, has come or gone."""
        order, prime, ours = Order.of(name, self._blob, self._prime), self._prime, self._places
        theirs = order.places(len(ours), prime)
        self._ranks = [
            rank + change if their < our else rank for rank, their, our in zip(self._ranks, theirs, ours, strict=True)
        ]


def _chunks(chosen: Iterable[bool]) -> int:
    bits = bytearray()
    for chunk, is_chosen in enumerate(chosen):
        if not chunk & 7:
            bits.append(0)
        bits[-1] |= is_chosen << (chunk & 7)
    return int.from_bytes(bits, "little")
