"""A blob on its way to this host, as all who have to do with it share it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from weightcache.core.bitmap import ChunkSet
from weightcache.core.events import Via, Where
from weightcache.core.ids import short
from weightcache.core.manifest import Manifest
from weightcache.core.snapshot import FileEntry, Snapshot, encode_snapshot
from weightcache.errors import FormatError
from weightcache.log import fields
from weightcache.node.report import Tally
from weightcache.node.spans import Spans
from weightcache.node.swarm import Place, State
from weightcache.store import Landing

log = logging.getLogger(__name__)

COMING = ("origin", "peers", "local")  # where chunks come from

Heard = Callable[[int, int], None]  # of bytes [begin, end) that are had now
Shared = dict[bytes, dict[int, Place]]  # peer -> chunk of one blob -> the same chunk in another blob of that peer


class Landed(NamedTuple):
    """A chunk that a bulk process has hashed, compared and written, ``seconds`` after it was asked for."""

    request: int
    via: Where
    name: bytes
    check: bytes
    length: int
    seconds: float
    hashing: float
    writing: float


@dataclass(slots=True, eq=False)
class Incoming:
    """A blob on its way. ``done`` ends with it; ``users`` wait for it, and when none is left it is given up."""

    entry: FileEntry
    manifest: Manifest
    had: ChunkSet
    writer: Landing
    handle: int
    rank: int
    done: asyncio.Future[None]
    tally: Tally = field(default_factory=Tally)
    spans: dict[str, Spans] = field(default_factory=lambda: {name: Spans() for name in COMING})
    listeners: list[Heard] = field(default_factory=list)
    users: int = 0
    local: dict[int, Place] = field(default_factory=dict)  # chunk -> (blob, its chunk) on this disk
    shared: Shared = field(default_factory=dict)
    sought: dict[bytes, list[int]] = field(default_factory=dict)  # id -> missing chunks that have it
    opened: bool = False  # the reader was handed the writer
    teller: bytes | None = None  # the peer whose word the manifest's ids were; None: nobody's, or a publisher's
    claims: set[bytes] = field(default_factory=set)  # peers that were believed: their manifest, or a chunk's id
    accused: set[bytes] = field(default_factory=set)  # peers that sent other bytes than those claims say
    borrowed: set[int] = field(default_factory=set)  # chunks that came by an id known before, and not from the origin
    unused: str = ""  # why something published of it is not used
    alone: bool = False  # what was published of it turned out wrong: only the origin is believed

    @property
    def blob(self) -> bytes:
        return self.manifest.blob

    def take(self, chunk: int, row: Landed) -> bool:
        """A chunk is had from now on. Whether it was before, by an id that the origin has now confirmed."""
        known = self.manifest.id(chunk) is not None
        if isinstance(row.via, bytes) and not known:
            self.claims.add(row.via)
        again = chunk in self.borrowed
        if row.via is Via.ORIGIN:
            self.borrowed.discard(chunk)
        elif known:
            self.borrowed.add(chunk)
        self.manifest.learn(chunk, row.name, row.check)
        self.had.add(chunk)
        now = time.monotonic()  # the bulk processes' clock
        self.spans["peers" if isinstance(row.via, bytes) else row.via.value].add(now - row.seconds, now)
        return again

    def found(self, name: bytes, place: Place) -> list[int]:
        """A chunk with this id has come to ``place`` on this disk; the missing chunks that can be copied from there."""
        chunks = [chunk for chunk in self.sought.pop(name, ()) if chunk not in self.had] if not self.alone else []
        self.local |= dict.fromkeys(chunks, place)
        return chunks

    def stated(self, peer: bytes, name: str, state: State) -> ChunkSet | None:
        """What a peer has, by what it stated and of other blobs. A set that does not fit the blob counts as nothing."""
        size = len(self.manifest)
        if state.has is True:
            return None
        known = [*state.got, *self.shared.get(peer, ())]
        chunks = ChunkSet(size, (chunk for chunk in known if 0 <= chunk < size))
        try:
            stated = ChunkSet.decode(state.has, size) if isinstance(state.has, bytes) and state.has else ()
        except FormatError as error:
            log.warning("peer's chunk set ignored", extra=fields(peer=name, blob=short(self.blob), why=str(error)))
            return chunks
        for chunk in stated:
            chunks.add(chunk)
        return chunks

    @property
    def at_hand(self) -> int:
        """Bytes that need not come over the network: had, or to be copied on this disk."""
        plan = self.manifest.plan
        return sum(plan.span(chunk)[1] for chunk in {*self.had, *self.local})

    @property
    def nearby(self) -> int:
        """Bytes that peers have in other blobs, and this host nowhere."""
        plan = self.manifest.plan
        chunks = {chunk for places in self.shared.values() for chunk in places}
        return sum(plan.span(chunk)[1] for chunk in chunks.difference(self.had, self.local))


def one_file(entry: FileEntry) -> bytes:
    """One file's entry as the reader gets it."""
    return encode_snapshot(Snapshot(entry.source, "-", "-", (entry,), time.time()))
