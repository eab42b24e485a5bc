"""From a source to a snapshot: what this host knows, what the cluster knows, what the origin states.

A source pinned by commit or content needs no second look. A mutable one is believed for ``fresh`` seconds from when
anyone in the cluster last asked the origin, so hosts that start together ask it about once between them. When the
origin cannot be reached, the newest state that anyone has seen serves, and the load's report says so. An origin that
answers "no" (not found, denied) is believed over any memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from weightcache.core.snapshot import Snapshot, adopt, decode_snapshot
from weightcache.core.source import Source
from weightcache.errors import FormatError, OriginUnavailable
from weightcache.node.calls import OriginCalls
from weightcache.node.report import Tally
from weightcache.node.swarm import Peer, Swarm
from weightcache.node.teaching import Teacher, is_shared
from weightcache.node.trust import Trust
from weightcache.store import Store

PEERS_SECONDS = 1.0  # for which a host that has just started waits to meet its peers

log = logging.getLogger(__name__)


class Resolver:
    """Resolves sources, each once at a time."""

    def __init__(
        self,
        store: Store,
        swarm: Swarm,
        origin: OriginCalls,
        trust: Trust,
        teacher: Teacher,
        admit: Callable[[Source], None],
        fresh: float,
    ) -> None:
        self._store = store
        self._swarm = swarm
        self._origin = origin
        self._trust = trust
        self._teacher = teacher
        self._admit = admit
        self._fresh = fresh
        self._running: dict[tuple[Source, bool], asyncio.Task[tuple[Snapshot, str]]] = {}
        self._doubted: set[Source] = set()

    async def resolve(self, source: Source, tally: Tally, *, revalidate: bool = False) -> Snapshot:
        """The snapshot to load. ``revalidate``: the origin is asked whatever is known. Reasons go to ``tally``.

        Raises SourceError and its kin, or OriginUnavailable when nobody knows the source.
        """
        self._admit(source)
        revalidate = revalidate or source in self._doubted
        known = await asyncio.to_thread(self._store.find_snapshot, source)
        if known is not None and not revalidate and self._is_fresh(known):
            return known
        task = self._running.get((source, revalidate))
        if task is None:
            task = asyncio.ensure_future(self._look_up(source, known, revalidate))
            self._running[source, revalidate] = task
            task.add_done_callback(lambda _: self._running.pop((source, revalidate), None))
        snapshot, reason = await asyncio.shield(task)
        if reason:
            tally.note(reason)
        return snapshot

    def doubt(self, source: Source) -> None:
        """The origin has contradicted what is known of a source: the next time it is asked, however fresh that is."""
        self._doubted.add(source)

    def _is_fresh(self, snapshot: Snapshot) -> bool:
        age = time.time() - snapshot.resolved_at
        return snapshot.immutable or -self._fresh < age < self._fresh  # clocks of hosts differ a little

    async def _look_up(self, source: Source, known: Snapshot | None, revalidate: bool) -> tuple[Snapshot, str]:
        """The snapshot, and why it is an older one if it is."""
        reason = ""
        seen: list[tuple[Snapshot, str]] = [(known, "this host")] if known is not None else []
        if is_shared(source):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._swarm.settled(), PEERS_SECONDS)
            told, learned = await asyncio.gather(self._ask_peers(source), self._teacher.snapshot(source))
            seen += [(snapshot, peer.name) for peer, snapshot in told]
            seen += [(learned, "redis")] if learned is not None else []
        seen.sort(key=lambda item: item[0].resolved_at, reverse=True)
        if seen and not revalidate and self._is_fresh(seen[0][0]):
            snapshot = seen[0][0]
        else:
            try:
                snapshot = await self._origin.resolve(source)
                self._doubted.discard(source)
                self._teacher.resolved(snapshot)
            except OriginUnavailable as error:
                if not seen:
                    raise
                snapshot, who = seen[0]
                when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(snapshot.resolved_at))
                reason = f"origin: {error}; using the version that {who} saw at {when}"
        await asyncio.to_thread(self._store.put_snapshot, snapshot)
        return snapshot, reason

    async def _ask_peers(self, source: Source) -> list[tuple[Peer, Snapshot]]:
        found = []
        for peer, data in await self._swarm.find(str(source)):
            try:
                found.append((peer, await asyncio.to_thread(_adopt, data, source)))  # it may be 100,000 files
            except FormatError as error:
                self._trust.lied(peer.id, peer.name, f"its snapshot of {source.public} is none: {error}")
        return found


def _adopt(data: bytes, source: Source) -> Snapshot:
    return adopt(decode_snapshot(data), source, time.time())
