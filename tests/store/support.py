"""What the tests of the store are made of: bytes with a manifest, and a way to land them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from dataclasses import dataclass

from weightcache.core.ids import CHECK_BYTES, blob_id, chunk_id
from weightcache.core.landing import land
from weightcache.core.layout import ChunkPlan
from weightcache.core.manifest import Manifest
from weightcache.core.snapshot import FileEntry, Snapshot
from weightcache.core.source import parse_source
from weightcache.store import Store

CHUNK = 4096  # real plans have larger ones; the store takes whatever a plan says


@dataclass(frozen=True)
class Content:
    """A file's bytes, and how they are cut."""

    source: str
    data: bytes
    chunk: int = CHUNK

    @property
    def blob(self) -> bytes:
        return blob_id(self.source, f"etag:{len(self.data)}", len(self.data))

    @property
    def plan(self) -> ChunkPlan:
        return ChunkPlan(len(self.data), range(0, len(self.data), self.chunk))

    def bytes_of(self, index: int) -> bytes:
        offset, length = self.plan.span(index)
        return self.data[offset : offset + length]

    def manifest(self, *, known: bool = False) -> Manifest:
        """The manifest, with ids where ``known``, without checks as a peer would not give any."""
        if not known:
            return Manifest(self.blob, self.plan)
        ids = b"".join(chunk_id(self.bytes_of(index)) for index in range(len(self.plan)))
        return Manifest(self.blob, self.plan, ids, bytes(CHECK_BYTES) * len(self.plan))

    def entry(self, path: str) -> FileEntry:
        return FileEntry(path, parse_source(self.source), f"etag:{len(self.data)}", len(self.data))


def content(name: str, size: int, *, seed: object = None, chunk: int = CHUNK) -> Content:
    """A file of ``size`` random bytes, told by ``seed`` (its name if None)."""
    data = random.Random(repr(seed if seed is not None else name)).randbytes(size)
    return Content(f"https://origin.test/{name}", data, chunk)


def fill(store: Store, made: Content, indices: Iterable[int] | None = None) -> bool:
    """Create a blob and land its chunks (or some), as bulk processes and node would. True when that completed it."""
    if store.create(made.manifest(), made.source).state == "complete":
        return False
    fd = store.open_writer(made.blob)
    try:
        wanted = range(len(made.plan)) if indices is None else indices
        landed = [(index, *land(fd, made.plan.span(index)[0], [made.bytes_of(index)], b"")) for index in wanted]
        return store.record(made.blob, landed)
    finally:
        os.close(fd)


def snapshot_of(source: str, files: dict[str, Content], *, folder: str, revision: str, at: float = 1.0) -> Snapshot:
    entries = tuple(made.entry(path) for path, made in files.items())
    return Snapshot(parse_source(source), folder, revision, entries, at)
