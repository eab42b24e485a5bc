"""Who loads and reads what, kept once for all hosts of a simulated fleet that see the same.

A planner is given such a list instead of one of its own; what it hears changes nothing there, as the fleet has said so
already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from weightcache.core.bits import between
from weightcache.core.events import Peer
from weightcache.core.layout import ChunkPlan
from weightcache.core.neighbours import Crowd
from weightcache.core.reads import Reads
from weightcache.core.turns import parts, readers


class Said(Reads):
    """What a whole fleet said to read: planners cannot change it."""

    def begin(self, name: Peer, chunks: Sequence[int], now: float) -> None: ...

    def quit(self, name: Peer) -> None: ...

    def forget(self, chunks: Iterable[int]) -> None: ...

    def give_up(self, before: float) -> None:
        super().forget([chunk for chunk, (_, began) in self._by_chunk.items() if began < before])

    def say(self, name: Peer, chunks: Sequence[int], now: float) -> None:
        super().begin(name, chunks, now)

    def unsay(self, name: Peer) -> None:
        self.readers.pop(name, None)
        super().forget(self.of(name))


class Roll(Crowd):
    """A crowd that the fleet keeps: planners cannot change it."""

    def __init__(self, blob: bytes) -> None:
        super().__init__(blob)
        self.reads: Said = Said()

    def join(self, name: Peer) -> None: ...

    def quit(self, name: Peer) -> None: ...

    def enter(self, name: Peer) -> None:
        super().join(name)

    def next(self, plan: ChunkPlan) -> Iterator[Peer]:
        """Whose turn it is to read what nobody has begun to: nobody else does anything about it."""
        some = parts(plan)
        most = readers(plan, some)
        if len(self) <= most:
            return
        room = most - len(self.reads.readers)
        for part, chunks in enumerate(some):
            if room <= 0:
                break
            if between(chunks) & ~self.reads.under_way:
                room -= 1
                if (home := self.homes(len(some)).home(part)) is not None:
                    yield home

    def leave(self, name: Peer) -> None:
        self.reads.unsay(name)
        super().quit(name)
