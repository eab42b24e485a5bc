"""What this host has learned of sources, kept in the fleet's directory for those who come later.

A datacenter that has just been started has no peers that know anything: from there it hears how a source resolved, and
what the chunks of a file are, before its first byte. It is a peer's word, as good as any: hashed against, and compared
with what the origin states.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from weightcache.core.layout import CUT
from weightcache.core.manifest import Manifest, encode_manifest
from weightcache.core.snapshot import FileEntry, Snapshot, adopt, decode_snapshot, encode_snapshot
from weightcache.core.source import Source
from weightcache.directory import Registry, manifest_name, snapshot_name
from weightcache.errors import FormatError
from weightcache.log import fields
from weightcache.store import Store

log = logging.getLogger(__name__)


def is_shared(source: Source) -> bool:
    """Whether others may hear of a source: a path means something else on every host, and a query may be a secret."""
    return source.scheme != "file" and not source.query


class Teacher:
    """``registry()`` is the directory that keeps things, if there is one; nothing but ``snapshot`` waits for it."""

    def __init__(self, store: Store, registry: Callable[[], Registry | None]) -> None:
        self._store = store
        self._registry = registry
        self._teaching: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._teaching:
            task.cancel()
        await asyncio.gather(*self._teaching, return_exceptions=True)

    def resolved(self, snapshot: Snapshot) -> None:
        """The origin has told what a source is."""
        if (registry := self._registry()) is not None and is_shared(snapshot.source):
            self._spawn(self._teach_snapshot(registry, snapshot))

    def settled(self, entry: FileEntry) -> None:
        """All of a file is had, and nothing that is known of it contradicts its origin."""
        worth = entry.size >= CUT and not entry.version.startswith("once:") and is_shared(entry.source)
        if (registry := self._registry()) is not None and worth:
            self._spawn(self._teach_manifest(registry, entry.blob))

    async def snapshot(self, source: Source) -> Snapshot | None:
        """What others in the fleet found a source to be."""
        registry = self._registry()
        data = await registry.learned(snapshot_name(str(source))) if registry is not None else None
        if data is None:
            return None
        try:
            return await asyncio.to_thread(lambda: adopt(decode_snapshot(data), source, time.time()))
        except FormatError as error:
            log.warning("learned snapshot ignored", extra=fields(source=source.public, why=str(error)))
            return None

    async def _teach_snapshot(self, registry: Registry, snapshot: Snapshot) -> None:
        data = await asyncio.to_thread(encode_snapshot, snapshot)
        await registry.teach(snapshot_name(str(snapshot.source)), data)

    async def _teach_manifest(self, registry: Registry, blob: bytes) -> None:
        manifest = await asyncio.to_thread(self._store.manifest, blob)
        if manifest is not None and manifest.complete:
            bare = Manifest(blob, manifest.plan, bytes(manifest.ids))  # the same bytes whoever teaches it
            await registry.teach(manifest_name(blob), encode_manifest(bare))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._teaching.add(task)
        task.add_done_callback(self._teaching.discard)
