"""What happens to blobs between loads: checked against their origin, made durable, verified, pinned, evicted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from weightcache.core.ids import short
from weightcache.core.snapshot import FileEntry, Snapshot
from weightcache.core.source import parse_source
from weightcache.errors import BlobCorrupt, UnknownBlob, WeightcacheError
from weightcache.log import fields
from weightcache.node.blobs import Blobs
from weightcache.node.compare import contradiction
from weightcache.node.incoming import Incoming
from weightcache.node.serving import Serving
from weightcache.node.swarm import Swarm
from weightcache.node.teaching import Teacher
from weightcache.node.transfers import Transfers
from weightcache.store import BlobInfo, Store

log = logging.getLogger(__name__)


LET_GO_SECONDS = 5.0  # for this host's sender to close a blob that is to go


@dataclass(frozen=True, slots=True)
class Settling:
    """A complete blob that is still to be compared and made durable. For ``claims`` and ``accused`` see Incoming."""

    blob: bytes
    entry: FileEntry | None
    claims: frozenset[bytes] = frozenset()
    accused: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class Verified:
    """One blob that was read again. ``bad``: chunks that were not as written; ``repaired``: from whom, in bytes."""

    blob: str
    path: str
    size: int
    bad: list[int]
    repaired: dict[str, Any] | None
    error: str | None = None


class Upkeep:
    """Care for what the store holds."""

    def __init__(
        self, store: Store, blobs: Blobs, transfers: Transfers, serving: Serving, swarm: Swarm, teacher: Teacher
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._transfers = transfers
        self._serving = serving
        self._swarm = swarm
        self._teacher = teacher
        self._queue: asyncio.Queue[Settling] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        store.let_go = self._let_go
        store.gone = self._gone

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    # -- after a blob has come

    def completed(self, coming: Incoming) -> None:
        """All of a blob is had: see to it that it is what the origin states, and that the disk has it."""
        claims, accused = frozenset(coming.claims), frozenset(coming.accused)
        self._enqueue(Settling(coming.blob, coming.entry, claims, accused))

    def resume(self) -> None:
        """Take up what an earlier process of this store left undone."""
        waiting = [info.blob for info in self._store.blobs() if info.state == "complete" and not info.durable]
        entries = self.entries() if waiting else {}
        for blob in waiting:
            self._enqueue(Settling(blob, entries.get(blob)))

    def _enqueue(self, settling: Settling) -> None:
        self._queue.put_nowait(settling)
        if self._worker is None:
            self._worker = asyncio.ensure_future(self._work())

    async def _work(self) -> None:
        while True:
            settling = await self._queue.get()
            try:
                await asyncio.to_thread(self._settle, settling)
            except UnknownBlob:
                pass  # evicted meanwhile
            except (WeightcacheError, OSError) as error:
                log.error("after a load", extra=fields(blob=short(settling.blob), why=str(error)))

    def _settle(self, settling: Settling) -> None:
        blob, entry = settling.blob, settling.entry
        info = self._store.info(blob)
        if info is None:
            return
        if not info.checked and entry is not None:
            why = contradiction(self._store, entry)
            if why:
                blame = self._transfers.contradicted  # first: who loads it again must not believe the same peers
                self._loop.call_soon_threadsafe(blame, entry, settling.claims, settling.accused)
                self._store.discard(blob)
                raise BlobCorrupt(f"{entry.source.public}: {why}; it is removed, load it again")
        self._store.settle(blob)
        info = self._store.info(blob)
        if entry is not None and info is not None and (info.checked or not settling.claims):
            self._loop.call_soon_threadsafe(self._teacher.settled, entry)

    # -- verify

    def entries(self) -> dict[bytes, FileEntry]:
        """A file entry for each blob that a known snapshot names."""
        return {entry.blob: entry for snapshot in self._store.snapshots() for entry in snapshot.files}

    async def verify(self, blobs: Iterable[bytes], *, deep: bool, repair: bool) -> AsyncIterator[Verified]:
        """Read blobs again, one after the other; what is bad is missing from then on, and brought again if asked."""
        entries = await asyncio.to_thread(self.entries)
        for blob in blobs:
            info = self._store.info(blob)
            if info is None:
                continue
            if self._transfers.incoming(blob) is not None:
                yield Verified(short(blob), info.name, info.size, [], None, "it is being loaded; verify it afterwards")
                continue
            bad = await asyncio.to_thread(self._scrub, blob, deep)
            repaired: dict[str, Any] | None = None
            error = None
            if bad:
                log.error("bad chunks", extra=fields(blob=short(blob), path=info.name, chunks=bad))
                await asyncio.to_thread(self._store.unhave, blob, bad)
                await self._serving.drop_partial()  # also twins, whose bytes are the same file's
                self._swarm.announce_state(blob, has=False)
            if info.suspect:
                await asyncio.to_thread(self._store.recheck, blob)  # what is left of it is good
            if bad and repair:
                repaired, error = await self._repair(blob, entries.get(blob))
            yield Verified(short(blob), info.name, info.size, bad, repaired, error)

    def _scrub(self, blob: bytes, deep: bool) -> list[int]:
        return [chunk for chunk, good in self._store.scrub(blob, deep=deep) if not good]

    async def _repair(self, blob: bytes, entry: FileEntry | None) -> tuple[dict[str, Any] | None, str | None]:
        if entry is None:
            return None, "no source is known for it"
        try:
            coming = await self._blobs.repair(entry)
        except WeightcacheError as error:
            return None, str(error)
        tally = coming.tally if coming is not None else None
        if tally is None:
            return {}, None
        await asyncio.to_thread(self._relink, blob)
        return {"local": tally.local, "peer": tally.peers, "origin": tally.origin}, None

    def _relink(self, blob: bytes) -> None:
        """Put a repaired blob back into the directories of the snapshots that are whole again."""
        for snapshot in self._store.snapshots():
            if any(entry.blob == blob for entry in snapshot.files) and self._whole(snapshot):
                self._store.materialise(snapshot)

    def _whole(self, snapshot: Snapshot) -> bool:
        infos = [self._store.info(entry.blob) for entry in snapshot.files]
        return all(info is not None and info.state == "complete" for info in infos)

    # -- what stays and what goes

    def find(self, name: str) -> list[bytes]:
        """The blobs that a source, or the hex digits that a blob's id begins with, names. Raises UnknownBlob."""
        if "://" not in name:
            found = [info.blob for info in self._store.blobs() if len(name) >= 6 and info.blob.hex().startswith(name)]
            if not found:
                raise UnknownBlob(f"no blob's id begins with {name!r}; weightcache ls shows them (6 digits or more)")
            return found
        source = parse_source(name)
        snapshot = self._store.find_snapshot(source)
        if snapshot is None:
            raise UnknownBlob(f"{source.public} is not in the store; weightcache ls shows what is")
        return [entry.blob for entry in snapshot.files]

    def chosen(self, names: Iterable[str] | None) -> list[bytes]:
        """The blobs that names name, or all there are. Raises UnknownBlob."""
        if names is None:
            return [info.blob for info in self._store.blobs()]
        return list(dict.fromkeys(blob for name in names for blob in self.find(name)))

    async def evict(self, names: Iterable[str] | None, need: int) -> dict[str, Any]:
        """Evict what is named, or the least recently used until ``need`` bytes are free. Says what stays, and why."""
        blobs = await asyncio.to_thread(self.chosen, names) if names is not None else None
        shown = {info.blob: info.name for info in self._store.blobs()}
        evicted = await asyncio.to_thread(self._store.evict, blobs, need)
        kept = [{"blob": blob.hex(), "path": shown.get(blob, ""), "why": why} for blob, why in evicted.kept]
        return {"freed": evicted.freed, "kept": kept}

    def pin(self, names: Iterable[str], *, on: bool) -> list[BlobInfo]:
        """Pin or unpin blobs; all names are looked up before any is touched. Raises UnknownBlob."""
        blobs = self.chosen(names)
        here = [blob for blob in blobs if self._store.info(blob) is not None]
        if on and len(here) < len(blobs):
            lacking = len(blobs) - len(here)
            raise UnknownBlob(f"{lacking} of {len(blobs)} files are not in the store; pull them first, then pin them")
        for blob in here:
            (self._store.pin if on else self._store.unpin)(blob)
        infos = [self._store.info(blob) for blob in here]
        return [info for info in infos if info is not None]

    def _let_go(self, blob: bytes) -> None:
        """From the store's thread, before it asks whether anybody has a blob open: this host's sender must not."""
        dropped = asyncio.run_coroutine_threadsafe(self._serving.drop(blob), self._loop)
        try:
            dropped.result(LET_GO_SECONDS)
        except TimeoutError:
            log.warning("the sender does not let go", extra=fields(blob=short(blob)))

    def _gone(self, blob: bytes) -> None:
        self._loop.call_soon_threadsafe(lambda: self._swarm.announce_state(blob, has=False))
