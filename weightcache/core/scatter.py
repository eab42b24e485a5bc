"""Who takes a chunk first: so that a chunk leaves the host that has it once or twice, and spreads from there.

Theory of operation. In a swarm everyone wants every chunk as soon as one member has it. If all asked that member, its
uplink would be the queue for as long as the swarm is large, and all others' would idle. So a chunk spreads in waves:
while few have it few may ask for it, about one for each that has it; their copies serve the next wave. Nobody asks who
goes first: all members are ranked for each chunk by the order that also picks its home (homes.py), and those of the
lowest ranks go first. That holds for the first copy out of a complete holder, too.

A member that could use more and finds nothing that it may ask for gets eager: step by step it takes part in earlier
waves, until it asks for whatever there is. So no chunk waits for a member that is gone or slow.
"""

from __future__ import annotations

from collections.abc import Iterator

from weightcache.core.homes import Order, prime_from


class Scatter:
    """For one blob; chunks are sets of bits."""

    def __init__(self, me: bytes, blob: bytes, chunks: int) -> None:
        self._blob = blob
        self._prime = prime_from(chunks)
        self._places = Order.of(me, blob, self._prime).places(chunks, self._prime)
        self._ranks = [0] * chunks  # of this member, for each chunk
        self._members = 1
        self._below: dict[int, int] = {}  # chunks for which its rank is below so many
        self.idle: float | None = None  # since when it could use more

    def join(self, name: bytes) -> None:
        """One more loads the blob."""
        self._members += 1
        self._rank(name, 1)

    def quit(self, name: bytes) -> None:
        self._members -= 1
        self._rank(name, -1)

    @property
    def alone(self) -> bool:
        """Whether nobody else loads the blob."""
        return self._members == 1

    def turn(self, wanted: int, levels: list[int], complete: int, eager: int) -> Iterator[int]:
        """Of the ``wanted`` chunks, which somebody has, those that this member may ask for, those of the earliest wave
        first. ``levels``: the chunks that at least 1, 2, 4 ... partial holders have; so many are ``complete``."""
        for level in range(-1, len(levels)):
            found = wanted
            if level >= 0:
                found &= levels[level]
            if level + 1 < len(levels):
                found &= ~levels[level + 1]
            limit = (complete + (2 << level if level >= 0 else 0)) << eager
            if found and limit < self._members:
                found &= self._first(limit)
            if found:
                yield found

    def _first(self, limit: int) -> int:
        found = self._below.get(limit)
        if found is None:
            bits = bytearray(len(self._ranks) // 8 + 1)
            for chunk, rank in enumerate(self._ranks):
                if rank < limit:
                    bits[chunk >> 3] |= 1 << (chunk & 7)
            found = self._below[limit] = int.from_bytes(bits, "little")
        return found

    def _rank(self, name: bytes, change: int) -> None:
        """A member ahead of this one has come or gone."""
        places = Order.of(name, self._blob, self._prime).places(len(self._ranks), self._prime)
        for chunk, (theirs, ours) in enumerate(zip(places, self._places, strict=True)):
            if theirs < ours:
                self._ranks[chunk] += change
        self._below.clear()
