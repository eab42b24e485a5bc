"""One source being loaded for one client: from its name to real files, with news on the way.

async with Loading(...) as loading:    # leases are held in here
    await loading.opened()             # snapshot known, space reserved: files may be mapped
    report = await loading.finished()  # every byte is had, the snapshot's directory is complete
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from weightcache.core.components import rank
from weightcache.core.patterns import EVERYTHING, Patterns
from weightcache.core.snapshot import FileEntry, Snapshot
from weightcache.core.source import Source
from weightcache.errors import (
    LoadFailed,
    SourceChanged,
    SourceError,
    SourceNotFound,
    StoreError,
    UnknownBlob,
    WeightcacheError,
)
from weightcache.node.blobs import Blobs
from weightcache.node.incoming import COMING, Incoming
from weightcache.node.report import Ended, Report, Tally
from weightcache.node.resolver import Resolver
from weightcache.node.spans import joined
from weightcache.node.trust import Trust
from weightcache.store import Store

OPENING = 16  # files whose manifests and space are seen to at once
LINK_ATTEMPTS = 3

Had = Callable[[int, int, int], None]  # bytes [begin, end) of file i are had


@dataclass(slots=True)
class File:
    """One file of the load. ``at``: the blob's real path, mappable at once. ``had``: bytes of it that are had."""

    entry: FileEntry
    at: Path
    coming: Incoming | None
    had: int
    ranges: list[tuple[int, int]]  # had when it was opened, ascending, joined
    before: Tally = field(default_factory=Tally)
    listener: Callable[[int, int], None] | None = None


class Loading:
    """A load in progress. ``on_had`` hears of bytes as they land, on the event loop."""

    def __init__(
        self,
        source: Source,
        store: Store,
        blobs: Blobs,
        resolver: Resolver,
        trust: Trust,
        ended: Ended,
        on_had: Had | None = None,
        *,
        revalidate: bool = False,
        patterns: Patterns = EVERYTHING,
    ) -> None:
        self.source = source
        self._store = store
        self._blobs = blobs
        self._resolver = resolver
        self._trust = trust
        self._ended = ended
        self._on_had = on_had
        self._revalidate = revalidate
        self._patterns = patterns
        self._tally = Tally()
        self._stages: dict[str, float] = {}
        self._began = time.monotonic()
        self._first: float | None = None  # when the first chunk was had
        self._wanted: list[bytes] = []
        self._leases: list[bytes] = []
        self._brought: list[Incoming] = []
        self.files: list[File] = []
        self.snapshot: Snapshot | None = None  # with just the files that are meant
        self._whole = True
        # Bytes of it, when it was opened, that this host has already, if only in other files; and that peers have so.
        self.here = self.nearby = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files:
            self._stop_listening(file)
        for coming in self._brought:
            self._blobs.leave(coming)
        self._blobs.unwant(self._wanted)
        for blob in self._leases:
            self._store.release(blob)

    @property
    def total(self) -> int:
        """Bytes of the snapshot; 0 until it is known."""
        return self.snapshot.size if self.snapshot is not None else 0

    @property
    def done(self) -> int:
        """Bytes of it that are had."""
        return sum(file.had for file in self.files)

    def describe(self) -> dict[str, Any]:
        """What a worker needs in order to map the files: where they lie, and which bytes of them are had."""
        assert self.snapshot is not None
        return {
            "event": "snapshot",
            "source": self.snapshot.source.public,
            "revision": self.snapshot.revision,
            "directory": str(self._store.directory(self.snapshot)),
            "single": self.snapshot.single,
            "here": self.here,
            "nearby": self.nearby,
            "files": [
                {"path": file.entry.path, "size": file.entry.size, "at": str(file.at), "had": file.ranges}
                for file in self.files
            ],
        }

    def progress(self) -> dict[str, Any]:
        """How far it is."""
        tally = self.tally()
        return {
            "event": "progress",
            "done": self.done,
            "total": self.total,
            "bytes_by_source": {"local": tally.local, "peer": tally.peers, "origin": tally.origin},
        }

    def tally(self) -> Tally:
        """Bytes by source so far, and what fell back."""
        total = self._tally.copy()
        seen: set[bytes] = set()
        for file in self.files:
            if file.coming is None:
                continue
            if file.entry.blob in seen:  # the same bytes under another name came but once
                total.local += file.had - sum(end - begin for begin, end in file.ranges)
            else:
                seen.add(file.entry.blob)
                total.add(file.coming.tally.since(file.before))
        return total

    def _lap(self, stage: str, since: float) -> float:
        now = time.monotonic()
        self._stages[stage] = self._stages.get(stage, 0.0) + now - since
        return now

    async def opened(self, *, single: bool = False) -> Snapshot:
        """Resolve the source and see to every file's manifest and space; transfers run from then on.

        ``single``: raise SourceError unless the source is one file. Raises SourceNotFound if no file of it is meant.
        """
        with self._ended.failing():
            return await self._opened(single)

    async def _opened(self, single: bool) -> Snapshot:
        now = time.monotonic()
        snapshot = await self._resolver.resolve(self.source, self._tally, revalidate=self._revalidate)
        if single and not snapshot.single:
            raise SourceError(_not_one_file(snapshot))
        self.snapshot = selected(snapshot, self._patterns)
        self._whole = len(self.snapshot.files) == len(snapshot.files)
        snapshot = self.snapshot
        now = self._lap("resolve", now)
        unique = {entry.blob: entry for entry in snapshot.files}
        missing = [blob for blob, entry in unique.items() if not (entry.source.is_local or self._is_here(blob))]
        if missing:
            self._wanted = missing
            await self._blobs.want(missing)
        gate = asyncio.Semaphore(OPENING)

        opened: dict[int, File] = {}

        async def bring(index: int, entry: FileEntry) -> None:
            async with gate:
                coming = await self._blobs.bring(entry)
                self._leases.append(entry.blob)
                if coming is not None:
                    self._brought.append(coming)
                opened[index] = self._open(index, entry, coming)

        # Small files and first components open first: their transfers start while others are still seen to.
        order = sorted(enumerate(snapshot.files), key=lambda item: (rank(item[1].path, item[1].size), item[0]))
        try:
            outcomes = await asyncio.gather(*(bring(index, entry) for index, entry in order), return_exceptions=True)
        finally:
            self.files = [opened[index] for index in sorted(opened)]
        for outcome in outcomes:
            if outcome is not None:
                raise self._seen(outcome)
        self._lap("plan", now)
        self._count_known()
        return snapshot

    def _count_known(self) -> None:
        seen: set[bytes] = set()
        for file in self.files:
            if file.coming is None or file.entry.blob in seen:
                self.here += file.entry.size
            else:
                seen.add(file.entry.blob)
                self.here += file.coming.at_hand
                self.nearby += file.coming.nearby

    def _is_here(self, blob: bytes) -> bool:
        info = self._store.info(blob)
        return info is not None and info.state == "complete" and not info.suspect

    def _open(self, index: int, entry: FileEntry, coming: Incoming | None) -> File:
        at = self._store.path(entry.blob)
        if coming is None:
            file = File(entry, at, None, entry.size, [(0, entry.size)] if entry.size else [])
            self._tally.local += entry.size
        else:
            ranges = _joined([coming.manifest.plan.span(chunk) for chunk in coming.had])
            had = sum(end - begin for begin, end in ranges)
            file = File(entry, at, coming, had, ranges, coming.tally.copy())
            if coming.unused:
                self._tally.note(coming.unused)
            self._tally.local += had

            def heard(begin: int, end: int) -> None:
                self._first = self._first or time.monotonic()
                file.had += end - begin
                if self._on_had is not None:
                    self._on_had(index, begin, end)

            file.listener = heard
            coming.listeners.append(heard)
        return file

    def _stop_listening(self, file: File) -> None:
        if file.coming is not None and file.listener in file.coming.listeners:
            file.coming.listeners.remove(file.listener)

    async def finished(self) -> Report:
        """Wait for every byte, link the snapshot's directory, and report. The first failure ends the wait."""
        with self._ended.failing():
            report = await self._finished()
        self._ended.done += 1
        self._ended.seconds += report.seconds
        return report

    async def _finished(self) -> Report:
        assert self.snapshot is not None
        now = time.monotonic()
        coming = [file.coming.done for file in self.files if file.coming is not None]
        if coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_EXCEPTION)
            for file in self.files:
                if file.coming is not None and file.coming.done in done:
                    self._raise(file, file.coming.done.exception())
        now = self._lap("transfer", now)
        for reason in self._trust.reasons():
            self._tally.note(reason)
        path = await self._linked()
        self._lap("link", now)
        if self.snapshot.single:
            path = path / self.snapshot.files[0].path
        return Report(
            str(self.source.public),
            self.snapshot.revision,
            str(path),
            self.snapshot.size,
            self.here,
            self.nearby,
            self.tally(),
            time.monotonic() - self._began,
            self._stages,
            self._first and self._first - self._began,
            {name: joined((c.spans[name] for c in self._brought), self._began) for name in COMING},
        )

    async def _linked(self, attempts: int = LINK_ATTEMPTS) -> Path:
        """The snapshot's directory. What has been found wrong since it came, and discarded, is brought again first."""
        assert self.snapshot is not None
        try:
            return await asyncio.to_thread(self._store.materialise, self.snapshot, whole=self._whole)
        except (StoreError, UnknownBlob):
            gone = [file for file in self.files if not self._is_here(file.entry.blob)]
            if not gone or attempts == 1:
                raise
        for file in gone:
            self._tally.note(f"{file.entry.source.public}: what was here is not what its origin has: brought again")
            try:
                coming = await self._blobs.repair(file.entry)
            except WeightcacheError as error:
                self._raise(file, error)
            else:
                self._tally.add(coming.tally if coming is not None else Tally())
        return await self._linked(attempts - 1)

    def _raise(self, file: File, error: BaseException | None) -> None:
        if isinstance(error, LoadFailed):
            raise LoadFailed(f"{file.entry.source.public}: {error}") from None
        if error is not None:
            error = type(error)(*error.args) if isinstance(error, WeightcacheError) else error
            raise self._seen(error)

    def _seen(self, error: BaseException) -> BaseException:
        if isinstance(error, SourceChanged):  # whatever is known of the source, and however fresh: ask again next time
            self._resolver.doubt(self.source)
        return error


def selected(snapshot: Snapshot, patterns: Patterns) -> Snapshot:
    """The snapshot with just the files that are meant, as one to load or to link. Raises SourceNotFound if none is."""
    if not patterns:
        return snapshot
    files = tuple(entry for entry in snapshot.files if patterns.admit(entry.path))
    if not files:
        some = ", ".join(entry.path for entry in snapshot.files[:5])
        raise SourceNotFound(f"{snapshot.source.public}: no file is left by the patterns ({patterns}); it has: {some}")
    return replace(snapshot, files=files)


def _not_one_file(snapshot: Snapshot) -> str:
    names = [entry.path for entry in snapshot.files if entry.path.endswith(".safetensors")]
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    holds = f"name one of its safetensors files: {shown}" if names else "it holds no safetensors file"
    return f"{snapshot.source.public} is a directory of {len(snapshot.files)} files; {holds}"


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, length) spans as [begin, end) ranges, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for begin, length in sorted(spans):
        if ranges and ranges[-1][1] == begin:
            ranges[-1] = (ranges[-1][0], begin + length)
        else:
            ranges.append((begin, begin + length))
    return ranges
