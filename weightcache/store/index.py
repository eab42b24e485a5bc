"""What the store knows, in LMDB: it survives a SIGKILL whole, and a crash of the system well enough.

Theory of operation. Commits are not synced: a commit is in the page cache when it returns (some 10 us), so the death of
the process loses nothing. A crash of the system may leave pages of different ages, and LMDB walks such pages into
segmentation faults. So the file is verified at every open before LMDB sees it (about 1 us a chunk), and then every row
is read, for rows carry checksums of their own (see records). An index that fails is moved aside, and the store starts
empty: it is a cache. One that merely lost the last seconds is sound; what its blobs hold is then asked of their bytes,
since nothing that was not durable is believed under another boot id (see catalog).

Databases: ``meta``; ``blobs`` (blob id -> record); ``segments`` (serial, number -> chunk tables); ``places`` (chunk id
-> serial, index; several for one id); ``links`` (blob id, digest -> path below hub/); ``snapshots`` (source, revision).
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import lmdb
import lmdb.verify
from blake3 import blake3
from xxhash import xxh3_64_digest

from weightcache.core.ids import ID_BYTES, PLAN_VERSION
from weightcache.core.snapshot import Snapshot, decode_snapshot, encode_snapshot
from weightcache.core.source import Source
from weightcache.errors import FormatError, StoreError
from weightcache.store.records import SEGMENT, BlobRecord, Tables, had_ids, seal, segments_of, summary, unseal

log = logging.getLogger(__name__)
_verify: Callable[[str], list[str]] = lmdb.verify.verify

FORMAT = b"1"
MAP_BYTES = 4 << 30  # address space only; about 150 bytes a chunk, so some 200 TB of blobs
SWEEP = 64  # segments that one transaction of a sweep removes: a millisecond or two


class _Damaged(Exception):
    """The index on disk is not one that can be trusted; the message says why."""


@dataclass(slots=True)
class Loaded:
    """One blob as the index has it at open."""

    record: BlobRecord
    had_bytes: int


class Index:
    """The index of one store. Thread-safe; every method is one short transaction."""

    def __init__(self, path: Path, env: lmdb.Environment) -> None:
        self.path = path
        self.blobs: dict[bytes, Loaded] = {}  # as read at open
        self.restarted = False  # an older index was damaged, or of another plan: what else is on disk belongs to nobody
        self._env = env
        self._lock = threading.Lock()  # LMDB's own locking is off: one process, and this
        self._meta, self._blobs, self._segments, self._links, self._snapshots = (
            env.open_db(name) for name in (b"meta", b"blobs", b"segments", b"links", b"snapshots")
        )
        self._places = env.open_db(b"places", dupsort=True, dupfixed=True)

    @classmethod
    def open(cls, path: Path) -> Index:
        """Open the index in directory ``path``, or make one. A damaged one is moved aside, with a warning.

        Raises StoreError when a version of another format wrote it, OSError when the directory cannot be used.
        """
        try:
            return cls._open(path)
        except _Damaged as damage:
            names = (path.with_name(f"index.corrupt-{number}") for number in count(1))
            aside = next(name for name in names if not name.exists())
            path.rename(aside)
            log.warning("%s is damaged (%s): moved to %s, and the cache starts empty", path, damage, aside.name)
            index = cls._open(path)
            index.restarted = True
            return index

    @classmethod
    def _open(cls, path: Path) -> Index:
        path.mkdir(mode=0o700, exist_ok=True)
        try:
            faults = _verify(str(path)) if (path / "data.mdb").exists() else []
        except lmdb.verify.VerifyError as error:
            faults = [str(error)]
        if faults:
            raise _Damaged(faults[0])
        with contextlib.ExitStack() as undo:
            try:
                env = lmdb.open(str(path), map_size=MAP_BYTES, max_dbs=8, sync=False, metasync=False, lock=False)
                undo.callback(env.close)
                index = cls(path, env)
                index._load()
            except lmdb.Error as error:  # the file is sound: it is memory, descriptors or disk space that lacks
                raise StoreError(f"{path}: cannot be opened ({error}); free memory or disk space") from None
            except FormatError as error:
                raise _Damaged(str(error)) from None
            undo.pop_all()
        return index

    def _load(self) -> None:
        """Read and check every record; make what a new index needs."""
        with self._env.begin(write=True) as txn:
            found = txn.get(b"format", db=self._meta)
            if found is None:
                txn.put(b"format", FORMAT, db=self._meta)
                txn.put(b"plan", str(PLAN_VERSION).encode(), db=self._meta)
                txn.put(b"node", os.urandom(16), db=self._meta)
            elif found != FORMAT:
                raise StoreError(
                    f"{self.path.parent}: the store has format {found.decode(errors='replace')}, this version uses "
                    f"{FORMAT.decode()}; use the matching version or another directory"
                )
            node = txn.get(b"node", db=self._meta)
            if node is None or len(node) != 16:
                raise FormatError("no node id")
            self.node_id: bytes = node
            self._drop_other_plans(txn)
            owners: dict[int, Loaded] = {}
            for key, row in txn.cursor(self._blobs):
                record = BlobRecord.decode(unseal(key, row))
                if len(key) != ID_BYTES or record.serial in owners:
                    raise FormatError(f"blob {key[:16].hex()} is malformed")
                self.blobs[key] = owners[record.serial] = Loaded(record, 0)
            for rows in (self._snapshots, self._links):
                for key, row in txn.cursor(rows):
                    unseal(key, row)
            self._serial = max(owners, default=0)
            orphans = self._load_segments(txn, owners)
        for serial in orphans:  # of blobs that were being removed when the process died
            while self.sweep(serial):
                pass

    def _drop_other_plans(self, txn: Any) -> None:
        """Forget blobs that are cut as another version cuts: nobody asks for their ids any more."""
        ours = str(PLAN_VERSION).encode()
        theirs = txn.get(b"plan", db=self._meta, default=b"1")  # the first version did not say
        if theirs != ours:
            if blobs := txn.stat(self._blobs)["entries"]:
                plans = f"chunk plan {theirs.decode(errors='replace')}, this version uses {PLAN_VERSION}"
                log.warning("%s: %d blobs have %s: they go, and come again when asked for", self.path, blobs, plans)
            for rows in (self._blobs, self._links, self._places):
                txn.drop(rows, delete=False)
            self.restarted = True
            txn.put(b"plan", ours, db=self._meta)

    def _load_segments(self, txn: Any, owners: dict[int, Loaded]) -> set[int]:
        totals = dict.fromkeys(owners, (0, 0))
        orphans = set()
        for key, row in txn.cursor(self._segments):
            chunks, size, had = summary(unseal(key, row))
            serial, number = struct.unpack(">II", key)
            self._serial = max(self._serial, serial)
            if serial not in owners:
                orphans.add(serial)
                continue
            chunks_before, size_before = totals[serial]
            if number * SEGMENT != chunks_before:
                raise FormatError(f"segment {number} of blob {serial} does not follow")
            totals[serial] = (chunks_before + chunks, size_before + size)
            owners[serial].had_bytes += had
        for serial, loaded in owners.items():
            if totals[serial] != (loaded.record.chunks, loaded.record.size):
                raise FormatError(f"segments of blob {serial} are missing")
        return orphans

    # -- transactions

    @contextlib.contextmanager
    def _write(self) -> Iterator[Any]:
        with self._lock:
            try:
                with self._env.begin(write=True) as txn:
                    yield txn
            except lmdb.Error as error:
                raise StoreError(f"{self.path}: cannot be written ({error}); free disk space, or restart") from None

    @contextlib.contextmanager
    def _read(self) -> Iterator[Any]:
        with self._lock:
            try:
                with self._env.begin() as txn:
                    yield txn
            except lmdb.Error as error:
                raise StoreError(f"{self.path}: cannot be read ({error}); restart to repair it") from None

    def sync(self) -> None:
        """Put all of it on the disk. May take as long as the disk is behind."""
        self._env.sync(True)

    def close(self) -> None:
        """Sync and close; nothing else may be called after it."""
        with self._lock:
            self._env.sync(True)
            self._env.close()

    # -- blobs and their chunks

    def new_serial(self) -> int:
        """A number for a new blob's segments that no row of this index bears."""
        with self._lock:
            self._serial += 1
            return self._serial

    def add_blob(self, blob: bytes, record: BlobRecord, tables: Tables) -> None:
        with self._write() as txn:
            txn.put(blob, seal(blob, record.encode()), db=self._blobs)
            for number, segment in enumerate(tables.segments()):
                key = struct.pack(">II", record.serial, number)
                txn.put(key, seal(key, segment), db=self._segments)
                for position, chunk in had_ids(segment):
                    txn.put(chunk, _place(record.serial, number * SEGMENT + position), db=self._places)

    def put_record(self, blob: bytes, record: BlobRecord) -> None:
        with self._write() as txn:
            txn.put(blob, seal(blob, record.encode()), db=self._blobs)

    def put_chunks(
        self, serial: int, tables: Tables, changed: Sequence[int], *, records: Iterable[tuple[bytes, BlobRecord]] = ()
    ) -> None:
        """Write what ``tables`` now say of the chunks ``changed``, and ``records``, at once."""
        with self._write() as txn:
            for number in sorted({index // SEGMENT for index in changed}):
                key = struct.pack(">II", serial, number)
                txn.put(key, seal(key, tables.segment(number)), db=self._segments)
            for index in changed:
                chunk = tables.manifest.id(index)
                if index in tables.had and chunk is not None:
                    txn.put(chunk, _place(serial, index), db=self._places)
                elif chunk is not None:
                    txn.delete(chunk, _place(serial, index), db=self._places)
            for blob, record in records:
                txn.put(blob, seal(blob, record.encode()), db=self._blobs)

    def tables(self, blob: bytes, record: BlobRecord) -> Tables:
        """The chunk tables of a blob, read anew. Raises StoreError when a row turned bad since open."""
        with self._read() as txn:
            try:
                keys = (struct.pack(">II", record.serial, number) for number in range(segments_of(record.chunks)))
                rows = (unseal(key, txn.get(key, b"", db=self._segments)) for key in keys)
                return Tables.decode(blob, record.size, record.checked, rows)
            except FormatError as error:
                raise StoreError(f"{self.path}: {error}; restart to repair it") from None

    def drop_blob(self, blob: bytes) -> None:
        """Forget a blob at once; its segments follow by ``sweep``."""
        with self._write() as txn:
            txn.delete(blob, db=self._blobs)

    def sweep(self, serial: int) -> bool:
        """Remove up to SWEEP segments of a dropped blob and the places they name; False: none was left."""
        with self._write() as txn:
            cursor = txn.cursor(self._segments)
            if not cursor.set_range(struct.pack(">II", serial, 0)):
                return False
            for _ in range(SWEEP):
                key = cursor.key()
                if key[:4] != struct.pack(">I", serial):
                    return False
                number = struct.unpack(">II", key)[1]
                for position, chunk in had_ids(unseal(key, cursor.value())):
                    txn.delete(chunk, _place(serial, number * SEGMENT + position), db=self._places)
                cursor.delete()  # and on to the next; past the last one the key is b""
            return True

    def places(self, chunk: bytes) -> list[tuple[int, int]]:
        """(serial, index) of every place that has the chunk."""
        with self._read() as txn:
            cursor = txn.cursor(self._places)
            if not cursor.set_key(chunk):
                return []
            return [struct.unpack(">II", place) for place in cursor.iternext_dup()]

    # -- links and snapshots

    def add_links(self, links: Iterable[tuple[bytes, str]]) -> None:
        """Note that (blob, path below hub/) is about to be linked."""
        with self._write() as txn:
            for blob, path in links:
                key = blob + xxh3_64_digest(path.encode())
                txn.put(key, seal(key, path.encode()), db=self._links)

    def links(self, blob: bytes) -> list[str]:
        with self._read() as txn:
            return [unseal(key, row).decode() for key, row in _prefixed(txn.cursor(self._links), blob)]

    def drop_links(self, blob: bytes) -> None:
        with self._write() as txn:
            for key, _ in list(_prefixed(txn.cursor(self._links), blob)):
                txn.delete(key, db=self._links)

    def put_snapshot(self, snapshot: Snapshot) -> None:
        key = _digest(str(snapshot.source)) + _digest(f"{snapshot.folder}/{snapshot.revision}")
        with self._write() as txn:
            txn.put(key, seal(key, encode_snapshot(snapshot)), db=self._snapshots)

    def snapshots(self, source: Source | None = None) -> list[Snapshot]:
        """The snapshots of ``source``, or all."""
        prefix = b"" if source is None else _digest(str(source))
        with self._read() as txn:
            rows = [unseal(key, row) for key, row in _prefixed(txn.cursor(self._snapshots), prefix)]
        return [decode_snapshot(row) for row in rows]


def _prefixed(cursor: Any, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    if cursor.set_range(prefix):
        for key, row in cursor:
            if not key.startswith(prefix):
                return
            yield key, row


def _place(serial: int, index: int) -> bytes:
    return struct.pack(">II", serial, index)


def _digest(text: str) -> bytes:
    return blake3(text.encode()).digest(length=16)
