"""Executes the planner: its actions go to the bulk processes, what comes of them goes back as events.

Everything here runs on the event loop and handles names and numbers only: the bytes of a chunk go from a socket to the
disk inside a bulk process, which was handed the blob's descriptor. A chunk is had once such a process says that it has
hashed, compared and written it, and the store has recorded it; then listeners, peers and the sender hear of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from weightcache.config import Config
from weightcache.core.bitmap import ChunkSet
from weightcache.core.events import (
    LIES,
    Blame,
    Cancel,
    Congested,
    Done,
    Event,
    Failed,
    Fetch,
    GiveUp,
    Got,
    Kind,
    LoadAdded,
    LoadRemoved,
    PeerGot,
    PeerHas,
    PeerLeft,
    PeerMet,
    PeerPardoned,
    PeerQuits,
    PeerReads,
    Reach,
    Tick,
    Via,
    Wake,
    Where,
)
from weightcache.core.ids import short
from weightcache.core.manifest import Manifest
from weightcache.core.planner import Planner
from weightcache.core.snapshot import FileEntry
from weightcache.errors import BlobCorrupt, WeightcacheError, from_wire, to_wire
from weightcache.log import fields
from weightcache.node.disown import Disowning
from weightcache.node.incoming import Incoming, Landed, Shared, one_file
from weightcache.node.kin import SOON, SOON_SECONDS, Kin
from weightcache.node.processes import BulkProcess
from weightcache.node.receivers import Receivers
from weightcache.node.report import Tally
from weightcache.node.swarm import Peer, Place, State
from weightcache.node.trust import Trust
from weightcache.store import Flusher, Store

log = logging.getLogger(__name__)

RESTART_SECONDS = 0.5  # for which a bulk process that died is not asked


class Transfers:
    """The blobs on their way to this host."""

    def __init__(
        self,
        store: Store,
        receivers: Receivers,
        reader: BulkProcess,
        config: Config,
        had: Callable[[Incoming, int, bytes], None],
        reads: Callable[[Incoming, Sequence[int]], None],
        doubted: Callable[[bytes], None],
        peers: dict[bytes, Peer],
        trust: Trust,
    ) -> None:
        self._store = store
        self._receivers = receivers
        self._reader = reader
        self._attempts = config.origin.attempts
        self._had = had
        self._reads = reads
        self._doubted = doubted
        self._peers = peers
        self._trust = trust
        self._planner = Planner(
            secrets.randbits(64), config.origin.streams, config.peer_bandwidth, config.origin.bandwidth,
            store.node_id, config.prefer,
        )  # fmt: skip
        self._flusher = Flusher(config.dirty_budget, self._congested)
        self._incoming: dict[bytes, Incoming] = {}
        self._kin = Kin(self._incoming, store.node_id)
        self._requests: dict[int, tuple[Incoming, Fetch, set[int]]] = {}  # the set: chunks still to come
        self._disowning = Disowning(store, self._again)
        self._next_handle = 0
        self._wake: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.moved = Tally()  # ever, for the metrics
        self.failures = 0  # likewise

    def incoming(self, blob: bytes) -> Incoming | None:
        return self._incoming.get(blob)

    def all(self) -> list[Incoming]:
        return list(self._incoming.values())

    def resting(self, peer: bytes) -> float:
        """Seconds for which a peer is left alone because it failed."""
        return self._planner.rest(peer, self._loop.time())

    def contradicted(self, entry: FileEntry, tellers: Collection[bytes], accused: Iterable[bytes]) -> None:
        """``tellers`` told of a blob what its origin contradicts (none: somebody published it); ``accused`` had other
        bytes than they said."""
        if not tellers:
            self._doubted(entry.blob)
        for peer in set(accused).difference(tellers):
            self._trust.pardon(peer)
            self._feed(PeerPardoned(peer))
        why = f"what it told of {entry.source.public} is not what its origin has"
        for peer in tellers:
            self._trust.lied(peer, self.name(peer), why)

    def rate(self, peer: bytes) -> float:
        """Bytes per second that a peer delivered lately."""
        return self._planner.rate(peer)

    def reading(self, blob: bytes) -> list[int]:
        """The chunks of a blob that are on their way from outside the own datacenter."""
        requests = [(fetch, left) for coming, fetch, left in self._requests.values() if coming.blob == blob]
        return [chunk for fetch, left in requests if self._is_outside(fetch.via) for chunk in left]

    def _is_outside(self, via: Where) -> bool:
        known = self._peers.get(via) if isinstance(via, bytes) else None
        return via is Via.ORIGIN or (known is not None and known.remote)

    def begin(
        self, entry: FileEntry, manifest: Manifest, rank: int, peers: dict[bytes, State], local: dict[int, Place],
        sought: dict[int, bytes], shared: Shared,
    ) -> Incoming:  # fmt: skip
        """Start bringing what is missing of a blob that has its space. ``peers``: what they say of it; ``local``, and
        ``shared`` at peers: where its chunks are in other blobs; ``sought``: ids of those that are nowhere here."""
        had = self._store.had(manifest.blob)
        self._next_handle += 1
        writer = self._flusher.begin(self._store.open_writer(manifest.blob))
        done = self._loop.create_future()
        done.add_done_callback(lambda done: done.cancelled() or done.exception())  # who waits will see it
        coming = Incoming(entry, manifest, had, writer, self._next_handle, rank, done, local=local, shared=shared)
        for chunk, name in sought.items():
            coming.sought.setdefault(name, []).append(chunk)
        self._incoming[coming.blob] = coming
        self._add(coming, peers)
        return coming

    def _add(self, coming: Incoming, peers: dict[bytes, State]) -> None:
        """Have the planner see to what is missing."""
        reach = Reach.RANGED if coming.entry.ranged else Reach.STREAM
        stated = {**dict.fromkeys(coming.shared, State()), **peers}
        known = [(peer, coming.stated(peer, self.name(peer), state)) for peer, state in stated.items()]
        known.append((SOON, self._kin.soon(coming)))
        readers = [(peer, state.reads) for peer, state in peers.items() if state.reads is not None]
        plan, local = coming.manifest.plan, sorted(coming.local)
        added = LoadAdded(coming.blob, plan, coming.had, coming.rank, reach, self._attempts, local, known, readers)
        self._feed(added)

    def abandon(self, coming: Incoming, error: WeightcacheError | None = None) -> None:
        """Stop bringing a blob; what is had of it stays had."""
        if self._incoming.get(coming.blob) is coming:
            self._feed(LoadRemoved(coming.blob))
            self._end(coming, error or WeightcacheError(f"{coming.entry.path}: nobody waits for it any more"))

    def _congested(self, full: bool) -> None:
        """From any thread: the disk is behind, or has caught up."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._feed, Congested(full))

    # -- news of peers

    def peer_joined(self, peer: Peer) -> None:
        self._feed(PeerMet(peer.id, remote=peer.remote))

    def peer_state(self, peer: bytes, blob: bytes, state: State | None) -> None:
        """What a peer states to have of a blob (None: nothing). A set adds to what it told before: some of that came
        after the set was taken."""
        coming = self._incoming.get(blob)
        if coming is None or coming.alone:
            return
        if state is None:
            shared = ChunkSet(len(coming.manifest), coming.shared.get(peer, ()))
            self._feed(PeerHas(peer, blob, shared), PeerQuits(peer, blob))
        elif (chunks := coming.stated(peer, self.name(peer), state)) is None:
            self._feed(PeerHas(peer, blob, None))
        else:
            joins = [] if state.reads is None else [PeerReads(peer, blob, state.reads)]
            self._feed(*joins, PeerGot(peer, blob, list(chunks)))

    def peer_got(self, peer: bytes, blob: bytes, chunks: Sequence[int]) -> None:
        if (coming := self._incoming.get(blob)) is not None and not coming.alone:
            self._feed(PeerGot(peer, blob, chunks))

    def peer_reads(self, peer: bytes, blob: bytes, chunks: Sequence[int]) -> None:
        if (coming := self._incoming.get(blob)) is not None and not coming.alone:
            self._feed(PeerReads(peer, blob, chunks))

    def peer_quits(self, peer: bytes, blob: bytes) -> None:
        self._feed(PeerQuits(peer, blob))

    def note(self, peer: bytes, reason: str) -> None:
        """Put a reason into the reports of the loads that wait for a peer."""
        for coming, fetch, _ in self._requests.values():
            if fetch.via == peer:
                coming.tally.note(reason)

    def peer_left(self, peer: bytes) -> None:
        self._feed(PeerLeft(peer))
        if (known := self._peers.get(peer)) is not None:  # it is merely not believed any more
            self.peer_joined(known)
        self._receivers.forget(peer)

    # -- the planner's actions

    def _feed(self, *events: Event) -> None:
        now = self._loop.time()
        cancelled: list[int] = []
        for event in events:
            for action in self._planner.handle(event, now):
                match action:
                    case Fetch():
                        self._fetch(action)
                    case Cancel(request):
                        if self._requests.pop(request, None) is not None and request not in self._disowning:
                            cancelled.append(request)
                    case Wake(at):
                        if self._wake is not None:
                            self._wake.cancel()
                        self._wake = self._loop.call_at(at, self._feed, Tick())
                    case Blame():
                        self._blame(action)
                    case Done(blob):
                        self._end(self._incoming[blob], None)
                    case GiveUp(blob, error, message):
                        self._end(self._incoming[blob], from_wire(error, message))
        self._receivers.send()
        if cancelled:
            self._receivers.cancel(cancelled)
            self._reader.send("cancel", cancelled)

    def _fetch(self, fetch: Fetch) -> None:
        coming = self._incoming[fetch.blob]
        if fetch.via == SOON:
            self._loop.call_soon(self._feed, Failed(fetch.request, Kind.BUSY, wait=SOON_SECONDS))
            return
        if fetch.via == self._store.node_id:
            fetch = replace(fetch, via=Via.LOCAL)
        self._requests[fetch.request] = (coming, fetch, set(fetch.chunks))
        rows = [self._row(coming, chunk) for chunk in fetch.chunks]
        if isinstance(fetch.via, bytes):
            known, elsewhere = self._peers.get(fetch.via), coming.shared.get(fetch.via, {})
            for index, *span in rows:  # it lands where it belongs, whatever it is part of over there
                row = [fetch.request, coming.handle, *elsewhere.get(index, (coming.blob, index)), *span]
                self._receivers.fetch(fetch.via, known.bulk if known else None, coming.writer.fd, row)
        else:
            self._read(fetch, coming, rows)
        if self._is_outside(fetch.via):
            self._reads(coming, fetch.chunks)

    def _read(self, fetch: Fetch, coming: Incoming, rows: list[list[Any]]) -> None:
        """From the origin, or from this host's own disk."""
        self._reader.start()
        if not coming.opened:
            coming.opened = True
            self._reader.send("blob", coming.handle, one_file(coming.entry), fds=[os.dup(coming.writer.fd)])
        if fetch.via is Via.LOCAL:
            self._copy(fetch, coming, rows[0])
        else:
            self._reader.send("stream" if fetch.whole else "read", fetch.request, coming.handle, rows)

    def _row(self, coming: Incoming, chunk: int) -> list[Any]:
        offset, length = coming.manifest.plan.span(chunk)
        return [chunk, offset, length, coming.manifest.id(chunk) or b""]

    def _copy(self, fetch: Fetch, coming: Incoming, row: list[Any]) -> None:
        blob, chunk = coming.local[row[0]]
        manifest = self._store.manifest(blob)
        try:
            reader = self._store.open_reader(blob)
        except WeightcacheError as error:  # it was evicted since
            self._loop.call_soon(self._feed, Failed(fetch.request, Kind.MISSING, str(error)))
            return
        offset = manifest.plan.span(chunk)[0] if manifest is not None else 0
        self._reader.send("copy", fetch.request, coming.handle, row, offset, fds=[reader])

    def _blame(self, blame: Blame) -> None:
        if blame.via == SOON:
            self._loop.call_soon(self._feed, PeerPardoned(SOON))
            return
        self.failures += 1
        coming = self._incoming.get(blame.blob)
        why = f"{blame.kind}: {blame.detail}" if blame.detail else str(blame.kind)
        if isinstance(blame.via, bytes) and blame.via != self._store.node_id:
            who = f"peer {self.name(blame.via)}"
            if blame.kind in LIES:
                self._trust.lied(blame.via, self.name(blame.via), why)
        else:
            who = "origin" if blame.via is Via.ORIGIN else "a copy on this disk"
        rest = f"; left alone for {blame.rest:.1f} s" if blame.rest else ""
        if coming is not None:
            coming.tally.note(f"{who}: {why}{rest}")
        log.warning("source failed", extra=fields(blob=short(blame.blob), via=who, why=why, rest=round(blame.rest, 3)))

    def name(self, peer: bytes) -> str:
        """A peer as people know it: its address, or what its id begins with."""
        known = self._peers.get(peer)
        return known.name if known is not None else peer.hex()[:8]

    # -- what the bulk processes say

    def heard(self, role: str, message: list[Any]) -> bool:
        """A message of a bulk process; whether it was about a request."""
        match message:
            case ["got", rows]:
                repeated: list[Event] = []
                landed: dict[bytes, dict[int, Landed]] = {}  # by blob and chunk
                for row in rows:
                    # the receiver's requests have one chunk each and do not repeat which
                    request, index, name, check, length, *spent = row if role == "origin" else [row[0], None, *row[1:]]
                    self._disowning.ended(request)
                    if (known := self._requests.get(request)) is not None:
                        coming, fetch, left = known
                        chunk = fetch.chunks[0] if index is None else index
                        left.discard(chunk)
                        if not left:
                            del self._requests[request]
                        fresh = landed.setdefault(coming.blob, {})
                        if chunk in coming.had or chunk in fresh:
                            repeated.append(Got(request, chunk))
                        else:
                            fresh[chunk] = Landed(request, fetch.via, name, check, length, *spent)
                events = [event for blob, fresh in landed.items() for event in self._landed(blob, fresh)]
                self._feed(*events, *repeated)
            case ["failed", rows]:
                for request, kind, detail, wait, *error in rows:
                    self._disowning.ended(request)
                    seconds = wait / 1000 if role == "recv" else wait
                    self._failed(request, kind, detail, seconds, *error)
            case _:
                return False
        return True

    def _landed(self, blob: bytes, fresh: dict[int, Landed]) -> Iterator[Event]:
        """Chunks are written: record that they are had, in one go, and tell. What comes of it for the planner."""
        coming = self._incoming[blob]
        try:
            self._store.record(coming.blob, [(chunk, row.name, row.check) for chunk, row in fresh.items()])
        except WeightcacheError as error:
            if len(fresh) > 1:  # which of them is it?
                for chunk, row in fresh.items():
                    yield from self._landed(blob, {chunk: row})
                return
            kind, message = to_wire(error)
            for row in fresh.values():
                yield Failed(row.request, Kind.FATAL, f"{coming.entry.path}: {message}", error=kind)
            return
        for chunk, row in fresh.items():
            self._had_now(coming, chunk, row)
            yield Got(row.request, chunk)
            yield from self._kin.landed(row.name, (coming.blob, chunk))
        if any(row.via is Via.ORIGIN for row in fresh.values()) and not self.reading(blob):
            self._reads(coming, ())

    def _had_now(self, coming: Incoming, chunk: int, row: Landed) -> None:
        again = coming.take(chunk, row)
        where = self.name(row.via) if isinstance(row.via, bytes) else row.via
        for tally in (coming.tally, self.moved):
            tally.count(where, row.length, row.hashing, row.writing)
        begin, length = coming.manifest.plan.span(chunk)
        self._flusher.landed(coming.writer, begin, length)
        for listener in coming.listeners if not again else ():
            listener(begin, begin + length)
        self._had(coming, chunk, row.name)

    def _failed(self, request: int, kind: str, detail: str, wait: float = 0.0, error: str = "StoreError") -> None:
        if request not in self._requests:
            return
        coming, fetch, _ = self._requests.pop(request)
        if isinstance(fetch.via, bytes):
            kind = self._peer_failed(coming, fetch.via, kind, fetch.chunks[0])
        if kind == Kind.MISMATCH and fetch.via is Via.ORIGIN:
            self._contradicted(coming, detail)
        elif kind == "disk":
            detail = f"{coming.entry.path}: writing the store: {detail}; see its disk"
            self._feed(Failed(request, Kind.FATAL, detail, error=error))
        else:
            self._feed(Failed(request, Kind(kind), detail, wait, error))

    def _peer_failed(self, coming: Incoming, peer: bytes, kind: str, chunk: int) -> str:
        """What kind of failure it is for the planner."""
        if kind == Kind.MISMATCH:
            coming.accused.add(peer)
        elif kind in (Kind.MISSING, Kind.UNKNOWN):
            coming.tally.note(f"peer {self.name(peer)}: {kind}: it has not got what it said it had")
            if coming.shared.get(peer, {}).pop(chunk, None) is not None:
                return Kind.MISSING  # of this blob it may have all the rest
        return kind

    def _contradicted(self, coming: Incoming, detail: str) -> None:
        """The origin's own bytes are not what peers said they are: nothing learned from peers is kept."""
        if coming.teller is None and not coming.alone:
            self._disown(coming, detail)
            return
        tellers = ", ".join(sorted(map(self.name, coming.claims))) or "whoever published it"
        log.error("manifest contradicts the origin", extra=fields(blob=short(coming.blob), tellers=tellers, why=detail))
        self.contradicted(coming.entry, coming.claims, coming.accused)
        self._feed(LoadRemoved(coming.blob))
        what = f"{coming.entry.source.public}: what {tellers} told of it"

        def discarded(done: asyncio.Future[None]) -> None:
            done.exception()  # somebody else has removed it
            if self._incoming.get(coming.blob) is coming:
                self._end(coming, BlobCorrupt(f"{what} is not what its origin has; load it again"))

        # It ends when nothing is left of it: whoever loads again must not find it.
        self._loop.run_in_executor(None, self._store.discard, coming.blob).add_done_callback(discarded)

    def _disown(self, coming: Incoming, detail: str) -> None:
        """The origin's own bytes are not what was published of them: go on without."""
        log.error("published manifest contradicts the origin", extra=fields(blob=short(coming.blob), why=detail))
        coming.tally.note(f"published manifest: left aside, its origin has other bytes: {detail}")
        self.contradicted(coming.entry, (), coming.accused)
        theirs = [(request, fetch.via) for request, (owner, fetch, _) in self._requests.items() if owner is coming]
        others = [(n, "recv" if isinstance(via, bytes) else "origin") for n, via in theirs if via is not Via.ORIGIN]
        coming.sought.clear()
        self._disowning.await_end(coming, others)
        self._feed(LoadRemoved(coming.blob), *self._kin.ended())
        if not others:
            self._disowning.go_on(coming)

    def _again(self, coming: Incoming, error: BaseException | None) -> None:
        manifest = self._store.manifest(coming.blob)
        if self._incoming.get(coming.blob) is not coming:
            return
        if error is not None or manifest is None:
            self._end(
                coming, BlobCorrupt(f"{coming.entry.path}: {error or 'it is gone from the store'}; load it again")
            )
            return
        self._doubted(coming.blob)
        coming.manifest, coming.had = manifest, self._store.had(coming.blob)
        coming.local, coming.shared = {}, {}
        self._add(coming, {})

    def lost(self, requests: Collection[int], reason: str) -> None:
        """A receiver that was to answer these has ended by itself: no peer is to blame."""
        wait = 0.0 if self._receivers.up else RESTART_SECONDS
        for request in requests:
            self._disowning.ended(request)
            if self._requests.pop(request, None) is not None:
                self._feed(Failed(request, Kind.BUSY, reason, wait))

    def reader_died(self, reason: str) -> None:
        """The reader has ended by itself. The next request starts it again."""
        for coming in self._incoming.values():
            coming.opened = False
        self._disowning.died("origin")
        for request, (_, fetch, _) in list(self._requests.items()):
            if not isinstance(fetch.via, bytes) and self._requests.pop(request, None) is not None:
                self._feed(Failed(request, Kind.UNAVAILABLE, reason, RESTART_SECONDS, "OriginUnavailable"))

    # -- the end of a blob's way

    def _end(self, coming: Incoming, error: WeightcacheError | None) -> None:
        self._incoming.pop(coming.blob, None)
        for request in [r for r, (owner, _, _) in self._requests.items() if owner is coming]:
            del self._requests[request]
        self._receivers.close(coming.handle)
        if coming.opened:
            self._reader.send("close", coming.handle)
        self._flusher.ended(coming.writer)
        if not coming.done.done():
            if error is None:
                coming.done.set_result(None)
            else:
                coming.done.set_exception(error)
        self._loop.call_soon(self._feed, *self._kin.ended())

    def close(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
        for coming in self.all():
            self.abandon(coming, WeightcacheError("this host is shutting down"))
        self._flusher.close()
