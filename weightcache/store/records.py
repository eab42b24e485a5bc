"""The rows of the index: what a blob's record and its chunk tables look like as bytes.

A blob has one record and, for every SEGMENT chunks, one segment: had bits, lengths, ids and checks of those chunks. A
chunk that lands rewrites one segment and nothing else. Every row carries a checksum over its key and value: a page that
a crash tore or an accident changed shows itself when it is read.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress
from typing import Any

import msgpack
from xxhash import xxh3_64_digest

from weightcache.core.bitmap import ChunkSet
from weightcache.core.ids import CHECK_BYTES, ID_BYTES
from weightcache.core.manifest import Manifest, decode_plan
from weightcache.errors import FormatError

SEGMENT = 32  # chunks: two segments fill an LMDB page of 4096 bytes
SEAL_BYTES = 8
_HAD_BYTES = SEGMENT // 8
_CHUNK_BYTES = 4 + ID_BYTES + CHECK_BYTES


def seal(key: bytes, value: bytes) -> bytes:
    """``value`` as a row of ``key``: with the checksum in front."""
    return xxh3_64_digest(key + value) + value


def unseal(key: bytes, row: bytes) -> bytes:
    """The value that ``seal`` put into a row. Raises FormatError when key or value is not what it was."""
    value = row[SEAL_BYTES:]
    if xxh3_64_digest(key + value) != row[:SEAL_BYTES]:
        raise FormatError(f"damaged row {key[:16].hex()}")
    return value


@dataclass(slots=True)
class BlobRecord:
    """What is kept of a blob besides its chunks.

    ``serial`` names its segments; ``boot`` is the kernel boot under which its bytes were last known to be good;
    ``durable`` the mtime (ns) of its file when the disk had all of it (0: not yet), which any later write changes;
    ``content`` names its bytes once it is complete and settled (b"": not yet). ``private``: it is not for peers.
    """

    serial: int
    size: int
    chunks: int
    name: str
    boot: str
    last_used: float
    pinned: bool = False
    checked: bool = False
    durable: int = 0
    content: bytes = b""
    private: bool = False

    def encode(self) -> bytes:
        fields = [self.serial, self.size, self.chunks, self.name, self.boot, self.last_used]
        return bytes(msgpack.packb([*fields, self.pinned, self.checked, self.durable, self.content, self.private]))

    @classmethod
    def decode(cls, data: bytes) -> BlobRecord:
        """Decode what ``encode`` made; anything else raises FormatError."""
        try:
            return cls(*msgpack.unpackb(data))
        except Exception as error:  # noqa: BLE001 - whatever damaged bytes make a decoder raise
            raise FormatError(f"not a blob record: {type(error).__name__}: {error}") from None


@dataclass(slots=True)
class Tables:
    """A blob's chunks: the manifest, and which of them are had."""

    manifest: Manifest
    had: ChunkSet

    def segment(self, number: int) -> bytes:
        """Segment ``number`` of these tables."""
        begin, end = number * SEGMENT, min((number + 1) * SEGMENT, len(self.manifest))
        had = self.had.bits[number * _HAD_BYTES : (number + 1) * _HAD_BYTES].ljust(_HAD_BYTES, b"\0")
        lengths = _little(array("I", self.manifest.plan.lengths(begin, end)))
        ids = self.manifest.ids[begin * ID_BYTES : end * ID_BYTES]
        return b"".join((had, lengths, ids, self.manifest.checks[begin * CHECK_BYTES : end * CHECK_BYTES]))

    def segments(self) -> Iterable[bytes]:
        return (self.segment(number) for number in range(segments_of(len(self.manifest))))

    @classmethod
    def decode(cls, blob: bytes, size: int, checked: bool, segments: Iterable[bytes]) -> Tables:
        """The tables that these segments, in order, are of. Raises FormatError when they do not fit together."""
        had, lengths, ids, checks = bytearray(), bytearray(), bytearray(), bytearray()
        for segment in segments:
            count = chunks_in(segment)
            at_ids = _HAD_BYTES + 4 * count
            at_checks = at_ids + ID_BYTES * count
            had += segment[:_HAD_BYTES]
            lengths += segment[_HAD_BYTES:at_ids]
            ids += segment[at_ids:at_checks]
            checks += segment[at_checks:]
        plan = decode_plan(struct.pack("<Q", size) + lengths)
        bits = bytes(had[: (len(plan) + 7) // 8])
        return cls(Manifest(blob, plan, bytes(ids), bytes(checks), checked), ChunkSet.decode(bits, len(plan)))


def segments_of(chunks: int) -> int:
    """How many segments a blob of so many chunks has."""
    return -(-chunks // SEGMENT)


def chunks_in(segment: bytes) -> int:
    """How many chunks a segment is of. Raises FormatError on a length that no segment has."""
    count, rest = divmod(len(segment) - _HAD_BYTES, _CHUNK_BYTES)
    if rest or not 0 < count <= SEGMENT:
        raise FormatError(f"segment of {len(segment)} bytes")
    return count


def summary(segment: bytes) -> tuple[int, int, int]:
    """(chunks, bytes, bytes had) of one segment, without decoding the rest of it."""
    count = chunks_in(segment)
    lengths = _little(array("I", segment[_HAD_BYTES : _HAD_BYTES + 4 * count]))
    total = sum(lengths)
    bits = int.from_bytes(segment[:_HAD_BYTES], "little")
    if bits == (1 << count) - 1:
        return count, total, total
    return count, total, sum(compress(lengths, (bits >> index & 1 for index in range(count))))


def had_ids(segment: bytes) -> Iterable[tuple[int, bytes]]:
    """(position within the segment, chunk id) of the chunks a segment says are had."""
    count = chunks_in(segment)
    bits = int.from_bytes(segment[:_HAD_BYTES], "little")
    start = _HAD_BYTES + 4 * count
    for position in range(count):
        if bits >> position & 1:
            yield position, segment[start + position * ID_BYTES : start + (position + 1) * ID_BYTES]


def _little(numbers: array[Any]) -> array[Any]:
    """``numbers`` as they are stored, or back."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
