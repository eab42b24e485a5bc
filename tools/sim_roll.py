"""Who loads and reads what, kept once for all hosts of a simulated fleet that see the same.

A planner is given such a list instead of one of its own; what it hears changes nothing there, as the fleet has said so
already.
"""

from __future__ import annotations

from collections.abc import Iterable

from weightcache.core.events import Peer
from weightcache.core.neighbours import Crowd
from weightcache.core.reads import Reads


class Said(Reads):
    """What a whole fleet said to read: planners cannot change it."""

    def begin(self, name: Peer, chunks: Iterable[int], now: float) -> None: ...

    def forget(self, chunks: Iterable[int]) -> None: ...

    def give_up(self, before: float) -> None:
        super().forget([chunk for chunk, (_, began) in self._readers.items() if began < before])

    def say(self, name: Peer, chunks: Iterable[int], now: float) -> None:
        super().begin(name, chunks, now)

    def unsay(self, name: Peer) -> None:
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

    def leave(self, name: Peer) -> None:
        self.reads.unsay(name)
        super().quit(name)
