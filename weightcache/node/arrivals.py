"""What a read of several chunks has brought so far, and what of it should land now.

Other hosts wait for each chunk, and a read that is broken off keeps what has landed: so whole chunks land while the
rest is on its way. Each landing costs the node a turn, a commit and news to everyone: so small chunks wait for others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from weightcache.core.layout import CHUNK

Chunk = tuple[int, int, int, bytes]  # index, offset, length, expected id or b""
Whole = list[tuple[Chunk, list[memoryview]]]  # chunks, each with its bytes in some pieces
TOGETHER, TOGETHER_SECONDS = CHUNK, 0.05  # whole chunks land that are so many bytes, or so much later than the last


class Arrivals:
    """Of ``chunks`` that lie one behind the other, asked for at ``now`` (seconds of any clock)."""

    def __init__(self, chunks: Iterable[Chunk], now: float) -> None:
        self._chunks = deque(chunks)
        self._pieces: deque[memoryview] = deque()
        self._came = 0  # bytes, of which
        self._whole = 0  # are in whole chunks, of which there are
        self._count = 0
        self._landed = now

    def add(self, piece: memoryview, now: float) -> Whole:
        """Take the next bytes. Returns the chunks that should land now: at the end, all that are left."""
        self._pieces.append(piece)
        self._came += len(piece)
        while self._count < len(self._chunks) and self._whole + self._chunks[self._count][2] <= self._came:
            self._whole += self._chunks[self._count][2]
            self._count += 1
        ended = self._count == len(self._chunks)
        if not self._count or not (ended or self._whole >= TOGETHER or now > self._landed + TOGETHER_SECONDS):
            return []
        self._landed, count, self._count, self._whole = now, self._count, 0, 0
        return [(chunk := self._chunks.popleft(), self._cut(chunk[2])) for _ in range(count)]

    def _cut(self, length: int) -> list[memoryview]:
        self._came -= length
        found = []
        while length:
            piece = self._pieces.popleft()
            found.append(piece[:length])
            if len(piece) > length:
                self._pieces.appendleft(piece[length:])
            length -= len(found[-1])
        return found
