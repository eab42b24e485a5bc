"""What the planner remembers of each request and of each load. Bookkeeping only; it decides nothing.

Sets of chunks and of peers are integers, a bit each (see bits.py): `missing & held` are the chunks worth looking at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Self

from weightcache.core.bitmap import ChunkSet
from weightcache.core.bits import members
from weightcache.core.events import LoadAdded, OfPeer, Peer, PeerGot, PeerHas, PeerQuits, PeerReads, Reach, Via, Where
from weightcache.core.ids import short
from weightcache.core.layout import ChunkPlan
from weightcache.core.neighbours import Crowd
from weightcache.core.peers import Peers
from weightcache.core.scatter import Scatter
from weightcache.core.turns import Turns

PATIENCE = 30.0  # seconds without progress for which a load waits for resting peers when nobody else is left
LONGEST_STALL = 300.0  # seconds without progress after which it ends although peers are still being tried
FEW = 32  # holders whose chunks are put together for one decision
NAMED = 3  # failed peers that a last word names


@dataclass(slots=True, kw_only=True)
class Holders:
    """Which peers have which chunks of a blob."""

    holders: list[int]  # of each chunk: the peers that have some, and it
    has: dict[int, int] = field(default_factory=dict)  # slot of a partial holder -> its chunks
    held: int = 0  # chunks that have such holders
    levels: list[int] = field(default_factory=list)  # chunks that at least 1, 2, 4 ... such holders have
    partial: int = 0  # peers that have some
    complete: int = 0  # peers that have all

    def having(self, chunk: int) -> int:
        """The peers that have a chunk."""
        return self.complete | self.holders[chunk]

    def learn(self, slot: int, chunks: ChunkSet) -> None:
        """The peer has these chunks and no others."""
        self.lose(slot)
        if chunks.is_full:
            self.complete |= 1 << slot
        else:
            self.gain(slot, chunks)

    def gain(self, slot: int, chunks: Iterable[int]) -> None:
        """The peer has these chunks, too."""
        bit = 1 << slot
        if self.complete & bit:
            return
        self.partial |= bit
        gained = self.has.get(slot, 0)
        for chunk in chunks:
            if 0 <= chunk < len(self.holders) and not self.holders[chunk] & bit:
                self.holders[chunk] |= bit
                gained |= 1 << chunk
                count = self.holders[chunk].bit_count()
                if not count & (count - 1):
                    self._rise(chunk, count.bit_length() - 1)
        self.has[slot] = gained

    def _rise(self, chunk: int, level: int) -> None:
        if not level:
            self.held |= 1 << chunk
        if level == len(self.levels):
            self.levels.append(0)
        self.levels[level] |= 1 << chunk

    def held_by(self, slots: int) -> int:
        """The chunks that any of these partial holders has; of many, those that anybody has."""
        if slots.bit_count() > FEW:
            return self.held
        found = 0
        for slot in members(slots):
            found |= self.has[slot]
        return found

    def lose(self, slot: int) -> None:
        """Forget what the peer has."""
        bit = 1 << slot
        self.complete &= ~bit
        if self.partial & bit:
            self.partial ^= bit
            self._strike(slot, range(len(self.holders)))
            del self.has[slot]

    def lack(self, slot: int, chunks: Iterable[int]) -> None:
        """The peer has not got these chunks, whatever it said."""
        bit = 1 << slot
        if self.complete & bit:
            self.complete ^= bit
            self.gain(slot, range(len(self.holders)))
        self._strike(slot, chunks)

    def _strike(self, slot: int, chunks: Iterable[int]) -> None:
        bit = 1 << slot
        for chunk in chunks:
            if self.holders[chunk] & bit:
                self.holders[chunk] ^= bit
                self.has[slot] ^= 1 << chunk
                count = self.holders[chunk].bit_count()
                if not (count + 1) & count:
                    self.levels[count.bit_length()] ^= 1 << chunk
                if not count:
                    self.held ^= 1 << chunk


@dataclass(slots=True)
class Request:
    blob: bytes
    via: Where
    pending: dict[int, int]  # chunk -> length
    sent: float
    outside: bool = False  # of the own datacenter: at the origin, or at a remote peer


@dataclass(slots=True)
class Load(Holders):
    blob: bytes
    plan: ChunkPlan
    rank: int
    origin: Reach
    attempts: int
    missing: int  # chunks neither had nor under way
    local: int  # chunks to be copied from this host's own disk
    left: int  # how many are not had
    progressed: float  # when a chunk last arrived, or it was merely not this load's turn
    turns: Turns
    scatter: Scatter
    far: Holders  # the holders of other datacenters; those of this one are the load's own
    flights: dict[int, list[int]] = field(default_factory=dict)  # chunk -> requests
    reading: int = 0  # requests outside
    tries: dict[int, int] = field(default_factory=dict)  # chunk -> failed reads from the origin
    tried: int = 0  # chunks of which there are such
    spent: int = 0  # chunks for which it will not be asked any more
    origin_rests_until: float = float("-inf")
    origin_failures: int = 0  # since it last delivered
    origin_error: tuple[str, str] = ("LoadFailed", "no origin can be read from here")
    failed: dict[Peer, str] = field(default_factory=dict)  # the last failure of each peer, latest last

    @classmethod
    def begin(cls, event: LoadAdded, me: Peer, crowd: Crowd, now: float) -> Self:
        """A load at its beginning; of the peers nothing is known but that some are in the ``crowd``, perhaps."""
        count = len(event.plan)
        missing = ((1 << count) - 1) & ~int.from_bytes(event.had.bits, "little")
        local = missing & int.from_bytes(ChunkSet(count, event.local).bits, "little")
        return cls(
            event.blob, event.plan, event.rank, event.origin, event.attempts, missing, local,
            left=missing.bit_count(), progressed=now, holders=[0] * count, far=Holders(holders=[0] * count),
            turns=Turns(me, crowd, event.plan, event.origin), scatter=Scatter(me, event.blob, count, crowd.rings),
        )  # fmt: skip

    def hear(self, slot: int, event: OfPeer, now: float) -> None:
        """What a peer says of the blob. A set of chunks that does not fit is ignored."""
        match event:
            case PeerGot():
                self.gain(slot, event.chunks)
                self.turns.got(slot, event.chunks, now)
            case PeerReads():
                self.turns.join(slot, event.peer)
                self.turns.reads(slot, event.chunks, now)
            case PeerQuits():
                self.turns.quit(slot)
            case PeerHas(chunks=None):
                self.learn(slot, ChunkSet(len(self.plan), full=True))
                self.turns.quit(slot)
            case PeerHas(chunks=ChunkSet() as chunks) if chunks.size == len(self.plan):
                self.learn(slot, chunks)

    def hear_from_afar(self, slot: int, event: OfPeer) -> None:
        """What a peer of another datacenter says: it may have chunks, and has no part in the turns of this one."""
        match event:
            case PeerGot():
                self.far.gain(slot, event.chunks)
            case PeerHas(chunks=None):
                self.far.learn(slot, ChunkSet(len(self.plan), full=True))
            case PeerHas(chunks=ChunkSet() as chunks) if chunks.size == len(self.plan):
                self.far.learn(slot, chunks)

    def demand(self, slot: int) -> int:
        """How much of what is missing a holder has: the more, the better is it spared."""
        return 1 + (self.missing & self.has.get(slot, self.missing)).bit_count()

    def length(self, chunk: int) -> int:
        return self.plan.span(chunk)[1]

    def leave(self, slot: int) -> None:
        """The peer is gone."""
        self.lose(slot)
        self.far.lose(slot)
        self.turns.quit(slot)

    def outside_gave(self, request: Request, now: float) -> None:
        """The origin, or a remote peer, has brought a chunk that ``request`` still awaits."""
        if request.via is Via.ORIGIN:
            self.origin_failures = 0
            self.origin_rests_until = min(self.origin_rests_until, now)
        if len(request.pending) == 1:
            self.turns.took(now - request.sent)

    def fail_reads(self, chunks: Iterable[int]) -> None:
        """The origin did not give these chunks; what it failed ``attempts`` times it is not asked for again."""
        for chunk in chunks:
            self.tries[chunk] = self.tries.get(chunk, 0) + 1
            self.tried |= 1 << chunk
            if self.tries[chunk] >= self.attempts:
                self.spent |= 1 << chunk

    def stuck(self, peers: Peers, congested: bool, now: float) -> bool:
        """Whether nothing can be expected any more. ``congested``: this host's own disk is waited for."""
        if congested:
            self.progressed = now
        spent = self.missing & ~self.local
        if self.origin is not Reach.NONE:
            spent &= self.spent
        if self.flights:
            return not self.reading and now >= self.progressed + LONGEST_STALL
        if not spent:
            return False
        hopeful = self.complete or self.far.complete or self.turns.shared
        if self.origin is not Reach.NONE and not hopeful and spent & ~(self.held | self.far.held):
            return True  # the origin was the last who had it
        able = peers.open | (peers.busy & peers.owing)
        if any((self.having(chunk) | self.far.having(chunk)) & able for chunk in members(spent)):
            self.progressed = now  # it is merely not its turn
        return now >= self.progressed + PATIENCE

    def run(self, chunk: int, wanted: int, usable: int) -> list[int]:
        """``chunk`` and the ``wanted`` neighbours that no ``usable`` peer has, as far as one read goes."""

        def fits(other: int) -> bool:
            return bool(wanted >> other & 1) and not self.holders[other] & usable

        part = self.turns.part(chunk)
        before = takewhile(fits, range(chunk - 1, part.start - 1, -1))
        return [*reversed([*before]), chunk, *takewhile(fits, range(chunk + 1, part.stop))]

    def note(self, peer: Peer, why: str) -> None:
        """How ``peer`` failed, for the last word."""
        self.failed.pop(peer, None)
        self.failed[peer] = why

    def last_word(self) -> tuple[str, str]:
        """Why it cannot be finished: a class of errors.py, and one line."""
        error, origin = self.origin_error
        named = [f"peer {short(peer)}: {why}" for peer, why in reversed(self.failed.items())][:NAMED]
        if len(self.failed) > NAMED:
            named.append(f"{len(self.failed) - NAMED} other peers failed before")
        if not named:
            named = ["no peer answers" if self.complete or self.held else "no peer has them"]
        return error, f"{self.left} of {len(self.plan)} chunks cannot be had: {'; '.join([origin, *named])}"
