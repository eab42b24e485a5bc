"""The chunks of files: of one on this disk, read and hashed here; and what two files share.

A file is described as the daemon describes those of a source: ``{"path", "size", "chunks": [{"offset", "length",
"id"}, ...]}``, and each chunk of a local safetensors file also has "tensors", the names of those that begin in it.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from weightcache.core.ids import chunk_id
from weightcache.core.layout import ChunkPlan, Header, head_length, parse_header, plan_from_head
from weightcache.errors import FormatError, SourceDenied, SourceNotFound

Json = dict[str, Any]


def describe(path: Path) -> Json:
    """A local file's chunks. Raises SourceNotFound, SourceDenied, or FormatError when it is not a file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                return {"path": str(path), "size": 0, "chunks": []}
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
                return {"path": str(path), "size": size, "chunks": _chunks(data)}
    except FileNotFoundError:
        raise SourceNotFound(f"{path}: no such file; a source has a scheme, such as s3://bucket/key") from None
    except IsADirectoryError:
        raise FormatError(f"{path} is a directory; name one of its files") from None
    except PermissionError:
        raise SourceDenied(f"{path}: permission denied") from None
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from None


def _chunks(data: memoryview) -> list[Json]:
    length = head_length(bytes(data[:9]), len(data))
    head = bytes(data[:length]) if length is not None else None
    plan = plan_from_head(len(data), head)

    def hashed(span: tuple[int, int]) -> Json:
        offset, length = span
        with data[offset : offset + length] as chunk:
            return {"offset": offset, "length": length, "id": chunk_id(chunk).hex()}

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter's lock
        chunks = list(pool.map(hashed, plan))
    if (header := _header(head)) is not None:
        for chunk, names in zip(chunks, _tensors(plan, header), strict=True):
            chunk["tensors"] = names
    return chunks


def _header(head: bytes | None) -> Header | None:
    try:
        return parse_header(head) if head is not None else None
    except FormatError:
        return None


def _tensors(plan: ChunkPlan, header: Header) -> list[list[str]]:
    """For each chunk, the tensors that begin in it."""
    names: list[list[str]] = [[] for _ in range(len(plan))]
    for tensor in header.tensors:
        if tensor.begin < plan.size or tensor.begin == tensor.end == plan.size:
            names[bisect_right(plan.starts, tensor.begin) - 1].append(tensor.name)
    return names


def shared(here: Iterable[Json], there: Iterable[Json]) -> Json:
    """How much of ``here`` is in ``there`` too, by chunk id. ``unknown``: chunks of each that nobody has read yet."""
    ours, theirs = _all(here), _all(there)
    ids = {chunk["id"] for chunk in theirs} - {None}
    common = [chunk for chunk in ours if chunk["id"] in ids]
    return {
        "chunks": len(common),
        "bytes": sum(chunk["length"] for chunk in common),
        "of_chunks": len(ours),
        "of_bytes": sum(chunk["length"] for chunk in ours),
        "unknown": [sum(chunk["id"] is None for chunk in side) for side in (ours, theirs)],
    }


def _all(files: Iterable[Json]) -> Sequence[Json]:
    return [chunk for file in files for chunk in file["chunks"]]
