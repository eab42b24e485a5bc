"""Brings single blobs: finds out who has one, learns its manifest, reserves its space, hands it to the transfers.

Each blob comes once however many want it: whoever comes later joins. Who brings a blob holds a lease on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from weightcache.core.components import rank
from weightcache.core.layout import MAX_CHUNKS
from weightcache.core.manifest import Manifest
from weightcache.core.snapshot import FileEntry
from weightcache.node.compare import contradiction
from weightcache.node.incoming import Incoming, Shared
from weightcache.node.manifests import Manifests
from weightcache.node.sharing import elsewhere
from weightcache.node.swarm import Peer, Place, State, Swarm
from weightcache.node.transfers import Transfers
from weightcache.node.trust import Trust
from weightcache.store import Store

PEERS_SECONDS = 1.0  # for which a load waits to hear what its peers have before it asks the origin


class Blobs:
    """The blobs of this host that are wanted now, and what peers say to have of them."""

    def __init__(self, store: Store, swarm: Swarm, manifests: Manifests, transfers: Transfers, trust: Trust) -> None:
        self._store = store
        self._swarm = swarm
        self._manifests = manifests
        self._transfers = transfers
        self._trust = trust
        self._states: dict[bytes, dict[bytes, State]] = {}  # wanted blob -> peer -> what it has
        self._wanting: dict[bytes, int] = {}  # wanted blob -> by how many
        self._locks: dict[bytes, asyncio.Lock] = {}
        self._asking: set[asyncio.Future[None]] = set()

    # -- who has what

    async def want(self, blobs: Sequence[bytes]) -> None:
        """Have peers tell what they have of blobs, until ``unwant``. Waits a moment for their answers."""
        for blob in blobs:
            self._wanting[blob] = self._wanting.get(blob, 0) + 1
            self._states.setdefault(blob, {})
        asking = asyncio.ensure_future(self._ask(blobs))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        await asyncio.wait([asking], timeout=PEERS_SECONDS)

    async def _ask(self, blobs: Sequence[bytes]) -> None:
        await self._swarm.settled()
        await self._swarm.want(blobs)

    def unwant(self, blobs: Sequence[bytes]) -> None:
        over = []
        for blob in blobs:
            self._wanting[blob] -= 1
            if not self._wanting[blob]:
                del self._wanting[blob], self._states[blob]
                over.append(blob)
        if over:
            self._swarm.unwant(over)

    def wants(self, blob: bytes) -> bool:
        return blob in self._wanting

    def peer_joined(self, peer: Peer) -> None:
        self._transfers.peer_joined(peer)
        if self._wanting:
            asking = asyncio.ensure_future(self._swarm.want(list(self._wanting), [peer]))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)

    def peer_left(self, peer: Peer) -> None:
        self._transfers.note(peer.id, f"peer {peer.name}: the connection to it was lost")
        self.forget(peer.id)

    def forget(self, peer: bytes) -> None:
        """What a peer said to have counts no more."""
        for states in self._states.values():
            states.pop(peer, None)
        self._transfers.peer_left(peer)

    def peer_state(self, peer: Peer, blob: bytes, state: State | None) -> None:
        """What a peer has of a blob now (None: nothing). A set that does not fit the blob is ignored, and logged."""
        if not self._listens(peer, blob):
            return
        states = self._states[blob]
        if state is None:
            states.pop(peer.id, None)
        else:
            if (before := states.get(peer.id)) is not None:  # some of it while this answer was on its way
                state.got += before.got
                if state.reads is not None:
                    state.reads += before.reads or []
            states[peer.id] = state
        self._transfers.peer_state(peer.id, blob, state)

    def peer_got(self, peer: Peer, blob: bytes, chunks: Sequence[int]) -> None:
        if self._listens(peer, blob):
            if self._transfers.incoming(blob) is None:  # not yet: it will want to know
                _keep(self._states[blob].setdefault(peer.id, State()).got, chunks)
            self._transfers.peer_got(peer.id, blob, chunks)

    def peer_reads(self, peer: Peer, blob: bytes, chunks: Sequence[int]) -> None:
        """A peer loads a blob, and has begun to read these chunks from the origin."""
        if self._listens(peer, blob):
            state = self._states[blob].setdefault(peer.id, State())
            state.reads = state.reads or []
            if self._transfers.incoming(blob) is None:
                _keep(state.reads, chunks)
            self._transfers.peer_reads(peer.id, blob, chunks)

    def peer_quits(self, peer: Peer, blob: bytes) -> None:
        """It does not load it any more; what it has it still has."""
        if self._listens(peer, blob) and peer.id in self._states[blob]:
            self._states[blob][peer.id].reads = None
            self._transfers.peer_quits(peer.id, blob)

    def _listens(self, peer: Peer, blob: bytes) -> bool:
        """Whether it matters here what a peer says of a blob."""
        return blob in self._states and peer.bulk is not None and not self._trust.is_liar(peer.id)

    # -- bringing one

    async def bring(self, entry: FileEntry) -> Incoming | None:
        """Lease a blob and start bringing what is missing of it; None: all of it is here.

        ``want`` it first. Raises StoreFull, OriginUnavailable and their kin; the lease is then given back.
        """
        self._store.lease(entry.blob)
        lock = self._locks.setdefault(entry.blob, asyncio.Lock())
        try:
            async with lock:
                return await self._bring(entry)
        except BaseException:
            self._store.release(entry.blob)
            raise
        finally:
            if not lock.locked() and self._locks.get(entry.blob) is lock:
                del self._locks[entry.blob]

    async def _bring(self, entry: FileEntry) -> Incoming | None:
        blob = entry.blob
        coming = self._transfers.incoming(blob)
        if coming is None:
            info = self._store.info(blob)
            if info is not None and info.suspect:
                await asyncio.to_thread(self._store.recheck, blob)
                self._swarm.rolls.tell([blob])
                info = self._store.info(blob)
            if info is not None and info.state == "complete":
                return None
            coming = await self._begin(entry)
        if coming is not None:
            coming.users += 1
        return coming

    async def manifest(self, entry: FileEntry) -> Manifest:
        """What is known of a wanted blob's chunks, by this host, its peers, its publisher, or its header alone."""
        return (await self._manifests.find(entry, self._states.get(entry.blob, {}))).manifest

    async def _begin(self, entry: FileEntry) -> Incoming | None:
        blob = entry.blob
        known = await self._manifests.find(entry, self._states.get(blob, {}))
        manifest, teller = known.manifest, known.teller
        claimed = teller is not None or known.published
        info = await asyncio.to_thread(self._store.create, manifest, entry.path, private=entry.source.is_local)
        if info.state == "complete":  # it is empty, or its very bytes are here under another name
            why = await asyncio.to_thread(contradiction, self._store, entry) if claimed else ""
            if why:
                await asyncio.to_thread(self._store.discard, blob)
                self._transfers.contradicted(entry, [teller] if teller is not None else [], ())
                return await self._begin(entry)  # without this teller
            return None
        local, unknown = await asyncio.to_thread(self._elsewhere, manifest)
        whole = any(state.has is True for state in self._states.get(blob, {}).values())
        shared: Shared = {}
        if unknown and not whole:
            shared = await elsewhere(self._swarm, unknown)
            local, unknown = await asyncio.to_thread(self._elsewhere, manifest)  # some may have come meanwhile
        level, states = rank(entry.path, entry.size), self._states.get(blob, {})
        coming = self._transfers.begin(entry, manifest, level, states, local, unknown, shared)
        if teller is not None:
            coming.teller = teller
            coming.claims.add(teller)
        if known.why:
            coming.unused = f"published manifest: not used: {known.why}"
        return coming

    def _elsewhere(self, manifest: Manifest) -> tuple[dict[int, Place], dict[int, bytes]]:
        """The missing chunks whose ids are known: where other blobs of this host have them, and which have none."""
        local: dict[int, Place] = {}
        unknown: dict[int, bytes] = {}
        for chunk in self._store.had(manifest.blob).missing():
            if (name := manifest.id(chunk)) is not None:
                if (place := self._store.find_chunk(name)) is not None:
                    local[chunk] = place
                else:
                    unknown[chunk] = name
        return local, unknown

    def leave(self, coming: Incoming) -> None:
        """One user less; a blob that nobody waits for is not brought any further. What is had stays had."""
        coming.users -= 1
        if not coming.users:
            self._transfers.abandon(coming)

    async def repair(self, entry: FileEntry) -> Incoming | None:
        """Bring again what was found bad of a blob, and wait for it."""
        await self.want([entry.blob])
        try:
            coming = await self.bring(entry)
            try:
                if coming is not None:
                    await asyncio.shield(coming.done)
                return coming
            finally:
                if coming is not None:
                    self.leave(coming)
                self._store.release(entry.blob)
        finally:
            self.unwant([entry.blob])


def _keep(kept: list[int], chunks: Sequence[int]) -> None:
    """As long as nobody repeats himself without end."""
    if len(kept) + len(chunks) <= MAX_CHUNKS:
        kept.extend(chunks)
