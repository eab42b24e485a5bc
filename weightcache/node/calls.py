"""Questions to the ``origin`` process that have one answer, and the patience to ask them again."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgpack

from weightcache.core.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest, decode_plan
from weightcache.core.snapshot import MAX_SNAPSHOT_BYTES, FileEntry, Snapshot, decode_snapshot
from weightcache.core.source import Source
from weightcache.errors import OriginUnavailable, from_wire
from weightcache.net.channel import close_all
from weightcache.net.memory_file import memory_file, read_memory_file
from weightcache.node.incoming import one_file
from weightcache.node.processes import BulkProcess

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
LONGEST_WAIT = 10.0  # seconds that an origin may ask to be left alone for, and is

Answer = TypeVar("Answer")


class OriginCalls:
    """``resolve``, ``plan`` and ``publish``, asked of the reader."""

    def __init__(self, reader: BulkProcess, attempts: int) -> None:
        self._reader = reader
        self._attempts = attempts
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}

    async def resolve(self, source: Source) -> Snapshot:
        """What the origin states the source to be. Raises SourceError and its kin, OriginUnavailable at the last."""
        return decode_snapshot(await self._patiently(lambda: self._call("resolve", str(source))))

    async def plan(self, entry: FileEntry) -> tuple[Manifest, bool, str]:
        """What the origin tells of a file's chunks: at least the plan, from its header.

        Also whether their ids are known, from a manifest that was published beside it, and why such a one was not
        believed.
        """
        answer = await self._patiently(lambda: self._call("plan", one_file(entry)))
        plan, published, why = msgpack.unpackb(answer)
        if published:
            return await asyncio.to_thread(decode_manifest, published), True, ""
        return Manifest(entry.blob, decode_plan(plan)), False, why

    async def publish(self, entry: FileEntry, data: bytes, *, force: bool) -> str:
        """Put a published manifest beside its object; see ``Origins.publish``."""

        def ask() -> Awaitable[bytes]:
            return self._call("publish", one_file(entry), force, fds=[memory_file(data)])

        return (await self._patiently(ask)).decode()

    async def _call(self, kind: str, *arguments: Any, fds: Sequence[int] = ()) -> bytes:
        number = next(self._numbers)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._reader.start()
        self._reader.send(kind, number, *arguments, fds=fds)
        try:
            return await future
        finally:
            self._waiting.pop(number, None)

    async def _patiently(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Bounded retries with growing, jittered pauses, of what a retry may mend."""
        pause = FIRST_PAUSE
        for attempt in itertools.count(1):
            try:
                return await ask()
            except OriginUnavailable as error:
                if attempt >= self._attempts:
                    raise OriginUnavailable(f"{error} (asked {attempt} times)") from None
                wait = min(error.retry_after or 0.0, LONGEST_WAIT)
            await asyncio.sleep(max(wait, pause * random.uniform(0.5, 1.5)))
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("count has no end")

    def heard(self, message: list[Any], fds: tuple[int, ...]) -> bool:
        """A message of the reader; whether it answers a call. Takes over its descriptors if so."""
        match message:
            case ["answer", number]:
                data = read_memory_file(fds[0], max(MAX_SNAPSHOT_BYTES, 2 * MAX_MANIFEST_BYTES))
                close_all(fds)
                if (future := self._waiting.get(number)) is not None and not future.done():
                    future.set_result(data)
            case ["error", number, name, text, wait]:
                error = from_wire(name, text)
                if isinstance(error, OriginUnavailable):
                    error.retry_after = wait
                if (future := self._waiting.get(number)) is not None and not future.done():
                    future.set_exception(error)
            case _:
                return False
        return True

    def died(self, reason: str) -> None:
        """The reader has ended by itself."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(OriginUnavailable(reason))
