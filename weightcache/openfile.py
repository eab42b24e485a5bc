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

from weightcache.client import Client, Json, Load
from weightcache.errors import DaemonError, SourceChanged, WeightcacheError
from weightcache.log import fields
from weightcache.portal import Portal

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # after the last load, until the client leaves
REOPEN_SECONDS = 30.0  # for which a load goes on looking for a daemon that went away


class Ranges:
    """Which bytes [begin, end) are had. Thread-safe; neighbours join, so that it stays small."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._changed = threading.Condition()
        self._error: WeightcacheError | None = None
        self._whole = size == 0

    def add(self, ranges: list[list[int]]) -> None:
        with self._changed:
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

    def _covers(self, begin: int, end: int) -> bool:
        at = bisect.bisect_right(self._begins, begin) - 1
        return begin >= end or (at >= 0 and end <= self._ends[at])

    def fail(self, error: WeightcacheError) -> None:
        """What is not had will not be; the first reason counts."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def wait(self, begin: int, end: int) -> None:
        """Return once [begin, end) is had; raise what the load failed with if it will not be."""
        if self._whole:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._covers(begin, end))
            if not self._covers(begin, end) and self._error is not None:
                raise type(self._error)(*self._error.args)


class OpenFile:
    """One file of a load. ``path``: real, mappable at once; ``size`` in bytes."""

    def __init__(self, worker: Worker, load: Load) -> None:
        file = load.snapshot["files"][0]
        self.path: str = file["at"]
        self.size: int = file["size"]
        self.report: Json | None = None
        self._name: str = load.snapshot["source"]  # for people: without what a query may hold
        self._worker = worker
        self._ranges = Ranges(self.size)
        self._ranges.add(file["had"])
        self._inode = _inode(self.path)
        self._closed = asyncio.Event()
        self._load = load

    def wait(self, begin: int, end: int) -> None:
        """Return when bytes [begin, end) are had; raises the load's WeightcacheError if they never will be."""
        self._ranges.wait(begin, end)

    def close(self) -> None:
        """Give up the lease. Does not block; may be called from any thread, also at the interpreter's end."""
        self._worker.call(self._closed.set)

    async def follow(self, source: str) -> None:
        """Hear of what lands until all has, through restarts of the daemon; then hold the lease until ``close``."""
        hearing = asyncio.ensure_future(self._hear_all(source))
        closed = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait([hearing, closed], return_when=asyncio.FIRST_COMPLETED)
            if hearing.done():
                hearing.result()
                if not self._worker.client.embedded:  # else others may wait for the store, and a mapping needs no lease
                    await closed
        except WeightcacheError as error:
            self._ranges.fail(error)
        except Exception as error:
            log.exception("load given up", extra=fields(source=self._name))
            self._ranges.fail(DaemonError(f"{self._name}: {type(error).__name__}: {error}; open it again"))
        finally:
            self._ranges.fail(DaemonError(f"{self.path}: it was closed while it was still arriving"))
            hearing.cancel()
            closed.cancel()
            self._load.close()

    async def _hear_all(self, source: str) -> None:
        while True:
            try:
                return await self._hear()
            except DaemonError as error:
                log.warning("load interrupted", extra=fields(source=self._name, why=str(error)))
                await self._reopen(source)

    async def _hear(self) -> None:
        async for event in self._load:
            if event["event"] == "had":
                self._ranges.add(event["ranges"])
            elif event["event"] == "done":
                self.report = event["report"]
                self._ranges.add([[0, self.size]])

    async def _reopen(self, source: str) -> None:
        self._load = await self._worker.load(source)
        file = self._load.snapshot["files"][0]
        try:
            same = file["at"] == self.path and _inode(self.path) == self._inode
        except FileNotFoundError:
            same = False
        if not same:
            raise SourceChanged(f"{source}: it was replaced while the daemon restarted; open it again")
        self._ranges.add(file["had"])


def _inode(path: str) -> tuple[int, int]:
    found = os.stat(path)
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

    def open(self, source: str) -> OpenFile:
        return self._portal.run(self._start(source))

    def call(self, what: Callable[[], object]) -> None:
        self._portal.soon(what)

    async def _start(self, source: str) -> OpenFile:
        self._stay()
        try:
            file = OpenFile(self, await self.load(source))
        except BaseException:
            self._leave()
            raise
        task = asyncio.ensure_future(file.follow(source))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._leave())
        return file

    async def load(self, source: str) -> Load:
        """A load of one file; a daemon that answered once, and went away, is waited for."""
        deadline = asyncio.get_running_loop().time() + REOPEN_SECONDS
        while True:
            try:
                return await self.client.load(source, single=True)
            except DaemonError:
                if not self.client.has_daemon or asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.1)

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


def open_file(source: str) -> OpenFile:
    """Load one file and return once it may be mapped. Raises SourceError for a directory, and its kin."""
    global _worker
    with _lock:
        if _worker is None or not _worker.alive:  # the first time, or in a child of the process that had it
            _worker = Worker()
            atexit.register(_worker.close)
    return _worker.open(source)
