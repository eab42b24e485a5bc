"""All origins as one: by scheme, within the allow-list, with the starts of files kept for whoever reads them next."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing

from weightcache.config import OriginConfig
from weightcache.core.ids import Buffer
from weightcache.core.layout import head_length
from weightcache.core.published import MAX_PUBLISHED_BYTES, beside, differs
from weightcache.core.snapshot import FileEntry, Snapshot
from weightcache.core.source import Source
from weightcache.errors import SourceDenied
from weightcache.origin.base import Came, Origin, Room, pieces, read_whole, unwritable
from weightcache.origin.policy import Policy

FIRST_READ = 256 << 10  # bytes: holds the header of nearly every file, and most small files whole
KEPT = 16 << 20  # bytes of starts of files kept at most
MISS_SECONDS = 60.0
MISSES = 4096  # remembered at most


class Origins:
    """What a node uses: each source goes to the backend of its scheme, which is built when it is first needed.

    The starts that ``head`` reads are kept (at most KEPT bytes), so that a header, and a small file altogether, leaves
    its origin once.
    """

    def __init__(self, config: OriginConfig) -> None:
        self._config = config
        self._policy = Policy(config.allow)
        self._backends: dict[str, Origin] = {}
        self._starts: OrderedDict[bytes, bytes] = OrderedDict()
        self._misses: OrderedDict[bytes, float] = OrderedDict()  # blob -> until when nothing is published beside it

    async def resolve(self, source: Source) -> Snapshot:
        """What the source is now: its files, with their sizes and versions. Raises as ``Origin`` says."""
        return await self._backend(source).resolve(source)

    async def head(self, entry: FileEntry) -> bytes | None:
        """The bytes of a safetensors file that hold length and JSON; None when the entry is no such file.

        One read of FIRST_READ bytes, and another when the header is longer. What is not ``ranged`` is streamed only
        as far: the connection is dropped there, and no second transfer takes place.
        """
        start = self._starts.get(entry.blob) or await self._start(entry, min(FIRST_READ, entry.size))
        length = head_length(start, entry.size)
        if length and length > len(start):
            start = await self._start(entry, length, start)
        self._keep(entry.blob, start)
        return start[:length] if length else None

    async def read(self, entry: FileEntry, begin: int, end: int, room: Room, came: Came) -> None:
        """Bytes [begin, end) of exactly that version, as ``Origin`` says. What ``head`` kept is not read."""
        backend = self._backend(entry.source)
        start = memoryview(self._starts.get(entry.blob, b""))[begin:end]
        if start:
            came(start)
        if len(start) < end - begin:
            await backend.read(entry, begin + len(start), end, room, came)

    async def stream(self, entry: FileEntry) -> AsyncGenerator[Buffer, None]:
        """The whole of that version from byte 0, in pieces of at most 1 MiB: for entries that are not ``ranged``."""
        backend = self._backend(entry.source)
        start = self._starts.get(entry.blob, b"")
        if len(start) == entry.size:
            for part in pieces(start):
                yield part
            return
        async with aclosing(backend.stream(entry)) as stream:
            async for piece in stream:
                yield piece

    async def beside(self, entry: FileEntry) -> bytes | None:
        """What was published beside a file, or None; that there was nothing is remembered for MISS_SECONDS."""
        if not self._config.manifests or self._misses.get(entry.blob, 0.0) > time.monotonic():
            return None
        found = None
        try:
            found = await self._backend(beside(entry.source)).beside(entry, MAX_PUBLISHED_BYTES)
        except SourceDenied:
            pass  # not allow-listed; or a store that tells only who may list what there is not
        finally:
            if found is None:
                self._misses[entry.blob] = time.monotonic() + MISS_SECONDS
                if len(self._misses) > MISSES:
                    self._misses.popitem(last=False)
        return found

    async def publish(self, entry: FileEntry, data: bytes, *, force: bool) -> str:
        """Put ``data`` beside a file: "published", "replaced", or "same" when it is there already.

        Raises SourceError when something else is there, unless ``force``.
        """
        backend = self._backend(beside(entry.source))
        for _ in range(2):  # somebody else may have been first
            try:
                there = await backend.beside(entry, MAX_PUBLISHED_BYTES)
            except SourceDenied:  # that may also mean: there is nothing
                there = None
            if there == data:
                return "same"
            if there is not None and not force:
                raise differs(beside(entry.source).public, there, entry)
            if await backend.publish(entry, data, replace=there is not None):
                self._misses.pop(entry.blob, None)
                return "published" if there is None else "replaced"
        raise unwritable(entry, "something is there that cannot be read")

    async def close(self) -> None:
        """Close every backend that was used."""
        for backend in {id(backend): backend for backend in self._backends.values()}.values():
            await backend.close()
        self._backends.clear()

    async def _start(self, entry: FileEntry, length: int, known: bytes = b"") -> bytes:
        """The first ``length`` bytes of an entry, of which ``known`` have been read before."""
        backend = self._backend(entry.source)
        if length <= len(known):
            return known
        if entry.ranged:
            return known + await read_whole(backend, entry, len(known), length)
        data = bytearray()
        async with aclosing(backend.stream(entry)) as stream:
            async for piece in stream:
                data += piece
                if len(data) >= length:
                    break
        return bytes(data[:length])

    def _keep(self, blob: bytes, start: bytes) -> None:
        self._starts[blob] = start
        self._starts.move_to_end(blob)
        while sum(map(len, self._starts.values())) > KEPT:
            self._starts.popitem(last=False)

    def _backend(self, source: Source) -> Origin:
        self._policy.admit(source)
        backend = self._backends.get(source.scheme)
        if backend is None:
            backend = self._backends[source.scheme] = self._build(source.scheme)
        return backend

    def _build(self, scheme: str) -> Origin:
        if scheme in ("s3", "gs", "az"):
            from weightcache.origin.objects import ObjectOrigin

            return ObjectOrigin(self._config)
        if scheme in ("https", "http"):
            from weightcache.origin.http import HttpOrigin

            return HttpOrigin(self._config, self._policy.admit)
        if scheme == "hf":
            from weightcache.origin.hub import HubOrigin

            return HubOrigin(self._config)
        from weightcache.origin.files import FileOrigin

        return FileOrigin(self._config)
