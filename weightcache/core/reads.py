"""Who in a swarm said to read which chunks of a blob from the origin, and since when."""

from __future__ import annotations

from collections.abc import Iterable

from weightcache.core.events import Peer


class Reads:
    """``under_way``: the chunks, a bit each."""

    def __init__(self) -> None:
        self.under_way = 0
        self._readers: dict[int, tuple[Peer, float]] = {}  # by chunk

    def begin(self, name: Peer, chunks: Iterable[int], now: float) -> None:
        for chunk in chunks:
            self._readers[chunk] = name, now
            self.under_way |= 1 << chunk

    def forget(self, chunks: Iterable[int]) -> None:
        """Nobody reads these."""
        for chunk in chunks:
            if self._readers.pop(chunk, None) is not None:
                self.under_way &= ~(1 << chunk)

    def give_up(self, before: float) -> None:
        """What was begun before then is read by nobody."""
        self.forget([chunk for chunk, (_, began) in self._readers.items() if began < before])

    def of(self, name: Peer) -> list[int]:
        """What it reads."""
        return [chunk for chunk, (reader, _) in self._readers.items() if reader == name]

    def since(self, name: Peer, chunk: int) -> float | None:
        """When it began to read that; None: it did not."""
        reader, began = self._readers.get(chunk, (None, 0.0))
        return began if reader == name else None
