"""The store: blobs as real files, what is known of them, and snapshots as directories.

    STORE/lock            held (flock) by the one process that uses the store; says its pid
    STORE/index/          LMDB: records, chunk tables, links, snapshots (see index)
    STORE/blobs/ab/HEX    a blob: byte-exact, mode 0444, at its real path from the moment its space is reserved
    STORE/hub/            snapshots: hard links to complete blobs (see snapshots)

Theory of operation. Two locks. The catalog's guards what is known and is held for microseconds: the calls marked
*quick* take only that one, and an event loop may make them. ``_names`` is held by whoever adds or removes names of
files (create, settle, evict, materialise): these calls are *slow*, for threads, and wait for one another but not for
long reads or a disk that is behind. Order: ``_names`` first. Bytes reach a blob by descriptors (``open_writer``), in
bulk processes mostly; here they are reserved, had, found, checked again and removed.

The life of a blob: ``create`` (space reserved, no chunk had) -> ``record`` as chunks land -> complete -> ``settle``
(stored once, durable) -> evicted. What an unclean boot left in doubt is suspect until ``recheck``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from weightcache.core.bitmap import ChunkSet
from weightcache.core.ids import short
from weightcache.core.manifest import Manifest
from weightcache.core.snapshot import Snapshot
from weightcache.core.source import Source
from weightcache.errors import StoreError, StoreFull, StoreInUse
from weightcache.store import scrub
from weightcache.store.catalog import BlobInfo, Catalog, Entry
from weightcache.store.evict import Evicted, Evictor, Notice, reasons
from weightcache.store.files import BlobFiles, flush_range, make_dir
from weightcache.store.index import Index
from weightcache.store.records import Tables
from weightcache.store.snapshots import Hub

log = logging.getLogger(__name__)

SLACK = 16 << 20  # bytes that stay free on the disk, so that the index can always grow
FLUSH = 32 << 20  # bytes written out before the next look at whether the store is being closed
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Store:
    """One host's blobs. Thread-safe. Every call raises StoreError when the disk or the index refuses."""

    def __init__(self, root: Path, capacity: int | None, lock: int, index: Index, boot: str) -> None:
        self.root = root
        self.capacity = capacity
        self.node_id = index.node_id  # 16 random bytes, made once per store
        self._lock = lock
        self._index = index
        self._names = threading.RLock()
        self._catalog = Catalog(index, boot)
        self._files = BlobFiles(root / "blobs")
        self._hub = Hub(root / "hub", self._files, index)
        # Called in whichever thread removes a blob, without the catalog's lock; they must not raise. ``let_go``: before
        # it is asked who has the blob open, so that this daemon's own processes close it; ``gone``: it is removed.
        self.let_go: Notice = _nobody
        self.gone: Notice = _nobody
        self._interrupted = threading.Event()
        self._evictor = Evictor(
            self._catalog,
            self._files,
            self._hub,
            index,
            let_go=lambda blob: self.let_go(blob),
            gone=lambda blob: self.gone(blob),
        )

    # -- opening and closing

    @classmethod
    def open(cls, root: Path, capacity: int | None = None) -> Store:
        """Open the store in directory ``root``, or make one. ``capacity``: bytes its blobs may take (None: the disk's).

        Raises StoreInUse when another process has it, StoreError when the directory or what lies in it cannot be used.
        """
        root = root.expanduser().absolute()
        with _told(root), contextlib.ExitStack() as undo:
            make_dir(root)
            lock = _lock(root)
            undo.callback(os.close, lock)
            index = Index.open(root / "index")
            undo.callback(index.close)
            store = cls(root, capacity, lock, index, boot_id())
            store._restore()
            undo.pop_all()
            return store

    def _restore(self) -> None:
        """Bring records and files together: what has no counterpart goes, what is in doubt is no longer shown."""
        if self._index.restarted:
            shutil.rmtree(self._hub.root)
            make_dir(self._hub.root)
        files = dict(self._files.scan())
        for blob, loaded in self._index.blobs.items():
            record = loaded.record
            found = files.get(blob)
            if found is None or found.st_size != record.size:
                log.warning("%s: the file of blob %s (%s) is gone", self.root, short(blob), record.name)
                self._hub.hide(blob)
                self._index.drop_blob(blob)
                while self._index.sweep(record.serial):
                    pass
                continue
            del files[blob]
            if self._catalog.restore(blob, record, loaded.had_bytes, found.st_ino, found.st_mtime_ns).suspect:
                self._hub.hide(blob)
        self._index.blobs.clear()
        for blob in files:
            self._files.remove(blob)

    def interrupt(self) -> None:
        """Have long readings and flushes of other threads end soon, with StoreError: the store is about to close."""
        self._interrupted.set()

    def close(self) -> None:
        """Flush the index, and let others open the store. Slow; the second time it does nothing."""
        self.interrupt()
        with self._names:
            if self._lock >= 0:
                self._index.close()
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # a forked child may hold a copy of the descriptor
                os.close(self._lock)
                self._lock = -1

    def _go_on(self) -> None:
        if self._interrupted.is_set():
            raise StoreError(f"{self.root}: the store is being closed; try again when it is open")

    # -- snapshots

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Remember what a source resolved to; it stays known when its blobs go. Quick."""
        self._index.put_snapshot(snapshot)

    def find_snapshot(self, source: Source) -> Snapshot | None:
        """What ``source`` resolved to when it was last asked. Quick."""
        return max(self._index.snapshots(source), key=lambda snapshot: snapshot.resolved_at, default=None)

    def snapshots(self) -> list[Snapshot]:
        return self._index.snapshots()

    def directory(self, snapshot: Snapshot) -> Path:
        """Where ``materialise`` puts a snapshot."""
        return self._hub.directory(snapshot)

    def materialise(self, snapshot: Snapshot, *, whole: bool = True) -> Path:
        """Make or mend the snapshot's directory, and return it. Slow. Raises StoreError if a blob is not complete.

        Not ``whole``: ``snapshot`` holds a selection of the files, and the others are left as they are.
        """

        def inode(blob: bytes) -> int:
            entry = self._catalog.entry(blob)
            if not entry.complete:
                raise StoreError(f"{entry.record.name} ({short(blob)}) is not complete; load it first")
            return entry.inode

        with self._names, _told(self.root):
            return self._hub.show(snapshot, inode, whole=whole)

    # -- blobs

    def create(self, manifest: Manifest, name: str, *, private: bool = False) -> BlobInfo:
        """Reserve space for a blob, or resume one that is there; ``name`` is for people. Slow.

        ``private``: it is not for peers.

        A blob whose bytes another blob has already is complete at once. Evicts the least recently used if it must.
        Raises StoreFull when that is not enough.
        """
        with self._names, _told(self.root):
            entry = self._catalog.find(manifest.blob)
            content = manifest.content() if manifest.complete and len(manifest) else b""
            twin = self._catalog.twin(content, manifest.size, manifest.blob) if content else None
            if entry is not None and not (twin and not entry.complete):
                conflicts = self._catalog.merge_ids(manifest.blob, manifest)
                if conflicts:
                    log.warning(
                        "%s (%s): %d chunk ids differ from what is here", name, short(entry.blob), len(conflicts)
                    )
                self._catalog.touch(manifest.blob)
            elif twin is not None:
                entry = self._adopt(manifest, name, entry, twin, content, private)
            else:
                inode = self._reserve(manifest.blob, manifest.size, name)
                known = Manifest(manifest.blob, manifest.plan, bytes(manifest.ids), checked=manifest.checked)
                entry = self._catalog.add(Tables(known, ChunkSet(len(manifest))), name, inode, private=private)
            return self._catalog.info(entry)

    def _adopt(
        self, manifest: Manifest, name: str, old: Entry | None, twin: Entry, content: bytes, private: bool
    ) -> Entry:
        """Make a blob known as complete: its bytes are those of ``twin``."""
        if old is not None:
            self._evictor.discard(old)
        tables = self._catalog.copy_tables(twin)
        same = Manifest(
            manifest.blob, manifest.plan, bytes(manifest.ids), bytes(tables.manifest.checks), manifest.checked
        )
        self._files.link(twin.blob, self._files.path(manifest.blob))
        entry = self._catalog.add(Tables(same, tables.had), name, twin.inode, content=content, private=private)
        if old is not None and old.record.pinned:
            self.pin(manifest.blob)
        return entry

    def _reserve(self, blob: bytes, size: int, name: str) -> int:
        short_of = size + SLACK - self._files.available()
        if self.capacity is not None:
            short_of = max(short_of, self._catalog.used + size - self.capacity)
        while True:
            if short_of > 0:
                self._make_room(short_of, size, name)
            try:
                return self._files.reserve(blob, size)
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
                short_of = 1  # a quota, or somebody else's writing: one more file must go, whatever its size

    def _make_room(self, need: int, size: int, name: str) -> None:
        chosen, outcome = self._evictor.choose(need)
        if outcome.freed >= need:
            outcome = self._evictor.evict(entry for unit in chosen for entry in unit)
        if outcome.freed < need:
            kept = reasons(outcome.kept)
            limit = "" if self.capacity is None else f" under a capacity of {self.capacity:,}"
            raise StoreFull(
                f"{self.root}: no room for {name}: it needs {size:,} bytes and lacks {need - outcome.freed:,}{limit}"
                + (f" (kept: {kept})" if kept else "")
                + "; unpin or release blobs, free disk space, or raise the capacity"
            )

    def info(self, blob: bytes) -> BlobInfo | None:
        """Quick."""
        entry = self._catalog.find(blob)
        return None if entry is None else self._catalog.info(entry)

    def blobs(self) -> list[BlobInfo]:
        return [self._catalog.info(entry) for entry in self._catalog.entries()]

    def path(self, blob: bytes) -> Path:
        """The real path of a blob, there or not. Quick."""
        return self._files.path(blob)

    def open_writer(self, blob: bytes) -> int:
        """A descriptor for landing chunks; the caller closes it. Quick.

        Only for a partial blob, and not to be used after ``settle``, which may lead the path to another file.
        """
        with _told(self.root):
            entry = self._catalog.entry(blob)
            if entry.suspect or entry.complete:
                state = "complete" if entry.complete else "to be rechecked first"
                raise StoreError(f"blob {short(blob)} ({entry.record.name}) is {state}: nothing may be written to it")
            return self._files.open_writer(blob)

    def open_reader(self, blob: bytes) -> int:
        """A descriptor for reading; the caller closes it. As long as it is open the blob counts as mapped. Quick."""
        with _told(self.root):
            self._catalog.entry(blob)
            return self._files.open_reader(blob)

    def settle(self, blob: bytes) -> None:
        """For a complete blob: let it share the file of an identical one, or see its own onto the disk. Slow."""
        with self._names, _told(self.root):
            entry = self._catalog.entry(blob)
            if not entry.complete:
                return
            content = entry.record.content or self._catalog.copy_tables(entry).manifest.content()
            twin = self._catalog.twin(content, entry.record.size, blob)
            with self._catalog.lock:
                if twin is not None and twin.inode != entry.inode and entry.complete and twin.complete:
                    self._files.link(twin.blob, self._files.path(blob))
                    self._catalog.move(entry, twin.inode)
                    self._hub.relink(blob)
                entry.record.content = content
                self._catalog.save(entry)
        self._make_durable(entry)

    def _make_durable(self, entry: Entry) -> None:
        with _told(self.root), self._leased(entry.blob), self._reading(entry.blob) as fd:
            before = os.fstat(fd)
            for offset in range(0, before.st_size, FLUSH):  # one long fsync could not be interrupted
                self._go_on()
                flush_range(fd, offset, FLUSH)
            os.fsync(fd)
            with self._catalog.lock:
                if entry.complete and entry.inode == before.st_ino:
                    entry.record.durable = before.st_mtime_ns
                    self._catalog.save(entry)

    # -- chunks

    def manifest(self, blob: bytes) -> Manifest | None:
        """A copy of what is known of a blob's chunks. Quick: some 10 us for 10,000 chunks."""
        entry = self._catalog.find(blob)
        return None if entry is None else self._catalog.copy_tables(entry).manifest

    def had(self, blob: bytes) -> ChunkSet:
        """A copy of which chunks are had. Quick."""
        return self._catalog.had(blob)

    def record(self, blob: bytes, landed: Sequence[tuple[int, bytes, bytes]]) -> bool:
        """Chunks landed: (index, chunk id, xxh3-128) each. True when the blob became complete by it. Quick.

        On return they survive the death of this process. Raises ChunkMismatch when a chunk's id was known to be
        another; then none of ``landed`` is recorded.
        """
        return self._catalog.record(blob, landed)

    def merge_ids(self, blob: bytes, manifest: Manifest) -> list[int]:
        """Learn ids that were unknown here; returns the chunks whose ids differ, left as they are. Quick."""
        return self._catalog.merge_ids(blob, manifest)

    def forget_ids(self, blob: bytes, indices: Iterable[int]) -> None:
        """Make ids of missing chunks unknown again: they were somebody's mistake. Quick."""
        self._catalog.forget_ids(blob, indices)

    def set_checked(self, blob: bytes) -> None:
        """The blob has been compared with what its origin states. Quick."""
        with self._catalog.lock:
            entry = self._catalog.entry(blob)
            entry.record.checked = True
            self._catalog.tables(entry).manifest.checked = True
            self._catalog.save(entry)

    def unhave(self, blob: bytes, indices: Iterable[int]) -> None:
        """Chunks were found bad: they are missing again, here and in blobs that share the file. Slow.

        Links of the blobs concerned go until ``materialise`` finds them complete again.
        """
        with self._names, _told(self.root):
            entry = self._catalog.entry(blob)
            for other in self._catalog.entries():
                if other.inode == entry.inode:
                    self._hub.hide(other.blob)
            self._catalog.lose(entry, indices)
            self._index.sync()  # before good bytes replace the bad: a crash must not bring the old record back

    def find_chunk(self, chunk: bytes, *, for_peers: bool = False) -> tuple[bytes, int] | None:
        """A place here that has the chunk with this id (and that ``for_peers`` may know), as (blob, index). Quick."""
        return self._catalog.find_chunk(chunk, for_peers=for_peers)

    # -- holding and removing

    def lease(self, blob: bytes) -> None:
        """Hold a blob, or the name of one that is about to be created; counted, in memory only. Quick."""
        self._catalog.lease(blob)

    def release(self, blob: bytes) -> None:
        """Give one lease back. Quick."""
        self._catalog.release(blob)

    def pin(self, blob: bytes) -> None:
        """Keep a blob until ``unpin``, across restarts. Quick."""
        self._pin(blob, True)

    def unpin(self, blob: bytes) -> None:
        self._pin(blob, False)

    def _pin(self, blob: bytes, pinned: bool) -> None:
        with self._catalog.lock:
            entry = self._catalog.entry(blob)
            entry.record.pinned = pinned
            self._catalog.save(entry)

    def touch(self, blob: bytes) -> None:
        """The blob was used just now. Quick."""
        self._catalog.touch(blob)

    def evict(self, blobs: Iterable[bytes] | None = None, need: int = 0) -> Evicted:
        """Remove ``blobs``, or (None) the least recently used until ``need`` bytes are freed. Slow."""
        with self._names, _told(self.root):
            if blobs is not None:
                return self._evictor.evict(entry for blob in blobs if (entry := self._catalog.find(blob)))
            chosen, planned = self._evictor.choose(need)
            done = self._evictor.evict(entry for unit in chosen for entry in unit)
            return Evicted(done.freed, planned.kept + done.kept)

    def discard(self, blob: bytes) -> None:
        """Remove a blob that must not be used, whoever holds it. Slow."""
        with self._names, _told(self.root):
            self._evictor.discard(self._catalog.entry(blob))

    # -- reading again

    def scrub(self, blob: bytes, *, deep: bool = False) -> Iterator[tuple[int, bool]]:
        """Read every chunk had again: (index, whether it is intact), by xxh3 or, ``deep``, by its BLAKE3 id. Slow.

        The blob is leased meanwhile. What it finds is not acted on: see ``unhave``.
        """
        entry = self._catalog.entry(blob)
        with _told(self.root), self._leased(blob), self._reading(blob) as fd:
            for outcome in scrub.scrub(fd, self._catalog.copy_tables(entry), deep=deep):
                self._go_on()
                yield outcome

    def recheck(self, blob: bytes) -> int:
        """Read a suspect blob again and drop the chunks that are not what was written. Slow. Returns how many."""
        entry = self._catalog.entry(blob)
        if not entry.suspect:
            return 0
        bad = [index for index, good in self.scrub(blob) if not good]
        if bad:
            self.unhave(blob, bad)
        self._catalog.trust(entry)
        return len(bad)

    def verify_digest(self, blob: bytes, digest: str) -> bool | None:
        """Whether a complete blob is what its origin states, ``ALGORITHM:HEX``; None: unverifiable here. Slow."""
        entry = self._catalog.entry(blob)
        if not entry.complete:
            raise StoreError(f"{entry.record.name} ({short(blob)}) is not complete; load it first")
        with _told(self.root), self._leased(blob), self._reading(blob) as fd:
            return scrub.matches(fd, entry.record.size, digest, self._go_on)

    @contextlib.contextmanager
    def _leased(self, blob: bytes) -> Iterator[None]:
        self._catalog.lease(blob)
        try:
            yield
        finally:
            self._catalog.release(blob)

    @contextlib.contextmanager
    def _reading(self, blob: bytes) -> Iterator[int]:
        fd = self._files.open_reader(blob)
        try:
            yield fd
        finally:
            os.close(fd)

    # -- space

    @property
    def used(self) -> int:
        """Bytes reserved by blobs; what several share counts once."""
        return self._catalog.used

    @property
    def evicted(self) -> int:
        """Bytes that evictions have freed since the store was opened."""
        return self._evictor.freed

    @property
    def free(self) -> int:
        """Bytes that a new blob may take without an eviction."""
        free = self._files.available() - SLACK
        return max(0, free if self.capacity is None else min(free, self.capacity - self.used))


def _nobody(blob: bytes) -> None:
    """The notice of a store that nobody serves from."""


def boot_id() -> str:
    """The kernel's name for the time since it was booted."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _lock(root: Path) -> int:
    """Take the store's lock; the descriptor holds it. Raises StoreInUse."""
    path = root / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise StoreInUse(f"{root}: in use by process {owner}; stop it, or choose another store") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def _told(root: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error that says where."""
    try:
        yield
    except OSError as error:
        place = error.filename or root
        raise StoreError(
            f"{place}: {error.strerror}; the store needs a directory of its own on a disk that works"
        ) from error
