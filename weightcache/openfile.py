"""Files of a load as a synchronous worker sees them: a path to map at once, and a wait for the bytes it needs next.

One client a process serves all of them, from a thread of its own, and leaves (an embedded node frees the store) when
nothing is on its way any more: a file that is mapped needs nobody to keep its bytes.
"""

from __future__ import annotations

import asyncio
import atexit
import bisect
import logging
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from weightcache.client import Client, Json, Load
from weightcache.core.source import is_source
from weightcache.errors import DaemonError, SourceChanged, WeightcacheError
from weightcache.log import fields
from weightcache.portal import Portal
from weightcache.waiting import SECONDS

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # after the last load, until the client leaves
REOPEN_SECONDS = 30.0  # for which a load goes on looking for a daemon that went away


class Ranges:
    """Which bytes [begin, end) are had. Thread-safe; neighbours join, so that it stays small."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._mutex = threading.Lock()  # taken by itself: see ``waiting``
        self._changed = threading.Condition(self._mutex)
        self._error: WeightcacheError | None = None
        self._whole = size == 0
        self._pid = os.getpid()

    def add(self, ranges: list[list[int]]) -> None:
        with self._mutex:
            for begin, end in ranges:
                self._add(begin, end)
            self._whole = self._covers(0, self._size)
            self._changed.notify_all()

    def _add(self, begin: int, end: int) -> None:
        first = bisect.bisect_left(self._ends, begin)
        last = bisect.bisect_right(self._begins, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last], self._ends[first:last] = [begin], [end]

    @property
    def whole(self) -> bool:
        """All of it is had."""
        return self._whole

    def _covers(self, begin: int, end: int) -> bool:
        at = bisect.bisect_right(self._begins, begin) - 1
        return begin >= end or (at >= 0 and end <= self._ends[at])

    def fail(self, error: WeightcacheError) -> None:
        """What is not had will not be; the first reason counts."""
        with self._mutex:
            self._error = self._error or error
            self._changed.notify_all()

    def wait(self, begin: int, end: int) -> None:
        """Return once [begin, end) is had; raise what the load failed with if it will not be."""
        if self._whole:
            return
        if os.getpid() != self._pid:  # nobody would ever tell this one
            raise DaemonError("forked while a file was arriving: only the parent hears of it; open it in the child")
        with self._mutex:
            while self._error is None and not self._covers(begin, end):
                self._changed.wait(SECONDS)
            if not self._covers(begin, end) and self._error is not None:
                raise type(self._error)(*self._error.args)


class OpenFile:
    """One file of a load. ``name``: within the snapshot; ``path``: real, mappable at once; ``size`` in bytes."""

    def __init__(self, name: str, path: str, size: int, load: OpenLoad | None = None) -> None:
        self.name = name
        self.path = path
        self.size = size
        self.ranges = Ranges(size if load is not None else 0)  # of a file that is simply there, all is had
        self._load = load

    def load_report(self, seconds: float = 0.0) -> Json | None:
        """What the daemon reports of the load once it is over, waiting so long for it; None: not over, or no daemon."""
        return self._load.wait(seconds) if self._load is not None else None

    def wait(self, begin: int, end: int) -> None:
        """Return when bytes [begin, end) are had; raises the load's WeightcacheError if they never will be."""
        self.ranges.wait(begin, end)

    def close(self) -> None:
        """Give up the load's lease. Does not block; may be called from any thread, also at the interpreter's end."""
        if self._load is not None:
            self._load.close()


class OpenLoad:
    """A load that is followed: its files, and what becomes of them.

    ``hold``: keep an embedded node, too, until ``close``. A file that is mapped needs it no longer than its bytes take,
    and others may wait for the store; files that are yet to be opened must stay where they are.
    """

    def __init__(self, worker: Worker, load: Load, hold: bool) -> None:
        self.directory: str = load.snapshot["directory"]
        self.report: Json | None = None
        self.files = [OpenFile(file["path"], file["at"], file["size"], self) for file in load.snapshot["files"]]
        self._name: str = load.snapshot["source"]  # for people: without what a query may hold
        self._worker = worker
        self._hold = hold
        self._over = threading.Event()
        self._closed = asyncio.Event()
        self._load = load
        self._inodes = {file.path: _inode(file.path) for file in self.files}
        self._learn()

    def _learn(self) -> None:
        for file, found in zip(self.files, self._load.snapshot["files"], strict=True):
            file.ranges.add(found["had"])

    def wait(self, seconds: float) -> Json | None:
        """The daemon's report; None if the load is not over by then, or failed."""
        self._over.wait(seconds)
        return self.report

    def close(self) -> None:
        """Give up the lease. Does not block; may be called from any thread, also at the interpreter's end."""
        self._worker.call(self._closed.set)

    async def follow(self, source: str, single: bool) -> None:
        """Hear of what lands until all has, through restarts of the daemon; then hold the lease until ``close``."""
        hearing = asyncio.ensure_future(self._hear_all(source, single))
        closed = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait([hearing, closed], return_when=asyncio.FIRST_COMPLETED)
            if hearing.done():
                hearing.result()
                if self._hold or not self._worker.client.embedded:
                    await closed
        except WeightcacheError as error:
            self._fail(error)
        except Exception as error:
            log.exception("load given up", extra=fields(source=self._name))
            self._fail(DaemonError(f"{self._name}: {type(error).__name__}: {error}; open it again"))
        finally:
            self._over.set()
            self._fail(DaemonError(f"{self._name}: it was closed while it was still arriving"))
            hearing.cancel()
            closed.cancel()
            self._load.close()

    def _fail(self, error: WeightcacheError) -> None:
        for file in self.files:
            file.ranges.fail(error)

    async def _hear_all(self, source: str, single: bool) -> None:
        while True:
            try:
                return await self._hear()
            except DaemonError as error:
                log.warning("load interrupted", extra=fields(source=self._name, why=str(error)))
                await self._reopen(source, single)

    async def _hear(self) -> None:
        async for event in self._load:
            if event["event"] == "had":
                self.files[event["file"]].ranges.add(event["ranges"])
            elif event["event"] == "done":
                self.report = event["report"]
                for file in self.files:
                    file.ranges.add([[0, file.size]])
                self._over.set()

    async def _reopen(self, source: str, single: bool) -> None:
        self._load = await self._worker.load(source, single)
        found = [(file["path"], file["at"]) for file in self._load.snapshot["files"]]
        if found != [(file.name, file.path) for file in self.files] or not all(map(self._is_same, self.files)):
            raise SourceChanged(f"{source}: it was replaced while the daemon restarted; open it again")
        self._learn()

    def _is_same(self, file: OpenFile) -> bool:
        """Whether what arrives at a file's path arrives where it was opened. A whole one may have become a link to
        another that is identical: who has it open has all of its bytes.
        """
        return file.ranges.whole or _inode(file.path) == self._inodes[file.path]


class OpenSnapshot:
    """The files of a source or of a local directory, by name. A context manager; ``close`` gives up the lease."""

    def __init__(self, directory: str, files: list[OpenFile], load: OpenLoad | None) -> None:
        self.directory = directory
        self.files = files
        self._load = load

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def report(self, seconds: float = 0.0) -> Json | None:
        """What the daemon reports of the load once it is over, waiting so long for it; None: not over, or no daemon."""
        return self._load.wait(seconds) if self._load is not None else None

    def close(self) -> None:
        """Give up the lease; whoever waits for bytes gets a DaemonError. May be called again, from any thread."""
        if self._load is not None:
            self._load.close()


def _inode(path: str) -> tuple[int, int] | None:
    """None: there is no such file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class Worker:
    """The process' one client, in its thread. It leaves when no file has been on its way for a while."""

    def __init__(self) -> None:
        self._portal = Portal()
        self.client = Client()
        self._open = 0
        self._leaving: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def alive(self) -> bool:
        return self._portal.alive

    def open(self, source: str, *, single: bool) -> OpenLoad:
        return self._portal.run(self._start(source, single))

    def call(self, what: Callable[[], object]) -> None:
        self._portal.soon(what)

    async def _start(self, source: str, single: bool) -> OpenLoad:
        self._stay()
        try:
            load = OpenLoad(self, await self.load(source, single), hold=not single)
        except BaseException:
            self._leave()
            raise
        task = asyncio.ensure_future(load.follow(source, single))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._leave())
        return load

    async def load(self, source: str, single: bool) -> Load:
        """A load, begun; a daemon that answered once, and went away, is waited for."""
        deadline = asyncio.get_running_loop().time() + REOPEN_SECONDS
        while True:
            try:
                return await self.client.load(source, single=single)
            except DaemonError:
                if not self.client.has_daemon or asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.1)

    def manifest(self, source: str) -> list[Json]:
        return self._portal.run(self._ask_manifest(source))

    async def _ask_manifest(self, source: str) -> list[Json]:
        self._stay()
        try:
            return await self.client.manifest(source)
        finally:
            self._leave()

    def _stay(self) -> None:
        self._open += 1
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def _leave(self) -> None:
        self._open -= 1
        if not self._open:
            loop = asyncio.get_running_loop()
            self._leaving = loop.call_later(IDLE_SECONDS, lambda: asyncio.ensure_future(self._leave_client()))

    async def _leave_client(self) -> None:
        if not self._open:
            await self.client.close()

    def close(self) -> None:
        if self.alive:
            self._portal.run(self._end())
            self._portal.close()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.close()


_lock = threading.Lock()
_worker: Worker | None = None


def _running() -> Worker:
    global _worker
    with _lock:
        if _worker is None or not _worker.alive:  # the first time, or in a child of the process that had it
            _worker = Worker()
            atexit.register(_worker.close)
        return _worker


def open_file(source: str) -> OpenFile:
    """Load one file and return once it may be mapped. Raises SourceError for a directory, and its kin."""
    return _running().open(source, single=True).files[0]


def manifest_of(source: str) -> list[Json]:
    """The files of a source with their chunks, as ``Client.manifest`` gives them."""
    return _running().manifest(source)


def open_snapshot(source: str | os.PathLike[str]) -> OpenSnapshot:
    """Load all files of a source and return once they may be mapped; or those of a local directory, or one file.

    Hold it open for as long as files are yet to be opened: it is the lease. Raises SourceError and its kin;
    FileNotFoundError for a local path at which there is nothing.
    """
    path = os.fspath(source)
    if is_source(path):
        load = _running().open(path, single=False)
        return OpenSnapshot(load.directory, load.files, load)
    if os.path.isfile(path):
        return OpenSnapshot(os.path.dirname(path), [_local(path, os.path.basename(path))], None)
    if not os.path.isdir(path):
        raise FileNotFoundError(f"No such file or directory: {path}")
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    found = sorted(file for file in paths if os.path.isfile(file))  # what a dead link names is no file
    return OpenSnapshot(path, [_local(file, os.path.relpath(file, path)) for file in found], None)


def _local(path: str, name: str) -> OpenFile:
    return OpenFile(name, path, os.stat(path).st_size)
