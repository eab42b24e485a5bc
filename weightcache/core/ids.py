"""Names: chunk ids, blob ids, and the two hashes they are made with.

BLAKE3 is identity: whoever could forge it could plant bytes. xxh3-128 is care: it finds accidents on bytes that this
host hashed itself before.
"""

from __future__ import annotations

from mmap import mmap

from blake3 import blake3
from xxhash import xxh3_128

ID_BYTES = 32
CHECK_BYTES = 16
PLAN_VERSION = 2  # part of every blob id: two plans of one object never meet in one swarm
NO_ID = bytes(ID_BYTES)  # in tables: the id is not known yet

Buffer = bytes | bytearray | memoryview | mmap


def chunk_id(*pieces: Buffer) -> bytes:
    """BLAKE3-256 of a chunk's bytes, in one piece or several: its name everywhere (32 bytes)."""
    state = blake3()
    for piece in pieces:
        state.update(piece)
    return state.digest()


def check(*pieces: Buffer) -> bytes:
    """xxh3-128 of a chunk's bytes (16 bytes): for re-reading what this host has hashed before."""
    state = xxh3_128()
    for piece in pieces:
        state.update(piece)
    return state.digest()


def blob_id(source: str, version: str, size: int) -> bytes:
    """The name of one file's bytes before anyone has read them (32 bytes): who resolves the same file gets the same.

    A version that is a digest of the content ("sha256:…") names the bytes wherever they lie: the source is left out.
    """
    place = "" if version.startswith("sha256:") else source
    fields = f"{PLAN_VERSION}\0{size}\0{version}\0{place}"
    return blake3(fields.encode(), derive_key_context="weightcache 2026 blob id").digest()


def content_id(ids: bytes, lengths: bytes) -> bytes:
    """The name of a blob's content once all chunk ids are known (32 bytes): equal for identical files of any source."""
    return blake3(lengths + ids, derive_key_context="weightcache 2026 content id").digest()


def short(name: bytes) -> str:
    """The first 12 hex digits: for logs and tables."""
    return name.hex()[:12]
