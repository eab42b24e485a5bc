"""The chunk plan: from a file's size and safetensors header to the offsets at which it is cut.

Theory of operation. A safetensors file is an 8-byte little-endian length n, n bytes of JSON, then tensor data. The
plan cuts before every tensor of CUT bytes or more and every CHUNK bytes inside one; smaller tensors ride behind what
precedes them, up to CHUNK; length and JSON are cut off on their own. So a tensor gives the same chunks wherever it lies
in whichever checkpoint. A file whose tensors do not tile it, or that is no safetensors at all, is cut every CHUNK.

The plan depends on nothing but (size, header): every host computes the same one. A change to it is a new PLAN_VERSION.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import sub
from typing import Any

from weightcache.errors import FormatError

CHUNK = 2 << 20  # no chunk is larger
CUT = 1 << 20  # a tensor this large starts a chunk of its own
MAX_HEADER = 100_000_000  # safetensors' own limit on the JSON
MAX_CHUNKS = 1 << 20  # of one blob; bounds what a manifest may claim

# Bits an element takes, by safetensors' dtype name (sub-byte types included).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a header: dtype as safetensors names it, shape, byte range [begin, end) within the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed safetensors header: tensors by offset, ``__metadata__``, and the offset at which tensor data begins."""

    tensors: tuple[Tensor, ...]
    metadata: dict[str, str] | None
    data_start: int

    @property
    def end(self) -> int:
        """The offset just past the last tensor: the size the file must have."""
        return max((tensor.end for tensor in self.tensors), default=self.data_start)


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Where a blob is cut: ``starts`` ascend from 0; chunk i is [starts[i], starts[i + 1]), the last ends at size."""

    size: int
    starts: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts)

    def span(self, index: int) -> tuple[int, int]:
        """Chunk ``index`` as (offset, length)."""
        start = self.starts[index]
        following = index + 1
        return start, (self.starts[following] if following < len(self.starts) else self.size) - start

    def lengths(self, begin: int, end: int) -> Iterator[int]:
        """The lengths of chunks [begin, end)."""
        ends = self.starts[begin + 1 : end + 1]
        return map(sub, [*ends, self.size], self.starts[begin:end])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (self.span(index) for index in range(len(self.starts)))


def head_length(prefix: bytes, size: int) -> int | None:
    """How many bytes from the start hold length and JSON, told by the first 9 bytes; None: this is no safetensors."""
    if len(prefix) < 9:
        return None
    (length,) = struct.unpack_from("<Q", prefix)
    if length < 2 or length > MAX_HEADER or 8 + length > size or prefix[8:9] != b"{":
        return None
    return 8 + int(length)


def parse_header(head: bytes) -> Header:
    """Parse length and JSON of a safetensors file. Raises FormatError in the words safetensors uses."""
    if len(head) < 8:
        raise FormatError("header too small")
    (length,) = struct.unpack_from("<Q", head)
    if length > MAX_HEADER:
        raise FormatError("header too large")
    if 8 + length > len(head):
        raise FormatError("invalid header length")
    try:
        text = head[8 : 8 + length].decode("utf-8")
        fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise FormatError("invalid JSON in header: nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"invalid JSON in header: {error}") from None
    if not isinstance(fields, dict):
        raise FormatError("invalid JSON in header: not an object")
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(_is_text(key) and _is_text(value) for key, value in metadata.items())
    ):
        raise FormatError("invalid JSON in header: __metadata__ is not a map of strings")
    start = 8 + int(length)
    tensors = [_tensor(name, info, start) for name, info in fields.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end, tensor.name))
    return Header(tuple(tensors), metadata, start)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _is_text(value: Any) -> bool:
    """Whether it is a string that can be written as UTF-8: JSON can escape half a surrogate pair."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value))


def _tensor(name: str, info: Any, start: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise FormatError(f"invalid JSON in header: tensor {name!r} lacks dtype, shape or data_offsets") from None
    numbers = (*shape, begin, end) if isinstance(shape, list) else ("",)
    named = _is_text(name) and isinstance(dtype, str)
    if not named or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise FormatError(f"invalid JSON in header: tensor {name!r} has a malformed dtype, shape or data_offsets")
    return Tensor(name, dtype, tuple(shape), start + begin, start + end)


def check_cover(header: Header, size: int) -> None:
    """Raise FormatError, in the words safetensors uses, unless the tensors tile a file of ``size`` bytes exactly.

    What safetensors refuses is refused: gaps, overlaps, truncation, trailing bytes, a range that is not shape x dtype.
    """
    at = header.data_start
    for tensor in header.tensors:
        if tensor.begin != at or tensor.end < tensor.begin:
            raise FormatError(f"invalid offset for tensor `{tensor.name}`")
        bits = DTYPE_BITS.get(tensor.dtype)
        if bits is None:
            raise FormatError(f"invalid JSON in header: unknown variant `{tensor.dtype}`")
        for extent in tensor.shape:
            bits *= extent
            if bits >> 64:  # and so the numbers stay small, however long the shape
                raise FormatError("overflow computing buffer size from shape and/or element type")
        if bits != 8 * (tensor.end - tensor.begin):
            raise FormatError(f"info.data_offsets and shape * dtype do not match for tensor `{tensor.name}`")
        at = tensor.end
    if at != size:
        raise FormatError("incomplete metadata, file not fully covered")


def plan(size: int, header: Header | None) -> ChunkPlan:
    """The chunk plan of a file of ``size`` bytes; ``header`` None: not safetensors. An empty file has no chunks."""
    if header is None or not _tiles(header, size):
        return ChunkPlan(size, range(0, size, CHUNK))
    starts = list(range(0, header.data_start, CHUNK))
    last = header.data_start  # where the chunk that is being filled began
    if header.data_start < size:
        starts.append(last)
    for tensor in header.tensors:
        if tensor.end - tensor.begin >= CUT and tensor.begin > last:
            last = tensor.begin
            starts.append(last)
        while tensor.end - last > CHUNK:
            # A small tensor that no longer fits goes to the next chunk whole; a large one is cut every CHUNK.
            last = tensor.begin if tensor.end - tensor.begin < CUT else last + CHUNK
            starts.append(last)
    return ChunkPlan(size, compact(starts))


def compact(starts: Sequence[int]) -> Sequence[int]:
    """``starts`` in the one form a plan holds them in: a range, which takes no memory, where they are every CHUNK."""
    regular = range(0, len(starts) * CHUNK, CHUNK)
    return regular if all(start == at for start, at in zip(starts, regular, strict=True)) else tuple(starts)


def _tiles(header: Header, size: int) -> bool:
    """Whether the tensors cover [data_start, size) without gap or overlap: all that the plan relies on."""
    at = header.data_start
    for tensor in header.tensors:
        if tensor.begin != at or tensor.end < tensor.begin:
            return False
        at = tensor.end
    return at == size


def plan_from_head(size: int, head: bytes | None) -> ChunkPlan:
    """The chunk plan of a file of which ``head`` (length and JSON; None: not safetensors) has been read."""
    if head is None:
        return plan(size, None)
    try:
        return plan(size, parse_header(head))
    except FormatError:
        return plan(size, None)
