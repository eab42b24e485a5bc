"""A manifest: one blob's version, size, chunk plan, and what is known of each chunk.

It starts with the plan alone and completes itself as chunks arrive. The tables are flat byte strings (32 bytes of id,
16 of check a chunk), so a manifest of 100,000 chunks is two buffers and not 200,000 objects.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable

import msgpack

from weightcache.core.ids import CHECK_BYTES, ID_BYTES, NO_ID, PLAN_VERSION, content_id
from weightcache.core.layout import CHUNK, MAX_CHUNKS, ChunkPlan, compact
from weightcache.errors import FormatError

_FORMAT = 1
MAX_MANIFEST_BYTES = MAX_CHUNKS * (ID_BYTES + CHECK_BYTES + 4) + 65536


class Manifest:
    """The chunks of one blob: ``plan`` says where, ``id(i)`` what (None: nobody has read it yet).

    ``checked``: the whole has been compared with what the origin states of it; until then it is only claimed.
    """

    __slots__ = ("blob", "checked", "checks", "ids", "plan")

    def __init__(
        self, blob: bytes, plan: ChunkPlan, ids: bytes | None = None, checks: bytes | None = None, checked: bool = False
    ) -> None:
        self.blob = blob
        self.plan = plan
        self.ids = bytearray(ids if ids is not None else NO_ID * len(plan))
        self.checks = bytearray(checks if checks is not None else bytes(CHECK_BYTES) * len(plan))
        self.checked = checked

    @property
    def size(self) -> int:
        return self.plan.size

    def __len__(self) -> int:
        return len(self.plan)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and encode_manifest(self) == encode_manifest(other)

    __hash__ = None  # type: ignore[assignment]

    def id(self, index: int) -> bytes | None:
        """The chunk id (32 bytes), or None while it is unknown."""
        found = bytes(self.ids[index * ID_BYTES : (index + 1) * ID_BYTES])
        return None if found == NO_ID else found

    def check(self, index: int) -> bytes:
        """xxh3-128 of the chunk as this host hashed it (16 bytes; zeros while unknown)."""
        return bytes(self.checks[index * CHECK_BYTES : (index + 1) * CHECK_BYTES])

    def learn(self, index: int, chunk: bytes, check: bytes | None = None) -> None:
        """Set what a chunk's bytes hash to."""
        self.ids[index * ID_BYTES : (index + 1) * ID_BYTES] = chunk
        if check is not None:
            self.checks[index * CHECK_BYTES : (index + 1) * CHECK_BYTES] = check

    def forget(self, indices: Iterable[int]) -> None:
        """Make chunks unknown again: their ids turned out to be somebody's lie or accident."""
        for index in indices:
            self.learn(index, NO_ID, bytes(CHECK_BYTES))

    @property
    def complete(self) -> bool:
        """Whether every chunk's id is known."""
        return all(self.id(index) is not None for index in range(len(self)))

    def content(self) -> bytes:
        """The name of the content (32 bytes), equal for identical files of any source. Only when complete."""
        return content_id(bytes(self.ids), _lengths(self.plan))

    def shared(self, other: Manifest) -> int:
        """Bytes of this blob whose chunk ids occur in ``other``."""
        theirs = {other.id(index) for index in range(len(other))} - {None}
        return sum(length for index, (_, length) in enumerate(self.plan) if self.id(index) in theirs)


def _lengths(plan: ChunkPlan) -> bytes:
    lengths = array("I", (length for _, length in plan))
    if sys.byteorder == "big":
        lengths.byteswap()
    return lengths.tobytes()


def encode_plan(plan: ChunkPlan) -> bytes:
    """A plan as size and little-endian 32-bit chunk lengths. The inverse of ``decode_plan``."""
    return struct.pack("<Q", plan.size) + _lengths(plan)


def decode_plan(data: bytes) -> ChunkPlan:
    """Decode what ``encode_plan`` made; lengths that do not add up, or exceed CHUNK, raise FormatError."""
    if len(data) < 8 or len(data) % 4:
        raise FormatError("chunk plan of a wrong length")
    (size,) = struct.unpack_from("<Q", data)
    lengths = array("I", data[8:])
    if sys.byteorder == "big":
        lengths.byteswap()
    if len(lengths) > MAX_CHUNKS:
        raise FormatError(f"chunk plan of {len(lengths)} chunks: at most {MAX_CHUNKS} are accepted")
    starts = []
    at = 0
    for length in lengths:
        if not 0 < length <= CHUNK:
            raise FormatError(f"chunk of {length} bytes: 1 to {CHUNK} are allowed")
        starts.append(at)
        at += length
    if at != size:
        raise FormatError(f"chunks of {at} bytes in a blob of {size}")
    return ChunkPlan(size, compact(starts))


def encode_manifest(manifest: Manifest) -> bytes:
    """A manifest as msgpack. The inverse of ``decode_manifest``."""
    fields = [_FORMAT, PLAN_VERSION, manifest.blob, encode_plan(manifest.plan)]
    return bytes(msgpack.packb([*fields, bytes(manifest.ids), bytes(manifest.checks), manifest.checked]))


def decode_manifest(data: bytes) -> Manifest:
    """Decode what ``encode_manifest`` made; anything else raises FormatError. Every length is checked."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise FormatError(f"manifest of {len(data)} bytes: at most {MAX_MANIFEST_BYTES} are accepted")
    try:
        form, plan_version, blob, plan, ids, checks, checked = msgpack.unpackb(data, max_array_len=16)
    except Exception as error:  # noqa: BLE001 - whatever hostile bytes make a decoder raise
        raise FormatError(f"not a manifest: {type(error).__name__}: {error}") from None
    if form != _FORMAT or plan_version != PLAN_VERSION:
        raise FormatError(f"manifest of format {form!r}, plan {plan_version!r}: this reads {_FORMAT}, {PLAN_VERSION}")
    if not all(isinstance(part, bytes) for part in (blob, plan, ids, checks)) or len(blob) != ID_BYTES:
        raise FormatError("manifest with a field of a wrong type")
    cut = decode_plan(plan)
    if len(ids) != ID_BYTES * len(cut) or len(checks) != CHECK_BYTES * len(cut):
        raise FormatError("manifest whose tables do not fit its plan")
    return Manifest(blob, cut, ids, checks, checked is True)
