"""Where a blob's chunk ids are known from before anything of it is read: this store, a peer, whoever published them.

Asked in this order: this host's store; peers that have some of the blob; the fleet's directory; beside the object at
its origin, in the same breath as the header, which gives the plan in any case. What a peer has read itself is its
word, and it answers for it. What was published, and ids that a peer merely passes on, are nobody's word here: chunks
are hashed against them, and when the origin has other bytes, they are forgotten and not believed again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weightcache.core.manifest import Manifest, decode_manifest
from weightcache.core.published import MAX_PUBLISHED_BYTES, fitting, is_worth
from weightcache.core.snapshot import FileEntry
from weightcache.directory import Registry, manifest_name
from weightcache.errors import FormatError
from weightcache.node.calls import OriginCalls
from weightcache.node.swarm import State, Swarm
from weightcache.node.trust import Trust
from weightcache.store import Store

MANIFEST_PEERS = 3  # that are asked for a manifest before the origin is
REGISTRY_SECONDS = 2.0
MAX_DOUBTED = 4096  # blobs


@dataclass(frozen=True, slots=True)
class Known:
    """A manifest. ``teller``: the peer whose word it is; ``published``: it is nobody's, though it has ids; ``why``
    something published is not used."""

    manifest: Manifest
    teller: bytes | None = None
    published: bool = False
    why: str = ""


class Manifests:
    """Finds them. ``registry()`` is the directory that keeps some, if there is one."""

    def __init__(
        self,
        store: Store,
        swarm: Swarm,
        calls: OriginCalls,
        trust: Trust,
        registry: Callable[[], Registry | None],
    ) -> None:
        self._store = store
        self._swarm = swarm
        self._calls = calls
        self._trust = trust
        self._registry = registry
        self._doubted: dict[bytes, None] = {}

    def doubt(self, blob: bytes) -> None:
        """The origin contradicts what was published of a blob: nothing of that kind is believed of it any more."""
        self._doubted[blob] = None
        if len(self._doubted) > MAX_DOUBTED:
            del self._doubted[next(iter(self._doubted))]

    async def find(self, entry: FileEntry, states: Mapping[bytes, State]) -> Known:
        """What is known of a file's chunks. ``states``: what peers have of it."""
        if (manifest := self._store.manifest(entry.blob)) is not None:
            return Known(manifest)
        if (known := await self._of_peers(entry, states)) is not None:
            return known
        published, why = await self._of_registry(entry)
        if published is not None:
            return Known(published, published=True)
        manifest, beside, reason = await self._calls.plan(entry)
        if entry.blob in self._doubted:
            manifest.forget(range(len(manifest)))
            beside, reason = False, "what was published of it is not what its origin has"
        return Known(manifest, published=beside, why=reason or why)

    async def _of_peers(self, entry: FileEntry, states: Mapping[bytes, State]) -> Known | None:
        """A manifest that fits the file, from a peer that has it all or, failing that, some of it."""
        holders = sorted((peer for peer in states if states[peer].has), key=lambda peer: states[peer].has is not True)
        for peer_id in holders[:MANIFEST_PEERS]:
            peer = self._swarm.peers.get(peer_id)
            if peer is None or self._trust.rest(peer_id):
                continue
            told = await self._swarm.manifest(peer, entry.blob)
            if told is None or (not told[1] and entry.blob in self._doubted):
                continue
            try:
                manifest = await asyncio.to_thread(decode_manifest, told[0])
                if manifest.blob != entry.blob or manifest.size != entry.size:
                    raise FormatError("it is another blob's")
            except FormatError as error:
                self._trust.lied(peer_id, peer.name, f"its manifest of {entry.path} is none: {error}")
                continue
            manifest.checked = False  # by whom? This host has yet to see for itself
            return Known(manifest, peer_id) if told[1] else Known(manifest, published=True)
        return None

    async def _of_registry(self, entry: FileEntry) -> tuple[Manifest | None, str]:
        """A manifest that the fleet's directory keeps, or why one that it keeps is of no use."""
        registry = self._registry()
        if registry is None or not is_worth(entry) or entry.blob in self._doubted or entry.source.is_local:
            return None, ""
        try:
            data = await asyncio.wait_for(registry.learned(manifest_name(entry.blob)), REGISTRY_SECONDS)
            if data is None:
                return None, ""
            if len(data) > MAX_PUBLISHED_BYTES:
                raise FormatError(f"{len(data)} bytes")
            return await asyncio.to_thread(fitting, data, entry), ""
        except (FormatError, TimeoutError) as error:
            return None, f"in the fleet's directory: {error or 'no answer'}"
