"""Publishing: the manifests of a source that is here, put where the next host to load it finds them first.

beside   with the object at its origin, as NAME.weightcache: for every fleet that reads it
fleet    in the fleet's directory
file     handed to whoever asked, to be put somewhere
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any, Literal

from weightcache.core.manifest import encode_manifest
from weightcache.core.published import SUFFIX, WORTH, decode_published, encode_published, fitting, is_worth
from weightcache.core.snapshot import FileEntry, Snapshot
from weightcache.directory import Registry, manifest_name
from weightcache.errors import (
    ConfigError,
    FormatError,
    OriginUnavailable,
    SourceError,
    UnknownBlob,
    WeightcacheError,
    to_wire,
)  # fmt: skip
from weightcache.node.calls import OriginCalls
from weightcache.store import Store

PLACES = ("beside", "fleet", "file")
Place = Literal["beside", "fleet", "file"]
Json = dict[str, Any]


class Publisher:
    """Publishes what this host has whole. ``registry()`` is the fleet's directory, if one keeps things."""

    def __init__(self, store: Store, calls: OriginCalls, registry: Callable[[], Registry | None]) -> None:
        self._store = store
        self._calls = calls
        self._registry = registry

    def check(self, place: str) -> Place:
        """Raise ConfigError for what is no place, or none of this host."""
        if place not in PLACES:
            raise ConfigError(f"publish: {place!r} is no place; there are {', '.join(PLACES)}")
        if place == "fleet" and self._registry() is None:
            raise ConfigError(
                "publish: this fleet's directory keeps nothing; set discover to redis://HOST on every host, or "
                "publish with --to beside or --to FILE"
            )
        return place  # type: ignore[return-value]

    def files(self, snapshot: Snapshot) -> list[FileEntry]:
        """The files of a snapshot that are worth it, each content once. Raises SourceError when none is."""
        files = {entry.blob: entry for entry in snapshot.files if is_worth(entry)}
        if not files:
            once = any(entry.version.startswith("once:") for entry in snapshot.files)
            why = "its origin states nothing to tell its versions apart" if once else f"no file has {WORTH} bytes"
            raise SourceError(f"{snapshot.source.public}: {why}: there is nothing to publish")
        return list(files.values())

    async def publish(self, entry: FileEntry, place: Place, *, force: bool) -> Json:
        """Publish one file's manifest; what came of it: "published", "replaced", "same", or "error" and the message."""
        outcome: Json = {
            "path": entry.path,
            "source": entry.source.public,
            "version": entry.version,
            "size": entry.size,
        }
        try:
            data = await asyncio.to_thread(self._encoded, entry)
            outcome |= {"bytes": len(data), "blob": entry.blob.hex()}
            match place:
                case "beside":
                    state = await self._calls.publish(entry, data, force=force)
                    outcome["to"] = f"{entry.source.public}{SUFFIX}"
                case "fleet":
                    state = await self._teach(entry, data, force)
                    outcome["to"] = "fleet"
                case "file":
                    state, outcome["data"] = "published", base64.b64encode(data).decode()
        except WeightcacheError as error:
            name, message = to_wire(error)
            return outcome | {"state": "error", "error": name, "message": message}
        return outcome | {"state": state}

    def _encoded(self, entry: FileEntry) -> bytes:
        manifest = self._store.manifest(entry.blob)
        if manifest is None or not manifest.complete:
            raise UnknownBlob(f"{entry.source.public}: not whole in the store any more; publish it again")
        return encode_published(entry, manifest)

    async def _teach(self, entry: FileEntry, data: bytes, force: bool) -> str:
        registry = self._registry()
        assert registry is not None  # see check
        if entry.source.is_local:
            raise SourceError(f"{entry.source.public}: a path means something else on every host; publish it beside")
        name = manifest_name(entry.blob)
        ours = decode_published(data, entry)
        before = await registry.learned(name)
        if before is not None:
            try:
                theirs = fitting(before, entry)
                if theirs.ids == ours.ids and theirs.plan == ours.plan:
                    return "same"
                why = "it says otherwise of this very version"
            except FormatError as error:
                why = str(error)
            if not force:
                raise SourceError(f"{entry.source.public}: the fleet has one already: {why}; replace it with --force")
        if not await registry.teach(name, encode_manifest(ours)):
            why = registry.trouble or "it did not take it"
            raise OriginUnavailable(f"the fleet's directory: {why}; try again")
        return "published" if before is None else "replaced"
