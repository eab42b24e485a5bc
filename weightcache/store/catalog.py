"""Which blobs there are, which of their chunks are had, and who holds them: the quick half of the store.

Records of all blobs stay in memory; chunk tables are read from the index when they are needed, and a bounded number of
them is kept. Every change goes to the index before the call returns. A blob is *suspect* when the disk was never known
to have all of it and the kernel has been booted since: its bytes may be gone, so it has no chunk until it is rechecked.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from weightcache.core.bitmap import ChunkSet
from weightcache.core.ids import short
from weightcache.core.landing import ChunkMismatch
from weightcache.core.manifest import Manifest
from weightcache.errors import StoreError, UnknownBlob
from weightcache.store.index import Index
from weightcache.store.records import BlobRecord, Tables

KEPT_CHUNKS = 200_000  # chunks whose tables stay in memory: about 10 MB


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """What the store says of one blob. ``size`` and ``had_bytes`` in bytes, ``last_used`` in seconds since the epoch.

    ``checked``: compared with what the origin states. ``durable``: the disk has all of it. ``suspect``: to be rechecked
    before any chunk counts as had. ``shared``: how many other blobs have their bytes in the same file. ``private``: it
    is not for peers.
    """

    blob: bytes
    size: int
    name: str
    state: Literal["partial", "complete"]
    had_bytes: int
    chunks: int
    last_used: float
    pinned: bool
    leases: int
    checked: bool
    durable: bool
    suspect: bool
    shared: int
    private: bool


@dataclass(slots=True)
class Entry:
    """One blob in memory. ``inode``: of its file; entries with the same one share their bytes."""

    blob: bytes
    record: BlobRecord
    inode: int
    had_bytes: int
    suspect: bool = False

    @property
    def complete(self) -> bool:
        return not self.suspect and self.had_bytes == self.record.size


class Catalog:
    """The blobs of one store. Thread-safe; ``lock`` may be held around several calls that belong together."""

    def __init__(self, index: Index, boot: str) -> None:
        self.lock = threading.RLock()
        self.boot = boot
        self._index = index
        self._entries: dict[bytes, Entry] = {}
        self._serials: dict[int, Entry] = {}
        self._sharing: Counter[int] = Counter()  # blobs by inode
        self._tables: OrderedDict[int, Tables] = OrderedDict()  # by serial, the least recently used first
        self._kept_chunks = 0
        self._leases: Counter[bytes] = Counter()

    # -- blobs

    def restore(self, blob: bytes, record: BlobRecord, had_bytes: int, inode: int, mtime: int) -> Entry:
        """Take up a blob that the index had at open, and whose file was found with this inode and mtime (ns)."""
        if record.durable != mtime:
            record.durable = 0
        entry = self._enter(Entry(blob, record, inode, had_bytes))
        if record.boot != self.boot:
            entry.suspect = had_bytes > 0 and not record.durable
            if not entry.suspect:
                self.trust(entry)
        return entry

    def add(self, tables: Tables, name: str, inode: int, *, content: bytes = b"", private: bool = False) -> Entry:
        """Make a new blob known, with the chunks that ``tables`` has."""
        manifest = tables.manifest
        serial = self._index.new_serial()
        record = BlobRecord(serial, manifest.size, len(manifest), name, self.boot, time.time())
        record.checked = manifest.checked
        record.content = content
        record.private = private
        self._index.add_blob(manifest.blob, record, tables)
        had_bytes = sum(manifest.plan.span(index)[1] for index in tables.had)
        with self.lock:
            return self._enter(Entry(manifest.blob, record, inode, had_bytes))

    def _enter(self, entry: Entry) -> Entry:
        self._entries[entry.blob] = self._serials[entry.record.serial] = entry
        self._sharing[entry.inode] += 1
        return entry

    def drop(self, blob: bytes) -> int:
        """Forget a blob; returns the serial whose segments the index must still sweep."""
        with self.lock:
            entry = self.entry(blob)
            self._index.drop_blob(blob)
            del self._entries[blob], self._serials[entry.record.serial]
            self._sharing[entry.inode] -= 1
            self._unkeep(entry)
            return entry.record.serial

    def entry(self, blob: bytes) -> Entry:
        """The entry of a blob. Raises UnknownBlob."""
        entry = self._entries.get(blob)
        if entry is None:
            raise UnknownBlob(f"blob {short(blob)} is not in the store; load its source first")
        return entry

    def find(self, blob: bytes) -> Entry | None:
        return self._entries.get(blob)

    def entries(self) -> list[Entry]:
        with self.lock:
            return list(self._entries.values())

    def twin(self, content: bytes, size: int, besides: bytes) -> Entry | None:
        """A settled blob with this content, other than ``besides``."""
        with self.lock:
            for entry in self._entries.values():
                same = entry.record.content == content and entry.record.size == size
                if same and entry.complete and entry.blob != besides:
                    return entry
        return None

    @property
    def used(self) -> int:
        """Bytes reserved on disk: what several blobs share counts once."""
        with self.lock:
            return sum({entry.inode: entry.record.size for entry in self._entries.values()}.values())

    def info(self, entry: Entry) -> BlobInfo:
        with self.lock:
            record = entry.record
            return BlobInfo(
                blob=entry.blob,
                size=record.size,
                name=record.name,
                state="complete" if entry.complete else "partial",
                had_bytes=0 if entry.suspect else entry.had_bytes,
                chunks=record.chunks,
                last_used=record.last_used,
                pinned=record.pinned,
                leases=self._leases[entry.blob],
                checked=record.checked,
                durable=record.durable != 0,
                suspect=entry.suspect,
                shared=self._sharing[entry.inode] - 1,
                private=record.private,
            )

    def move(self, entry: Entry, inode: int) -> None:
        """A blob's path leads to another file now."""
        with self.lock:
            self._sharing[entry.inode] -= 1
            self._sharing[inode] += 1
            entry.inode = inode

    def save(self, entry: Entry) -> None:
        """Write a changed record down, unless the blob went away meanwhile."""
        with self.lock:
            if self._entries.get(entry.blob) is entry:
                self._index.put_record(entry.blob, entry.record)

    # -- chunks

    def tables(self, entry: Entry) -> Tables:
        """The chunk tables of a blob, suspect or not: for whoever holds ``lock``, and to be changed only here."""
        serial = entry.record.serial
        tables = self._tables.get(serial)
        if tables is not None:
            self._tables.move_to_end(serial)
            return tables
        tables = self._tables[serial] = self._index.tables(entry.blob, entry.record)
        self._kept_chunks += entry.record.chunks
        while self._kept_chunks > KEPT_CHUNKS and len(self._tables) > 1:
            _, other = self._tables.popitem(last=False)
            self._kept_chunks -= len(other.manifest)
        return tables

    def _unkeep(self, entry: Entry) -> None:
        if self._tables.pop(entry.record.serial, None) is not None:
            self._kept_chunks -= entry.record.chunks

    def copy_tables(self, entry: Entry) -> Tables:
        """The chunk tables of a blob, suspect or not, as they are now: for long work without the lock."""
        with self.lock:
            tables = self.tables(entry)
            old = tables.manifest
            manifest = Manifest(old.blob, old.plan, bytes(old.ids), bytes(old.checks), old.checked)
            return Tables(manifest, tables.had.copy())

    def had(self, blob: bytes) -> ChunkSet:
        with self.lock:
            entry = self.entry(blob)
            return ChunkSet(entry.record.chunks) if entry.suspect else self.tables(entry).had.copy()

    def record(self, blob: bytes, landed: Sequence[tuple[int, bytes, bytes]]) -> bool:
        """See ``Store.record``."""
        with self.lock:
            entry = self.entry(blob)
            if entry.suspect:
                raise StoreError(f"blob {short(blob)} ({entry.record.name}) must be rechecked before it is written to")
            tables = self.tables(entry)
            changed: list[int] = []
            try:
                for index, chunk, check in landed:
                    if not 0 <= index < entry.record.chunks:
                        raise IndexError(f"chunk {index} of {entry.record.chunks}")
                    known = tables.manifest.id(index)
                    if known is not None and known != chunk:
                        raise ChunkMismatch(
                            f"chunk {index} of {entry.record.name} is {short(known)} and arrived as {short(chunk)}"
                        )
                    if index not in tables.had:
                        tables.manifest.learn(index, chunk, check)
                        tables.had.add(index)
                        changed.append(index)
                self._index.put_chunks(entry.record.serial, tables, changed)
            except BaseException:
                self._unkeep(entry)  # what the index has stays true
                raise
            entry.had_bytes += sum(tables.manifest.plan.span(index)[1] for index in changed)
            return bool(changed) and entry.complete

    def lose(self, entry: Entry, indices: Iterable[int]) -> None:
        """Chunks are bad: they are missing again, also of every blob that has its bytes in the same file."""
        indices = set(indices)
        with self.lock:
            for other in [other for other in self._entries.values() if other.inode == entry.inode]:
                tables = self.tables(other)
                gone = sorted(indices & set(tables.had))
                for index in gone:
                    tables.had.discard(index)
                other.had_bytes -= sum(tables.manifest.plan.span(index)[1] for index in gone)
                other.record.durable = 0
                other.record.content = b""
                try:
                    self._index.put_chunks(other.record.serial, tables, gone, records=[(other.blob, other.record)])
                except BaseException:
                    self._unkeep(other)
                    raise

    def trust(self, entry: Entry) -> None:
        """What a blob has is good, as of this boot: it is not suspect."""
        with self.lock:
            entry.record.boot = self.boot
            self.save(entry)
            entry.suspect = False

    def merge_ids(self, blob: bytes, manifest: Manifest) -> list[int]:
        """See ``Store.merge_ids``."""
        with self.lock:
            entry = self.entry(blob)
            tables = self.tables(entry)
            if manifest.size != entry.record.size or list(manifest.plan.starts) != list(tables.manifest.plan.starts):
                raise StoreError(f"blob {short(blob)} ({entry.record.name}) is cut differently here; discard it first")
            learned: list[int] = []
            conflicts: list[int] = []
            if manifest.ids == tables.manifest.ids:
                return conflicts
            for index in range(len(manifest)):
                theirs, ours = manifest.id(index), tables.manifest.id(index)
                if theirs is not None and ours is None:
                    tables.manifest.learn(index, theirs)
                    learned.append(index)
                elif theirs is not None and theirs != ours:
                    conflicts.append(index)
            try:
                self._index.put_chunks(entry.record.serial, tables, learned)
            except BaseException:
                self._unkeep(entry)
                raise
            return conflicts

    def forget_ids(self, blob: bytes, indices: Iterable[int]) -> None:
        """See ``Store.forget_ids``."""
        with self.lock:
            entry = self.entry(blob)
            tables = self.tables(entry)
            unread = [index for index in indices if index not in tables.had]
            tables.manifest.forget(unread)
            try:
                self._index.put_chunks(entry.record.serial, tables, unread)
            except BaseException:
                self._unkeep(entry)
                raise

    def find_chunk(self, chunk: bytes, *, for_peers: bool) -> tuple[bytes, int] | None:
        with self.lock:
            for serial, index in self._index.places(chunk):
                entry = self._serials.get(serial)
                if entry is not None and not entry.suspect and not (for_peers and entry.record.private):
                    return entry.blob, index
        return None

    # -- holding

    def lease(self, blob: bytes) -> None:
        with self.lock:
            self._leases[blob] += 1
            if blob in self._entries:
                self.touch(blob)

    def release(self, blob: bytes) -> None:
        with self.lock:
            self._leases[blob] -= 1
            if self._leases[blob] <= 0:
                del self._leases[blob]

    def touch(self, blob: bytes) -> None:
        with self.lock:
            entry = self.entry(blob)
            entry.record.last_used = time.time()
            self.save(entry)

    def held(self, entry: Entry) -> str | None:
        """Why a blob must stay, as far as this store knows; None: it need not."""
        with self.lock:
            if entry.record.pinned:
                return "pinned"
            if self._leases[entry.blob]:
                return "leased" if entry.complete else "loading"
            return None
