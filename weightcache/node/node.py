"""One host: store, peers, origin and bulk processes, wired together.

The daemon puts HTTP in front of it; a worker without a daemon runs one of its own (``serve=False``: it asks peers and
origins, and serves nobody).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weightcache.address import without_secrets
from weightcache.config import Address, Config, cluster_key, parse_address
from weightcache.core.manifest import Manifest, encode_manifest
from weightcache.core.patterns import EVERYTHING, Patterns
from weightcache.core.snapshot import FileEntry, Snapshot, encode_snapshot
from weightcache.core.source import Source, parse_source
from weightcache.directory import Directory, Member, Registry, View, open_directory, registry_of
from weightcache.errors import UnknownBlob
from weightcache.log import fields
from weightcache.node.blobs import Blobs
from weightcache.node.calls import OriginCalls
from weightcache.node.incoming import Incoming
from weightcache.node.loading import Had, Loading, selected
from weightcache.node.manifests import Manifests
from weightcache.node.processes import BulkProcess, pids, usual_processes
from weightcache.node.publishing import Publisher
from weightcache.node.receivers import Receivers
from weightcache.node.report import Ended, Tally
from weightcache.node.resolver import Resolver
from weightcache.node.serving import Serving
from weightcache.node.swarm import Info, Peer, Place, State, Swarm
from weightcache.node.teaching import Teacher, is_shared
from weightcache.node.transfers import Transfers
from weightcache.node.trust import Trust
from weightcache.node.upkeep import Upkeep
from weightcache.origin.policy import Policy
from weightcache.store import Store
from weightcache.version import __version__

log = logging.getLogger(__name__)


class Node:
    """One host. ``start`` it on a running event loop, ``stop`` it there."""

    def __init__(self, config: Config, *, serve: bool = True) -> None:
        self.config = config
        self._serve = serve
        self._directory: Directory | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Open the store, listen, announce. Raises ConfigError, StoreError, DaemonError, and leaves nothing running."""
        config = self.config
        config.validate()
        key = cluster_key(config)
        policy = Policy(config.origin.allow)
        self.store = await asyncio.to_thread(Store.open, config.store, config.capacity)
        self._began = time.monotonic()
        self.ended = Ended()
        self.trust = Trust(self._lied)
        self.swarm = Swarm(self.store.node_id, key, self, self.trust, remote="remote" in config.prefer)
        self._teacher = Teacher(self.store, self._registry)
        settings = {"key": key or b"", "node_id": self.store.node_id}
        origin = asdict(config.origin) | {"file_roots": [str(root) for root in config.origin.file_roots]}
        receiving = settings | {"streams": config.peer_streams}
        count = config.bulk_processes or usual_processes()
        self._receivers = Receivers(count, receiving, self._heard_receiver, self._lost)
        self._reader = BulkProcess("origin", origin, self._heard_reader, self._reader_died)
        self._calls = OriginCalls(self._reader, config.origin.attempts)
        self.transfers = Transfers(
            self.store, self._receivers, self._reader, config, self._had, self._reads, self._doubted, self.swarm.peers,
            self.trust,
        )  # fmt: skip
        self._manifests = Manifests(self.store, self.swarm, self._calls, self.trust, self._registry)
        self.blobs = Blobs(self.store, self.swarm, self._manifests, self.transfers, self.trust)
        self.publisher = Publisher(self.store, self._calls, self._registry)
        self.resolver = Resolver(
            self.store, self.swarm, self._calls, self.trust, self._teacher, policy.admit, config.fresh
        )
        self.serving = Serving(self.store, settings, count, config.serve_bandwidth)
        self.upkeep = Upkeep(self.store, self.blobs, self.transfers, self.serving, self.swarm, self._teacher)
        try:
            await self._join(parse_address(config.listen), key)
        except BaseException:
            await self.stop()
            raise

    async def _join(self, listen: Address, key: bytes | None) -> None:
        config = self.config
        control = bulk = ""
        if self._serve:
            port = self.swarm.listen(listen)
            bulk_port = self.serving.listen(Address(listen.host, port + 1 if listen.port else 0))
            self.address = Address(config.advertised, port)
            control, bulk = str(self.address), str(Address(config.advertised, bulk_port))
        else:
            self.address = Address(config.advertised, 0)
        await self.swarm.introduce(Info(config.datacenter, control, bulk, __version__))
        self._directory = open_directory(config, key)
        me = Member(self.address.host, self.address.port, self.store.node_id)
        self.swarm.rolls.registry = registry_of(self._directory)
        await self._directory.start(me, self._members_changed)
        self.swarm.rolls.tell(info.blob for info in self.store.blobs())
        self.upkeep.resume()
        log.info("node started", extra=fields(store=str(config.store), listen=control, bulk=bulk))

    async def stop(self) -> None:
        """Stop everything. Loads that run end with an error; what they had stays had."""
        self.store.interrupt()
        if self._directory is not None:
            await self._directory.close()
        await self._teacher.close()
        await self.upkeep.close()
        self.transfers.close()
        await self.swarm.close()
        await asyncio.gather(self.serving.close(), self._receivers.stop(), self._reader.stop())
        try:
            await asyncio.to_thread(self.store.close)
        except RuntimeError:  # the interpreter ends: it lends no more threads, and nobody else needs this loop
            self.store.close()

    def _registry(self) -> Registry | None:
        return self.swarm.rolls.registry

    def _members_changed(self, view: View) -> None:
        self.swarm.members(view)

    # -- what bulk processes say

    def _heard_receiver(self, message: list[Any]) -> None:
        self.transfers.heard("recv", message)

    def _heard_reader(self, message: list[Any], fds: tuple[int, ...]) -> None:
        if not self._calls.heard(message, fds):
            self.transfers.heard("origin", message)

    def _lost(self, requests: Collection[int], reason: str) -> None:
        self.transfers.lost(requests, reason)

    def _reader_died(self, reason: str) -> None:
        self._calls.died(reason)
        self.transfers.reader_died(reason)

    def _lied(self, peer: bytes) -> None:
        # Later: it may be the planner's own actions that led here.
        asyncio.get_running_loop().call_soon(self.blobs.forget, peer)

    def _had(self, coming: Incoming, chunk: int, name: bytes) -> None:
        """A chunk is had: who serves, who listens."""
        self.serving.had(coming.blob, chunk, name)
        if coming.had.is_full:
            self.swarm.announce_state(coming.blob, has=True)
            self.upkeep.completed(coming)
        else:
            self.swarm.announce(coming.blob, chunk)

    def _reads(self, coming: Incoming, chunks: Sequence[int]) -> None:
        """Reading from the origin has begun: peers need not do the same; or (no chunks) has ended."""
        self.swarm.announce_reads(coming.blob, chunks)

    def _doubted(self, blob: bytes) -> None:
        """What was published of a blob is wrong, and some of what was had of it by that may be had no more."""
        self._manifests.doubt(blob)
        self.swarm.announce_state(blob, has=False)
        self._spawn(self.serving.drop(blob))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- what the swarm asks of this host (Shelf)

    def find(self, source: str) -> bytes | None:
        parsed = parse_source(source)
        snapshot = self.store.find_snapshot(parsed) if is_shared(parsed) else None
        return encode_snapshot(snapshot) if snapshot is not None else None

    def state(self, blob: bytes) -> State | None:
        info = self.store.info(blob)
        if not self._serve or (info is not None and info.private):
            return None
        reads = self.transfers.reading(blob) if self.blobs.wants(blob) else None
        if info is None or info.suspect:
            return State(reads=reads) if reads is not None else None
        return State(True) if info.state == "complete" else State(self.store.had(blob).encode(), reads)

    def manifest(self, blob: bytes) -> tuple[bytes, bool] | None:
        info = self.store.info(blob)
        told = self._serve and info is not None and not info.suspect and not info.private
        manifest = self.store.manifest(blob) if told else None
        if manifest is None:
            return None
        return encode_manifest(manifest), not any(manifest.id(chunk) for chunk in self.store.had(blob).missing())

    def places(self, ids: Sequence[bytes]) -> list[Place | None]:
        return [self.store.find_chunk(name, for_peers=True) if self._serve else None for name in ids]

    def peer_joined(self, peer: Peer) -> None:
        if peer.bulk is not None:
            self._receivers.start()  # a first load should not wait for a process
        self.blobs.peer_joined(peer)

    def peer_left(self, peer: Peer) -> None:
        self.blobs.peer_left(peer)

    def peer_state(self, peer: Peer, blob: bytes, state: State | None) -> None:
        self.blobs.peer_state(peer, blob, state)

    def peer_got(self, peer: Peer, blob: bytes, chunks: Sequence[int]) -> None:
        self.blobs.peer_got(peer, blob, chunks)

    def peer_reads(self, peer: Peer, blob: bytes, chunks: Sequence[int]) -> None:
        self.blobs.peer_reads(peer, blob, chunks)

    def peer_quits(self, peer: Peer, blob: bytes) -> None:
        self.blobs.peer_quits(peer, blob)

    # -- what clients ask of this host

    def load(
        self, source: str, on_had: Had | None = None, *, revalidate: bool = False, patterns: Patterns = EVERYTHING
    ) -> Loading:
        """A load of ``source``, to be entered with ``async with``. Raises SourceError for what is no source."""
        asked = parse_source(source)
        return Loading(
            asked, self.store, self.blobs, self.resolver, self.trust, self.ended, on_had,
            revalidate=revalidate, patterns=patterns,
        )  # fmt: skip

    async def known(self, source: Source) -> Snapshot:
        """The snapshot of a source that this host has loaded before, or part of it. Raises UnknownBlob."""
        snapshot = await asyncio.to_thread(self.store.find_snapshot, source)
        if snapshot is None:
            raise UnknownBlob(f"{source.public} is not in the store; bring it with: weightcache pull {source.public}")
        return snapshot

    def _is_complete(self, entry: FileEntry) -> bool:
        info = self.store.info(entry.blob)
        return info is not None and info.state == "complete" and not info.suspect

    async def files(self, source: str, *, revalidate: bool = False, local: bool = False) -> dict[str, Any]:
        """What a source holds: each file's path, size in bytes, and whether all of it is here. Nothing is brought.

        The origin is asked as for a load. ``local``: nobody is; UnknownBlob if this host has never loaded of it.
        """
        asked = parse_source(source)
        known = self.known(asked) if local else self.resolver.resolve(asked, Tally(), revalidate=revalidate)
        snapshot = await known
        return {
            "source": snapshot.source.public,
            "revision": snapshot.revision,
            "directory": str(self.store.directory(snapshot)),
            "single": snapshot.single,
            "files": [
                {"path": entry.path, "size": entry.size, "here": self._is_complete(entry)} for entry in snapshot.files
            ],
        }

    async def path(self, source: str, patterns: Patterns = EVERYTHING) -> Path:
        """The real path of a complete file or snapshot directory. Raises UnknownBlob if any byte is missing.

        With ``patterns``, just the files that are meant need to be complete; the directory may lack the others.
        """
        known = await self.known(parse_source(source))
        snapshot = selected(known, patterns)
        missing = sum(not self._is_complete(entry) for entry in snapshot.files)
        if missing:
            name = snapshot.source.public
            count = len(snapshot.files)
            raise UnknownBlob(f"{name}: {missing} of {count} files not complete; finish with: weightcache pull {name}")
        directory = await asyncio.to_thread(
            self.store.materialise, snapshot, whole=len(snapshot.files) == len(known.files)
        )
        return directory / snapshot.files[0].path if snapshot.single else directory

    async def manifests(self, source: str) -> list[tuple[FileEntry, Manifest]]:
        """The manifest of each file of a source, as far as this host, its peers, or the file's header tell."""
        snapshot = await self.resolver.resolve(parse_source(source), Tally())
        blobs = list({entry.blob for entry in snapshot.files if not entry.source.is_local})
        await self.blobs.want(blobs)
        try:
            return [(entry, await self.blobs.manifest(entry)) for entry in snapshot.files]
        finally:
            self.blobs.unwant(blobs)

    async def listing(self) -> dict[str, Any]:
        """What the store holds: snapshots with their files, and every blob."""
        snapshots = await asyncio.to_thread(self.store.snapshots)
        infos = {info.blob: info for info in self.store.blobs()}
        return {
            "snapshots": [
                {
                    "source": snapshot.source.public,
                    "revision": snapshot.revision,
                    "size": snapshot.size,
                    "had": sum(infos[e.blob].had_bytes for e in snapshot.files if e.blob in infos),
                    "directory": str(self.store.directory(snapshot)),
                    "files": [{"path": entry.path, "blob": entry.blob.hex()} for entry in snapshot.files],
                }
                for snapshot in snapshots
                if any(entry.blob in infos for entry in snapshot.files)
            ],
            "blobs": [asdict(info) | {"blob": info.blob.hex()} for info in infos.values()],
        }

    def status(self) -> dict[str, Any]:
        """Facts about this host, for people and programs."""
        blobs = self.store.blobs()
        complete = sum(info.state == "complete" for info in blobs)
        moved = self.transfers.moved
        sent: Counter[str] = Counter()
        for peer, size in self.serving.sent.items():
            sent[self.transfers.name(peer)] += size
        return {
            "version": __version__,
            "node": self.store.node_id.hex(),
            "datacenter": self.config.datacenter,
            "listen": str(self.address) if self._serve else None,
            "store": str(self.config.store),
            "socket": str(self.config.socket_path),
            "uptime_seconds": round(time.monotonic() - self._began, 3),
            "blobs": {"complete": complete, "partial": len(blobs) - complete},
            "bytes": {"used": self.store.used, "capacity": self.store.capacity, "free": self.store.free},
            "loads": [
                {
                    "path": coming.entry.path,
                    "source": coming.entry.source.public,
                    "size": coming.entry.size,
                    "had_chunks": len(coming.had),
                    "chunks": coming.had.size,
                }
                for coming in self.transfers.all()
            ],
            "peers": len(self.swarm.peers),
            "directory": {
                "discover": without_secrets(self.config.discover),
                "members": len(self._directory.view()) if self._directory is not None else 0,
                "trouble": self.swarm.rolls.registry.trouble if self.swarm.rolls.registry is not None else "",
            },
            "moved": {"origin": moved.origin, "peer": moved.peers, "local": moved.local, "sent": sent},
            "processes": {
                "send": pids(self.serving.processes),
                "recv": pids(self._receivers.processes),
                "origin": pids([self._reader]),
            },
        }

    def peers(self) -> list[dict[str, Any]]:
        """Who is connected, and which members of the directory are not, with the reason."""
        rows: list[dict[str, Any]] = []
        for peer in self.swarm.peers.values():
            rest = max(self.transfers.resting(peer.id), self.trust.rest(peer.id))
            rows.append(
                {
                    "address": peer.name,
                    "node": peer.id.hex(),
                    "datacenter": peer.datacenter,
                    "bulk": str(peer.bulk) if peer.bulk else None,
                    "state": "resting" if rest else "connected",
                    "resting_seconds": round(rest, 1),
                    "why": self.trust.why(peer.id),
                    "bytes_per_second": round(self.transfers.rate(peer.id)),
                    "received": self.transfers.moved.peers.get(peer.name, 0),
                    "sent": self.serving.sent.get(peer.id, 0),
                }
            )
        rows += [
            {"address": address, "state": "unreachable", "why": why} for address, why in self.swarm.troubles.items()
        ]
        return sorted(rows, key=lambda row: str(row["address"]))
