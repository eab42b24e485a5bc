"""The one way a chunk's bytes reach a blob: hashed, compared, and only then written.

It is here, and not in the store, because bulk processes of every kind end in it: they hold a descriptor, not a store.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
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
    fd: int,
    offset: int,
    pieces: Sequence[Buffer],
    expected: bytes,
    hasher: blake3 | None = None,
    spent: Spent | None = None,
) -> tuple[bytes, bytes]:
    """Hash a chunk, compare it with the chunk id ``expected`` (b"": nobody knows it yet), write it at ``offset``.

    ``pieces``: its bytes, wherever they lie. ``hasher`` has been fed them already, as they came (while they were in the
    CPU's cache). ``spent`` is told what this took.
    Returns (chunk id, xxh3-128). Raises ChunkMismatch before anything is written, OSError when the disk refuses.
    """
    began = perf_counter()
    found = hasher.digest() if hasher is not None else chunk_id(*pieces)
    if expected and found != expected:
        raise ChunkMismatch(f"chunk {expected.hex()[:12]} arrived as {found.hex()[:12]}")
    care = check(*pieces)
    hashed = perf_counter()
    for piece in pieces:
        view = memoryview(piece)
        while view:
            written = os.pwrite(fd, view, offset)
            view = view[written:]
            offset += written
    if spent is not None:
        spent.hashing += hashed - began
        spent.writing += perf_counter() - hashed
    return found, care
