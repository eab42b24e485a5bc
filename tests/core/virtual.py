"""A world in virtual time for the planner: peers, an origin and a disk that behave well or badly, and a referee.

``World.feed`` gives the planner an event and performs its actions; ``World.run`` moves the clock from one thing that
happens to the next. The referee keeps its own books, from the actions alone, and checks every one of them: what the
planner believes of itself proves nothing. All randomness comes from one seed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import weightcache.errors
from weightcache.core import peers as limits
from weightcache.core import planner as rules
from weightcache.core.bitmap import ChunkSet
from weightcache.core.choice import EAGER_MOST
from weightcache.core.events import (
    LIES,
    Blame,
    Cancel,
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
    PeerReads,
    Reach,
    Tick,
    Via,
    Wake,
)
from weightcache.core.layout import CHUNK, ChunkPlan
from weightcache.core.planner import Planner
from weightcache.core.turns import ORIGIN_READ

MIB = 1 << 20
LATENCY = 0.001
END_OF_TIME = 3600.0
MOST_EVENTS = 40_000
TURN = 1.0 + 6 * EAGER_MOST  # seconds for which a host may wait for others to go first

# How a peer fails each request, by the name of its behaviour. "good" delivers at its rate, "silent" never answers.
FAILS = {
    "refusing": Kind.REFUSED,
    "resetting": Kind.RESET,
    "lying": Kind.MISMATCH,
    "busy": Kind.BUSY,
    "missing": Kind.MISSING,
    "unknown": Kind.UNKNOWN,
}


@dataclass
class Peer:
    name: bytes
    behaviour: str
    rate: float  # bytes/s
    wait: float  # what it asks for when it says BUSY
    remote: bool = False
    present: bool = True
    free_at: float = 0.0  # it sends one chunk after the other
    holds: dict[bytes, set[int]] = field(default_factory=dict)  # as far as it said, and was not found out
    # The referee's view: left alone until, failed and not yet forgiven, busy by its own word until.
    rests_until: float = 0.0
    liar_until: float = 0.0
    doubted: bool = False
    busy_until: float = 0.0


@dataclass
class Origin:
    behaviour: str = "good"  # or dead, fatal, flaky
    rate: float = 200e6
    fails: float = 0.3  # of the reads of a flaky one
    detail: str = "503 slow down"
    reads: list[tuple[float, Fetch]] = field(default_factory=list)


@dataclass
class Wanted:
    plan: ChunkPlan
    had: set[int]
    local: set[int]
    bad_local: set[int]
    reach: Reach
    order: list[int] = field(default_factory=list)  # chunks as they came
    end: Done | GiveUp | None = None
    dropped: bool = False
    ended_at: float = 0.0
    blames: list[tuple[float, Blame]] = field(default_factory=list)


@dataclass
class Flight:
    fetch: Fetch
    pending: set[int]
    sent: float


class World:
    def __init__(self, seed: int, streams: int = 8, prefer: tuple[str, ...] = ()) -> None:
        self.random = random.Random(seed)
        self.planner = Planner(seed, streams, prefer=prefer)
        self.prefer = prefer
        self.streams = streams
        self.now = 0.0
        self.peers: dict[bytes, Peer] = {}
        self.origin = Origin()
        self.wanted: dict[bytes, Wanted] = {}
        self.flights: dict[int, Flight] = {}
        self.log: list[str] = []
        self.fetches: list[tuple[float, Fetch]] = []
        self.stalled_until = 0.0  # this host's disk: nothing lands before
        self.quiet_since = 0.0  # nothing has been on its way
        self.asked = self.hedged = 0
        self.events = self.wakes = 0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._wake: float | None = None

    # -- setting the scene

    def add_peer(
        self, name: str, behaviour: str = "good", rate: float = 500e6, wait: float = 0.05, *, remote: bool = False
    ) -> Peer:
        peer = self.peers[name.encode()] = Peer(name.encode(), behaviour, rate, wait, remote)
        if remote:
            self.feed(PeerMet(peer.name, remote=True))
        return peer

    def want(
        self,
        blob: str,
        chunks: int = 10,
        size: int = MIB,
        *,
        rank: int = 1,
        reach: Reach = Reach.NONE,
        had: Iterable[int] = (),
        local: Iterable[int] = (),
        bad_local: Iterable[int] = (),
        attempts: int = 5,
    ) -> Wanted:
        plan = ChunkPlan(chunks * size, range(0, chunks * size, size))
        return self.want_plan(blob, plan, rank, reach, set(had), set(local), set(bad_local), attempts)

    def want_plan(
        self,
        blob: str,
        plan: ChunkPlan,
        rank: int,
        reach: Reach,
        had: set[int],
        local: set[int],
        bad_local: set[int],
        attempts: int = 5,
    ) -> Wanted:
        wanted = self.wanted[blob.encode()] = Wanted(plan, set(had), set(local), bad_local, reach)
        for peer in self.peers.values():
            peer.holds.pop(blob.encode(), None)
        self.feed(LoadAdded(blob.encode(), plan, ChunkSet(len(plan), had), rank, reach, attempts, tuple(sorted(local))))
        return wanted

    def has(self, peer: Peer, blob: str, chunks: Iterable[int] | None = None) -> None:
        count = len(self.wanted[blob.encode()].plan)
        peer.holds[blob.encode()] = set(range(count) if chunks is None else chunks)
        stated = None if chunks is None else ChunkSet(count, peer.holds[blob.encode()])
        self.feed(PeerHas(peer.name, blob.encode(), stated))

    def got(self, peer: Peer, blob: str, chunks: Iterable[int]) -> None:
        fresh = tuple(chunks)
        peer.holds.setdefault(blob.encode(), set()).update(fresh)
        self.feed(PeerGot(peer.name, blob.encode(), fresh))

    def reads(self, peer: Peer, blob: str, chunks: Iterable[int]) -> None:
        """It loads the blob, too; but here nobody ever gets what he reads."""
        self.feed(PeerReads(peer.name, blob.encode(), tuple(chunks)))

    def leave(self, peer: Peer) -> None:
        peer.present = False
        peer.holds.clear()
        self.feed(PeerLeft(peer.name))
        assert not any(flight.fetch.via == peer.name for flight in self.flights.values())

    def pardon(self, peer: Peer) -> None:
        peer.rests_until = peer.liar_until = 0.0
        peer.doubted = False
        self.feed(PeerPardoned(peer.name))

    def drop(self, blob: str) -> None:
        self.wanted[blob.encode()].dropped = True
        self.feed(LoadRemoved(blob.encode()))
        assert not any(flight.fetch.blob == blob.encode() for flight in self.flights.values())

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._due, (when, self._sequence, what))

    # -- time

    @property
    def unfinished(self) -> list[bytes]:
        return [blob for blob, wanted in self.wanted.items() if wanted.end is None and not wanted.dropped]

    def run(self, until: Callable[[], bool] | float = END_OF_TIME) -> None:
        """Let things happen until every load has ended and the scene is played, or ``until``."""
        while self.unfinished or self._due:
            if callable(until) and until():
                return
            assert self._due or self._wake is not None, f"{self.unfinished} would sleep forever"
            first = self._due[0][0] if self._due else float("inf")
            when = min(first, self._wake if self._wake is not None else float("inf"))
            if not callable(until) and when > until:
                assert until != END_OF_TIME, f"{self.unfinished} take for ever"
                self.now = until
                return
            self.now = max(self.now, when)
            if first <= when:
                heapq.heappop(self._due)[2]()
            else:
                self._wake = None
                self.wakes += 1
                self.feed(Tick())
        self.check_clean()

    def feed(self, event: Event) -> None:
        self.events += 1
        assert self.events < MOST_EVENTS, "the planner runs in circles"
        actions = self.planner.handle(event, self.now)
        self.log.append(f"{self.now!r} {type(event).__name__} {actions!r}")
        for action in actions:
            match action:
                case Fetch():
                    self._fetch(action)
                case Cancel(request):
                    assert request in self.flights, "a request that nobody knows is cancelled"
                    del self.flights[request]
                case Blame():
                    self._blame(action)
                case Done(blob):
                    self._ended(blob, action)
                    wanted = self.wanted[blob]
                    assert wanted.had == set(range(len(wanted.plan)))
                case GiveUp(blob, error, message):
                    self._ended(blob, action)
                    assert issubclass(getattr(weightcache.errors, error), weightcache.errors.WeightcacheError)
                    assert message.strip()
                    assert "\n" not in message
                case Wake(at):
                    assert at > self.now, "a Wake for the past"
                    self._wake = at
        self._check_state()

    def _ended(self, blob: bytes, end: Done | GiveUp) -> None:
        wanted = self.wanted[blob]
        assert wanted.end is None, "a load ends twice"
        assert not any(flight.fetch.blob == blob for flight in self.flights.values()), "requests outlive their load"
        wanted.end, wanted.ended_at = end, self.now

    # -- what the others do

    def _fetch(self, fetch: Fetch) -> None:
        self._check_fetch(fetch)
        self.fetches.append((self.now, fetch))
        self.flights[fetch.request] = Flight(fetch, set(fetch.chunks), self.now)
        if fetch.via is Via.ORIGIN:
            self._read(fetch)
        elif fetch.via is Via.LOCAL:
            bad = fetch.chunks[0] in self.wanted[fetch.blob].bad_local
            self.at(self.now + LATENCY, lambda: self._fail(fetch, Kind.MISMATCH) if bad else self._deliver(fetch, 0))
        else:
            assert isinstance(fetch.via, bytes)
            self._ask(self.peers[fetch.via], fetch)

    def _ask(self, peer: Peer, fetch: Fetch) -> None:
        soon = self.now + LATENCY
        if peer.behaviour in FAILS:
            kind = FAILS[peer.behaviour]
            self.at(soon, lambda: self._fail(fetch, kind, f"{peer.behaviour} peer", peer.wait))
        elif peer.behaviour == "good":
            for index, chunk in enumerate(fetch.chunks):
                peer.free_at = max(peer.free_at, soon) + self.wanted[fetch.blob].plan.span(chunk)[1] / peer.rate
                self.at(peer.free_at, partial(self._deliver, fetch, index))
        else:
            assert peer.behaviour == "silent"

    def _read(self, fetch: Fetch) -> None:
        self.origin.reads.append((self.now, fetch))
        behaviour, plan = self.origin.behaviour, self.wanted[fetch.blob].plan
        reach = len(fetch.chunks)
        if behaviour == "flaky" and self.random.random() < self.origin.fails:
            reach = self.random.randrange(reach + 1)
        if behaviour in ("dead", "fatal"):
            reach = 0
        begin = 0 if fetch.whole else plan.span(fetch.chunks[0])[0]
        when = self.now + 0.02
        for index, chunk in enumerate(fetch.chunks[:reach]):
            when = self.now + 0.02 + (sum(plan.span(chunk)) - begin) / self.origin.rate
            self.at(when, partial(self._deliver, fetch, index))
        if reach < len(fetch.chunks) or behaviour == "fatal":
            kind = Kind.FATAL if behaviour == "fatal" else Kind.UNAVAILABLE
            self.at(when + LATENCY, lambda: self._fail(fetch, kind, self.origin.detail, 0.0, "OriginUnavailable"))

    def _deliver(self, fetch: Fetch, index: int) -> None:
        flight, chunk = self.flights.get(fetch.request), fetch.chunks[index]
        if flight is None or chunk not in flight.pending:
            return
        if self.now < self.stalled_until:
            self.at(self.stalled_until, lambda: self._deliver(fetch, index))
            return
        wanted = self.wanted[fetch.blob]
        assert chunk not in wanted.had, "a chunk arrives twice"
        wanted.had.add(chunk)
        wanted.order.append(chunk)
        self._settle(fetch.request, chunk)
        for request in [r for r, f in self.flights.items() if f.fetch.blob == fetch.blob and chunk in f.pending]:
            if len(self.flights[request].pending) > 1:  # else the planner cancels it
                self.flights[request].pending.discard(chunk)
        if isinstance(fetch.via, bytes):
            self.peers[fetch.via].doubted = False
        self.feed(Got(fetch.request, chunk))

    def _settle(self, request: int, chunk: int) -> None:
        self.flights[request].pending.discard(chunk)
        if not self.flights[request].pending:
            del self.flights[request]

    def _fail(self, fetch: Fetch, kind: Kind, detail: str = "", wait: float = 0.0, error: str = "LoadFailed") -> None:
        flight = self.flights.pop(fetch.request, None)
        if flight is None:
            return
        if isinstance(fetch.via, bytes):
            peer = self.peers[fetch.via]
            held = peer.holds.get(fetch.blob, set())
            if kind is Kind.MISSING:
                held -= flight.pending
            elif kind is Kind.UNKNOWN:
                held.clear()
            elif kind is Kind.BUSY:
                peer.busy_until = self.now + 1.5 * min(max(0.01, wait), rules.LONGEST_BUSY)
        elif fetch.via is Via.LOCAL:
            self.wanted[fetch.blob].local -= flight.pending
        self.feed(Failed(fetch.request, kind, detail, wait, error))

    # -- the referee

    def owed(self, peer: Peer | None = None) -> int:
        return sum(
            self._bytes(flight.fetch.blob, flight.pending)
            for flight in self.flights.values()
            if (flight.fetch.via == peer.name if peer else isinstance(flight.fetch.via, bytes))
        )

    def owed_once(self) -> int:
        """By all peers, without what is asked of a second one: that has a budget of its own."""
        flights = [flight for flight in self.flights.values() if isinstance(flight.fetch.via, bytes)]
        return sum(self._bytes(*one) for one in {(f.fetch.blob, f.fetch.chunks) for f in flights})

    def _bytes(self, blob: bytes, chunks: Iterable[int]) -> int:
        return sum(self.wanted[blob].plan.span(chunk)[1] for chunk in chunks)

    def asked_of(self, peer: Peer) -> list[Fetch]:
        """All requests that were ever made to it."""
        return [fetch for _, fetch in self.fetches if fetch.via == peer.name]

    def _usable(self, peer: Peer) -> bool:
        """Whether it would have to be asked, or waited for, rather than the origin."""
        owes = any(flight.fetch.via == peer.name for flight in self.flights.values())
        return peer.present and self.now >= peer.rests_until and not (peer.doubted and owes)

    def _blame(self, blame: Blame) -> None:
        self.wanted[blame.blob].blames.append((self.now, blame))
        if isinstance(blame.via, bytes):
            peer = self.peers[blame.via]
            peer.doubted = True
            peer.rests_until = self.now + blame.rest
            if blame.kind in LIES:
                peer.liar_until = self.now + rules.LIAR_REST
            else:
                assert rules.FIRST_REST * 0.7 <= blame.rest <= rules.LONGEST_REST * 1.3
            assert abs(blame.rest - self.planner.rest(peer.name, self.now)) < 1e-6

    def _check_fetch(self, fetch: Fetch) -> None:
        wanted = self.wanted[fetch.blob]
        chunks = set(fetch.chunks)
        assert chunks
        assert len(chunks) == len(fetch.chunks)
        assert wanted.end is None
        assert not chunks & wanted.had, "what is had is asked for again"
        others = [f for f in self.flights.values() if f.fetch.blob == fetch.blob and f.pending & chunks]
        size = self._bytes(fetch.blob, chunks)
        self.asked += size
        if others:
            assert len(others) == 1, "a chunk is on its way three times"
            assert isinstance(others[0].fetch.via, bytes)
            assert fetch.via != others[0].fetch.via
            asked = self.peers[others[0].fetch.via]
            assert asked.doubted or self.now - others[0].sent >= rules.SOFT_DEADLINE
            self.hedged += size
            assert self.hedged <= rules.HEDGE_SHARE * self.asked + rules.HEDGE_BYTES
        if fetch.via is Via.LOCAL:
            assert chunks <= wanted.local
            return
        assert not chunks & wanted.local, "what this disk has is asked of others"
        if fetch.via is Via.ORIGIN:
            hedged = others[0].fetch.via if others else None
            assert fetch.whole == (wanted.reach is Reach.STREAM)
            assert wanted.reach is not Reach.NONE
            if fetch.whole:
                assert list(fetch.chunks) == sorted(fetch.chunks)
                assert not any(f.fetch.whole and f.fetch.blob == fetch.blob for f in self.flights.values())
                assert any(not self._usable_holders(fetch.blob, chunk) for chunk in chunks)
            else:
                assert list(fetch.chunks) == list(range(fetch.chunks[0], fetch.chunks[-1] + 1))
                assert size <= ORIGIN_READ
                for chunk in chunks:
                    able = [name for name in self._usable_holders(fetch.blob, chunk) if name != hedged]
                    assert not able, f"the origin is asked for what {able} has"
        else:
            assert isinstance(fetch.via, bytes)
            peer = self.peers[fetch.via]
            assert peer.present
            assert chunks <= peer.holds.get(fetch.blob, set()), "a peer is asked for what it has not got"
            assert self.now >= peer.rests_until, "a peer that rests is asked"
            assert self.now >= peer.liar_until, "a liar is asked again"
            if peer.remote:
                assert "remote" in self.prefer, "another datacenter is asked"
                assert not self._usable_holders(fetch.blob, fetch.chunks[0]), "it is asked for what is near"

    def _usable_holders(self, blob: bytes, chunk: int) -> list[bytes]:
        near = [peer for peer in self.peers.values() if not peer.remote and self._usable(peer)]
        return [peer.name for peer in near if chunk in peer.holds.get(blob, ())]

    def _check_state(self) -> None:
        via_peer: dict[bytes, list[Flight]] = {}
        for flight in self.flights.values():
            if isinstance(flight.fetch.via, bytes):
                via_peer.setdefault(flight.fetch.via, []).append(flight)
        assert sum(flight.fetch.via is Via.ORIGIN for flight in self.flights.values()) <= self.streams
        assert sum(flight.fetch.via is Via.LOCAL for flight in self.flights.values()) <= rules.LOCAL_CHUNKS
        assert self.owed_once() < limits.HOST_BYTES + CHUNK
        for name in via_peer:
            assert self.owed(self.peers[name]) < limits.PEER_BYTES + CHUNK
            assert len(via_peer[name]) <= limits.PEER_CHUNKS
        if self.unfinished:
            assert self._wake is not None, "a load sleeps without an alarm"
        if self.flights or not self._is_idle():
            self.quiet_since = self.now
        # The planner's own books say the same.
        mine = self.planner
        assert mine._requests.keys() == self.flights.keys()
        assert {n: set(r.pending) for n, r in mine._requests.items()} == {n: f.pending for n, f in self.flights.items()}
        assert mine._peers.owed == self.owed()
        assert len(mine._deadlines) <= 64 + 4 * len(mine._requests)
        assert len(mine._late) <= 64 + 2 * len(mine._requests)
        assert len(mine._pauses) <= 64

    def _is_idle(self) -> bool:
        """Nothing is on its way: whether somebody could have been asked. That may be others' turn, for a while."""
        found = False
        for blob in self.unfinished:
            wanted = self.wanted[blob]
            for chunk in set(range(len(wanted.plan))) - wanted.had:
                assert chunk not in wanted.local, "the copy on this disk is forgotten"
                idle = [n for n in self._usable_holders(blob, chunk) if self.now >= self.peers[n].busy_until]
                assert not idle or self.now <= self.quiet_since + TURN, f"{idle} could be asked, and nobody is"
                found = found or bool(idle)
        return found

    def check_clean(self) -> None:
        """All loads have ended: nothing of them is left."""
        mine = self.planner
        assert not self.flights
        assert not mine._requests
        assert not mine._loads
        assert not mine._queues
        assert (mine._peers.owed, mine._peers.owing, mine._reading, mine._copying) == (0, 0, 0, 0)
        assert all(mine._peers[name].chunks == 0 for name in self.peers if mine._peers.get(name))
