"""A set of chunk indices of one blob, as bits: compact, and cheap to send."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from weightcache.errors import FormatError


class ChunkSet:
    """Which of ``size`` chunks: members are 0 .. size - 1."""

    __slots__ = ("bits", "size")

    def __init__(self, size: int, indices: Iterable[int] = (), *, full: bool = False) -> None:
        self.size = size
        self.bits = bytearray((size + 7) // 8)
        if full:
            self.bits[:] = b"\xff" * len(self.bits)
            if size % 8:
                self.bits[-1] = (1 << size % 8) - 1
        for index in indices:
            self.add(index)

    def __contains__(self, index: int) -> bool:
        return 0 <= index < self.size and bool(self.bits[index >> 3] & 1 << (index & 7))

    def __len__(self) -> int:
        return int.from_bytes(self.bits, "little").bit_count()

    def __iter__(self) -> Iterator[int]:
        for position, byte in enumerate(self.bits):
            while byte:
                lowest = byte & -byte
                yield position * 8 + lowest.bit_length() - 1
                byte ^= lowest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChunkSet) and self.size == other.size and self.bits == other.bits

    __hash__ = None  # type: ignore[assignment]

    def add(self, index: int) -> None:
        if not 0 <= index < self.size:
            raise IndexError(f"chunk {index} of {self.size}")
        self.bits[index >> 3] |= 1 << (index & 7)

    def discard(self, index: int) -> None:
        if 0 <= index < self.size:
            self.bits[index >> 3] &= ~(1 << (index & 7))

    def missing(self) -> Iterator[int]:
        """The indices that are not members, ascending."""
        return (index for index in range(self.size) if not self.bits[index >> 3] & 1 << (index & 7))

    @property
    def is_full(self) -> bool:
        return len(self) == self.size

    def copy(self) -> ChunkSet:
        return ChunkSet.decode(bytes(self.bits), self.size)

    def encode(self) -> bytes:
        return bytes(self.bits)

    @classmethod
    def decode(cls, data: bytes, size: int) -> ChunkSet:
        """The set of ``size`` chunks that ``encode`` gave; a wrong length or stray bits raise FormatError."""
        if len(data) != (size + 7) // 8 or (size % 8 and data and data[-1] >> size % 8):
            raise FormatError(f"chunk set of {len(data)} bytes for {size} chunks")
        found = cls(size)
        found.bits[:] = data
        return found
