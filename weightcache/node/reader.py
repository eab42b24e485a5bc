"""The ``origin`` process: resolves sources, reads origins, copies between blobs of this host. Bytes end in ``land``.

Messages to it (arrays; ``call`` and ``request`` are the node's numbers, descriptors come along):

    config {origin settings}            resolve call source            plan call snapshot-of-one-file
    publish call snapshot-of-one-file force +fd of a memory file
    blob handle snapshot-of-one-file +fd      close handle             cancel [request, ...]
    read request handle [chunk, ...]    stream request handle [chunk, ...]    copy request handle chunk from +fd

A chunk is (index, offset, length, expected id or b""). From it, besides answers and errors to calls:

    got [[request, index, id, check, length, seconds, hashing, writing], ...]
    failed [[request, kind, detail, wait, class], ...]

One read is one attempt: when to try again, and whom to ask instead, is for the planner to say. What a read brings lies
in its client's own memory until it has landed, or in rooms that are used again. Its first chunks land while the last
ones are on their way: other hosts wait for each of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgpack
import uvloop

from weightcache.config import OriginConfig
from weightcache.core.events import Kind
from weightcache.core.landing import ChunkMismatch, Spent, land
from weightcache.core.layout import ChunkPlan, plan_from_head
from weightcache.core.manifest import encode_manifest, encode_plan
from weightcache.core.published import MAX_PUBLISHED_BYTES, check_head, decode_published, is_worth
from weightcache.core.snapshot import FileEntry, decode_snapshot, encode_snapshot
from weightcache.core.source import parse_source
from weightcache.errors import OriginUnavailable, WeightcacheError, to_wire
from weightcache.net.channel import close_all
from weightcache.net.memory_file import memory_file, read_memory_file
from weightcache.net.node_channel import ChannelClosed, NodeChannel
from weightcache.node.arrivals import Arrivals, Chunk, Whole
from weightcache.node.processes import usual_processes
from weightcache.node.rooms import Pieces, Rooms
from weightcache.origin import Origins

BESIDE_SECONDS = 2.0  # that a published manifest may come later than the header
LANDING_THREADS = max(2, usual_processes())  # hashing and writing release the interpreter's lock
REST_SECONDS = 1.0  # after the last of them until its memory is given back
Result = TypeVar("Result")


@dataclass(slots=True)
class _Target:
    entry: FileEntry
    fd: int


class _DiskError(WeightcacheError):
    """This host's own disk refused."""


class Reader:
    """The process' state: targets by handle, requests under way."""

    def __init__(self, channel: NodeChannel) -> None:
        self._channel = channel
        self._targets: dict[int, _Target] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(LANDING_THREADS, "land")
        self._pieces: Pieces | None = None
        self._origins: Origins | None = None

    async def serve(self) -> None:
        """Do what the node asks for until it is gone."""
        while (message := await self._channel.receive()) is not None:
            self._handle(message.fields, list(message.fds))
        tasks = [*self._tasks.values(), *self._calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._origins is not None:
            await self._origins.close()

    def _handle(self, message: list[Any], fds: list[int]) -> None:
        match message:
            case ["config", settings]:
                settings["file_roots"] = tuple(map(Path, settings["file_roots"]))
                config = OriginConfig(**settings)
                self._origins, self._pieces = Origins(config), Pieces(config.streams)
            case ["resolve", call, source]:
                self._call(call, self._resolve(source))
            case ["plan", call, file]:
                self._call(call, self._plan(decode_snapshot(file).files[0]))
            case ["publish", call, file, force]:
                data = read_memory_file(fds[0], MAX_PUBLISHED_BYTES)
                self._call(call, self._publish(decode_snapshot(file).files[0], data, force))
            case ["blob", handle, file]:
                self._targets[handle] = _Target(decode_snapshot(file).files[0], fds.pop())
            case ["close", handle]:
                if (target := self._targets.pop(handle, None)) is not None:
                    os.close(target.fd)
            case ["cancel", requests]:
                for request in requests:
                    if (task := self._tasks.pop(request, None)) is not None:
                        task.cancel()
            case ["read", request, handle, chunks]:
                self._start(request, self._read(request, self._targets[handle], [tuple(c) for c in chunks]))
            case ["stream", request, handle, chunks]:
                self._start(request, self._stream(request, self._targets[handle], [tuple(c) for c in chunks]))
            case ["copy", request, handle, chunk, begin]:
                read = self._thread(fd := fds.pop(), lambda: os.pread(fd, chunk[2], begin))
                self._start(request, self._copy(request, self._targets[handle], tuple(chunk), read))
        close_all(fds)

    # -- calls: one answer each

    def _call(self, call: int, work: Coroutine[Any, Any, bytes]) -> None:
        async def answer() -> None:
            try:
                fd = memory_file(await work)
            except Exception as error:  # noqa: BLE001 - every failure is the caller's to see
                self._post("error", call, *to_wire(error), _wait(error))
                return
            self._post("answer", call, fds=[fd])

        task = asyncio.ensure_future(answer())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        task.add_done_callback(lambda _: work.close())  # it may have been cancelled before its first step

    async def _resolve(self, source: str) -> bytes:
        assert self._origins is not None
        return encode_snapshot(await self._origins.resolve(parse_source(source)))

    async def _plan(self, entry: FileEntry) -> bytes:
        """[plan, published manifest or b"", why what is published is not believed]."""
        assert self._origins is not None
        looking = asyncio.ensure_future(self._origins.beside(entry)) if is_worth(entry) else None
        try:
            head = await self._origins.head(entry) if entry.size else None
            # A header may be 100 MB of JSON.
            plan = await asyncio.to_thread(plan_from_head, entry.size, head)
            answer = [encode_plan(plan), b"", ""]
            if looking is not None:
                try:
                    if (found := await asyncio.wait_for(looking, BESIDE_SECONDS)) is not None:
                        answer[1] = await asyncio.to_thread(_believed, found, entry, plan, head or b"")
                except (WeightcacheError, TimeoutError) as error:
                    answer[2] = str(error) or f"no answer within {BESIDE_SECONDS:g} s of the header's"
        finally:
            if looking is not None:
                looking.cancel()
        return bytes(msgpack.packb(answer))

    async def _publish(self, entry: FileEntry, data: bytes, force: bool) -> bytes:
        assert self._origins is not None
        return (await self._origins.publish(entry, data, force=force)).encode()

    # -- requests: chunks that end in a blob

    def _start(self, request: int, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await work
            except asyncio.CancelledError:
                pass
            except Exception as error:  # noqa: BLE001 - every failure routes by its kind
                self._post("failed", [[request, *_routed(error)]])
            finally:
                self._tasks.pop(request, None)
                if not self._tasks:
                    asyncio.get_running_loop().call_later(REST_SECONDS, self._rest)

        self._tasks[request] = task = asyncio.ensure_future(run())
        task.add_done_callback(lambda _: work.close())

    def _rest(self) -> None:
        """Give back what reads need, when there have been none for a while."""
        if not self._tasks and self._pieces is not None:
            self._pieces.rest()
            with contextlib.suppress(AttributeError):  # only glibc keeps what was freed, and only it has the call
                ctypes.CDLL(None).malloc_trim(0)

    async def _read(self, request: int, target: _Target, chunks: list[Chunk]) -> None:
        assert self._origins is not None
        assert self._pieces is not None
        began = time.monotonic()
        begin, end = chunks[0][1], chunks[-1][1] + chunks[-1][2]
        arrivals = Arrivals(chunks, began)
        landings: list[asyncio.Future[None]] = []
        with Rooms(self._pieces) as rooms:

            def came(piece: memoryview) -> None:
                if whole := arrivals.add(piece, time.monotonic()):
                    landings.append(self._land(request, target, whole, began, rooms))

            try:
                await self._origins.read(target.entry, begin, end, rooms.room, came)
            finally:
                await asyncio.gather(*landings)

    async def _stream(self, request: int, target: _Target, chunks: list[Chunk]) -> None:
        """Read the whole object in order and keep what is wanted of it."""
        assert self._origins is not None
        began = time.monotonic()
        wanted = sorted(chunks, key=lambda chunk: chunk[1])
        held, at = bytearray(), 0  # ``held`` begins at offset ``at``
        async for piece in self._origins.stream(target.entry):
            held += piece
            while wanted and at + len(held) >= wanted[0][1] + wanted[0][2]:
                chunk = wanted.pop(0)
                first = chunk[1] - at
                data = bytes(memoryview(held)[first : first + chunk[2]])
                await self._land(request, target, [(chunk, [memoryview(data)])], began)
                del held[: first + chunk[2]]
                at = chunk[1] + chunk[2]
            skip = min(len(held), (wanted[0][1] if wanted else target.entry.size) - at)
            del held[:skip]
            at += skip
        if wanted:
            raise OriginUnavailable(f"{target.entry.source.public}: the answer ended {len(wanted)} chunks early")

    async def _copy(self, request: int, target: _Target, chunk: Chunk, read: asyncio.Future[bytes]) -> None:
        began = time.monotonic()
        await self._land(request, target, [(chunk, [memoryview(await read)])], began)

    def _land(
        self, request: int, target: _Target, chunks: Whole, began: float, rooms: Rooms | None = None
    ) -> asyncio.Future[None]:
        """Land chunks one after the other, up to the first that fails; tell of all at once."""
        fd = os.dup(target.fd)  # at once: the blob may be closed before a thread is free
        landed: list[list[Any]] = []

        def work() -> None:
            for (index, offset, length, expected), pieces in chunks:
                spent = Spent()
                try:
                    name, check = land(fd, offset, pieces, expected, spent=spent)
                except OSError as error:
                    raise _DiskError(f"writing the store: {error.strerror}; see its disk") from None
                seconds = time.monotonic() - began
                landed.append([request, index, name, check, length, seconds, spent.hashing, spent.writing])

        landing = self._thread(fd, work)

        async def tell() -> None:
            try:
                await landing
            finally:
                if landed:
                    self._post("got", landed)
                if rooms is not None:
                    for _, pieces in chunks[: len(landed)]:
                        rooms.landed(pieces)

        return asyncio.ensure_future(tell())

    def _thread(self, fd: int, work: Callable[[], Result]) -> asyncio.Future[Result]:
        """Run ``work`` on ``fd`` in a thread. The descriptor is closed after it, also when it is cancelled first."""
        future = self._threads.submit(work)
        future.add_done_callback(lambda _: os.close(fd))
        return asyncio.wrap_future(future)

    def _post(self, *message: Any, fds: Sequence[int] = ()) -> None:
        with contextlib.suppress(ChannelClosed):
            self._channel.post(*message, fds=fds)


def _believed(found: bytes, entry: FileEntry, plan: ChunkPlan, head: bytes) -> bytes:
    """A manifest that was published, encoded, if it can be this file's. Raises FormatError."""
    manifest = decode_published(found, entry)
    check_head(manifest, plan, head)
    return encode_manifest(manifest)


def _wait(error: BaseException) -> float:
    """Seconds that the origin asked to be left alone for."""
    return (error.retry_after or 0.0) if isinstance(error, OriginUnavailable) else 0.0


def _routed(error: BaseException) -> tuple[str, str, float, str]:
    """A failure as (kind, detail, seconds to wait, class): what the planner routes by."""
    name, message = to_wire(error)
    if isinstance(error, ChunkMismatch):
        return Kind.MISMATCH, message, 0.0, "SourceChanged"
    if isinstance(error, OriginUnavailable):
        return Kind.UNAVAILABLE, message, _wait(error), name
    if isinstance(error, _DiskError):
        return Kind.FATAL, message, 0.0, "StoreError"
    if isinstance(error, WeightcacheError):
        return Kind.FATAL, message, 0.0, name
    return Kind.UNAVAILABLE, message, 0.0, "OriginUnavailable"


def run_reader(sock: socket.socket) -> None:
    """Run until the node at the other end is gone."""

    async def serve() -> None:
        await Reader(NodeChannel(sock)).serve()
        os._exit(0)  # reads under way would hold up a tidier end, and nobody waits for them

    uvloop.run(serve())
