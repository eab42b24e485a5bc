"""Memory that reads of an origin fill, in pieces of a chunk's size which are used again once they have landed.

Fresh memory costs as much as hashing what is put into it; and whoever reads faster than the disk takes it would fill
memory for all its reads. So there are so many pieces, and a read waits for its next one.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from weightcache.core.layout import CHUNK


class Pieces:
    """The pieces of all reads, of which there are ``reads`` at a time."""

    def __init__(self, reads: int) -> None:
        # A read lands what it has when a chunk's size of whole chunks has come, which may touch three pieces. When all
        # hold two and wait, one more is there, so one of them goes on.
        self._left = asyncio.Semaphore(2 * reads + 1)
        self._spare: list[mmap.mmap] = []

    async def take(self) -> mmap.mmap:
        """A piece of CHUNK bytes, once there is one."""
        await self._left.acquire()
        # It counts from its first use on, and is given back when it is dropped: malloc's does neither.
        return self._spare.pop() if self._spare else mmap.mmap(-1, CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def give(self, piece: mmap.mmap, *, again: bool) -> None:
        """Take a piece back; ``again``: it may be used again."""
        if again:
            self._spare.append(piece)
        self._left.release()

    def rest(self) -> None:
        """Free what nobody has."""
        self._spare.clear()


class Rooms:
    """What one read has of them, while the block runs."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._lent: dict[int, tuple[mmap.mmap, int]] = {}  # by identity, with the bytes that have not landed

    async def room(self, size: int) -> memoryview:
        """Memory for the next of ``size`` bytes that are due."""
        piece = await self._pieces.take()
        view = memoryview(piece)[:size]
        self._lent[id(piece)] = piece, len(view)
        return view

    def landed(self, parts: Iterable[memoryview]) -> None:
        """These bytes are needed no longer. Those that lie elsewhere are nobody's business here."""
        for part in parts:
            if (found := self._lent.get(id(part.obj))) is None:
                continue
            piece, left = found[0], found[1] - len(part)
            self._lent[id(piece)] = piece, left
            if not left:
                del self._lent[id(piece)]
                self._pieces.give(piece, again=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for piece, _ in self._lent.values():  # it did not end well: a thread may be writing into it for a moment still
            self._pieces.give(piece, again=False)
        self._lent.clear()
