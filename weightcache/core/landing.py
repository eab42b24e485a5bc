"""The one way a chunk's bytes reach a blob: hashed, compared, and only then written.

It is here, and not in the store, because bulk processes of every kind end in it: they hold a descriptor, not a store.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from time import perf_counter

from blake3 import blake3

from weightcache.core.ids import Buffer, check, chunk_id
from weightcache.errors import WeightcacheError


class ChunkMismatch(WeightcacheError):
    """The bytes are not what their id says: whoever sent them is wrong."""


@dataclass(slots=True)
class Spent:
    """Seconds that a chunk took on its way to the disk."""

    hashing: float = 0.0
    writing: float = 0.0


def land(
    fd: int, offset: int, data: Buffer, expected: bytes, hasher: blake3 | None = None, spent: Spent | None = None
) -> tuple[bytes, bytes]:
    """Hash ``data``, compare it with the chunk id ``expected`` (b"": nobody knows it yet), write it at ``offset``.

    ``hasher``: has been fed exactly ``data`` already, piece by piece as it came (while it was in the CPU's cache).
    ``spent`` is told what this took.
    Returns (chunk id, xxh3-128). Raises ChunkMismatch before anything is written, OSError when the disk refuses.
    """
    began = perf_counter()
    found = hasher.digest() if hasher is not None else chunk_id(data)
    if expected and found != expected:
        raise ChunkMismatch(f"chunk {expected.hex()[:12]} arrived as {found.hex()[:12]}")
    care = check(data)
    hashed = perf_counter()
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
    if spent is not None:
        spent.hashing += hashed - began
        spent.writing += perf_counter() - hashed
    return found, care
