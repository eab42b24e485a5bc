"""Who in a swarm said to read which chunks of a blob from the origin, and since when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weightcache.core.events import Peer


class Reads:
    """``under_way``: the chunks, a bit each; ``readers``: who has said so, and not yet that nothing is left."""

    def __init__(self) -> None:
        self.under_way = 0
        self.readers: dict[Peer, None] = {}
        self._by_chunk: dict[int, tuple[Peer, float]] = {}  # by chunk

    def begin(self, name: Peer, chunks: Sequence[int], now: float) -> None:
        """None: what it read has come, or will not."""
        self.readers.pop(name, None)
        if chunks:
            self.readers[name] = None
        for chunk in chunks:
            self._by_chunk[chunk] = name, now
            self.under_way |= 1 << chunk

    def forget(self, chunks: Iterable[int]) -> None:
        """Nobody reads these."""
        for chunk in chunks:
            if self._by_chunk.pop(chunk, None) is not None:
                self.under_way &= ~(1 << chunk)

    def give_up(self, before: float) -> None:
        """What was begun before then is read by nobody."""
        late = [(chunk, reader) for chunk, (reader, began) in self._by_chunk.items() if began < before]
        self.forget(chunk for chunk, _ in late)
        for _, reader in late:
            self.readers.pop(reader, None)

    def quit(self, name: Peer) -> None:
        """It reads nothing any more, whatever has come of it."""
        self.readers.pop(name, None)
        self.forget(self.of(name))

    def of(self, name: Peer) -> list[int]:
        """What it reads."""
        return [chunk for chunk, (reader, _) in self._by_chunk.items() if reader == name]

    def since(self, name: Peer, chunk: int) -> float | None:
        """When it began to read that; None: it did not."""
        reader, began = self._by_chunk.get(chunk, (None, 0.0))
        return began if reader == name else None
