"""The planner: which chunk from whom, decided from events alone.

Theory of operation. ``handle(event, now)`` changes the state and returns actions; it opens no socket, reads no clock,
and draws only from its own seeded generator, so the daemon and a simulator run the very same decisions.

A *load* is one blob that this host wants. Its missing chunks are taken from random places (a swarm that wants
everything in one order has one queue); loads are served by rank (small files, then text encoders, denoisers, the rest),
and equals take turns. A chunk comes, in this order, from this host's own disk, from a peer that has it, from the
origin. The origin is asked only when no usable peer has the chunk: one that is merely busy is waited for; and of what
the whole swarm lacks, each member reads its share (turns.py), from there or from another datacenter (outside.py).
Which chunk, and from whom, is chosen in choice.py.

Failures route by kind. A peer that failed rests for a growing while, then proves itself with one chunk; one that lied
(wrong bytes, broken protocol) is not asked for LIAR_REST seconds. A request past its soft deadline is hedged, within a
budget; a peer that sent nothing meanwhile rests, so that nothing waits for it; past the hard deadline it is cancelled.
When nothing arrives from anyone, it is this host that is slow: then nothing is asked twice. The origin is retried with
growing, jittered pauses, by one read at a time, at most ``attempts`` times a chunk. What cannot be had from anyone ends
the load with the last reasons: no chunk is asked for forever. One decision looks at a bounded number of chunks and
loads; a heartbeat looks at them all, so that nothing sleeps forever.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from weightcache.core.bits import members_from_anywhere
from weightcache.core.choice import Choice
from weightcache.core.events import (
    LIES,
    Action,
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
    OfPeer,
    Peer,
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
from weightcache.core.layout import CHUNK
from weightcache.core.loads import Load, Request
from weightcache.core.neighbours import Crowd
from weightcache.core.outside import Outside
from weightcache.core.pace import Pace
from weightcache.core.peers import NEVER, Peers, PeerState
from weightcache.core.turns import SETTLE

LOCAL_CHUNKS = 4  # copies from this host's own disk at once
SOFT_DEADLINE, LONGEST_SOFT = 2.0, 30.0  # seconds beyond four times the expected time until a request is hedged
HARD_FACTOR = 4  # times the soft deadline, after which it is cancelled
HEDGE_SHARE, HEDGE_BYTES = 0.05, 4 * CHUNK  # of what was asked for so far, and this much, may be asked for twice
LIAR_REST = 600.0
FIRST_REST, LONGEST_REST = 1.0, 60.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
LONGEST_BUSY = 5.0  # seconds for which a peer's BUSY is believed at a time
BUSY_PATIENCE = 10.0  # a peer that says BUSY for longer and delivers nothing has failed
HEARTBEAT = 5.0
LOADS_SEEN, LATE_SEEN = 8, 4  # looked at in vain before a turn is given up: bounds one decision


class Planner:
    """Decides for the host named ``me``, as its peers know it. ``streams``: reads in flight to origins; rates: bytes/s
    asked of either (None: no cap). ``crowds``: who loads a blob, by name, if this host need not keep that itself."""

    def __init__(
        self,
        seed: int,
        streams: int = 8,
        peer_rate: float | None = None,
        origin_rate: float | None = None,
        me: Peer = b"",
        prefer: Sequence[str] = (),
        crowds: Callable[[bytes], Crowd] = Crowd,
    ) -> None:
        self._me = me
        self._crowds = crowds
        self._outside = Outside(prefer)
        self._random = random.Random(seed)
        self._streams = streams
        self._peer_pace, self._origin_pace = Pace(peer_rate), Pace(origin_rate)
        self._congested = False
        self._loads: dict[bytes, Load] = {}
        self._queues: dict[int, deque[Load]] = {}  # by rank, ascending; whoever is looked at goes to the end
        self._peers = Peers()
        self._choice = Choice(self._peers, self._outside, self._random)
        self._requests: dict[int, Request] = {}
        self._next = 0
        self._deadlines: list[tuple[float, int, bool]] = []  # heap of (when, request, hard)
        self._pauses: list[float] = []  # heap: when an origin may be asked again
        self._late: deque[int] = deque()  # requests to be hedged
        self._beat = NEVER  # the next heartbeat
        self._woken = NEVER  # the Wake that was sent last
        self._arrived = -NEVER  # when any chunk last did
        self._reading = self._copying = 0  # requests at origins, and at this host's own disk
        self._reading_by_rank: dict[int, int] = {}
        self._asked = self._hedged = 0  # bytes, ever
        self._last_rank = NEVER  # loads of higher rank read nothing yet: a sooner one stands in line
        self._out: list[Action] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        """Apply one event at time ``now`` (seconds, monotonic) and return what to do about it."""
        self._out = []
        self._peers.rested(now)
        match event:
            case Got():
                self._got(event, now)
            case Failed():
                self._failed(event, now)
            case PeerGot() | PeerHas() | PeerReads() | PeerQuits():
                self._hear(event, now)
            case PeerMet():
                self._peers.place(self._peers.meet(event.peer, now), remote=event.remote)
            case PeerLeft():
                self._peer_left(event, now)
            case PeerPardoned():
                self._peers.pardon(event.peer, now)
            case LoadAdded():
                self._added(event, now)
            case LoadRemoved():
                self._remove(event.blob, now)
            case Congested():
                self._congested = event.on
            case Tick():
                self._woken = NEVER
        self._pass_deadlines(now)
        self._hedge(now)
        beat = now >= self._beat
        self._dispatch(now, thorough=beat or not self._requests)
        for load in list(self._loads.values()):
            if (beat or (load.spent and not load.flights)) and load.stuck(self._peers, self._congested, now):
                self._give_up(load, *load.last_word(), now)
        self._plan_wake(now)
        return self._out

    def rest(self, peer: Peer, now: float) -> float:
        """For how many more seconds ``peer`` will not be asked, because it failed."""
        known = self._peers.get(peer)
        return max(0.0, known.rests_until - now) if known else 0.0

    def rate(self, peer: Peer) -> float:
        """Bytes per second that ``peer`` delivered lately."""
        known = self._peers.get(peer)
        return known.rate if known else 0.0

    # -- what is wanted, and who has it

    def _added(self, event: LoadAdded, now: float) -> None:
        if event.blob in self._loads:
            return
        load = Load.begin(event, self._me, self._crowds(event.blob), now)
        if not load.left:
            self._out.append(Done(load.blob))
            return
        self._loads[event.blob] = load
        self._queues.setdefault(event.rank, deque()).appendleft(load)
        self._queues = dict(sorted(self._queues.items()))
        for peer, chunks in event.holders:
            self._hear(PeerHas(peer, event.blob, chunks), now)
        for peer, reads in event.readers:
            self._hear(PeerReads(peer, event.blob, reads), now)

    def _remove(self, blob: bytes, now: float) -> None:
        load = self._loads.pop(blob, None)
        if load is None:
            return
        self._queues[load.rank].remove(load)
        if not self._queues[load.rank]:
            del self._queues[load.rank]
        for number in sorted({number for flights in load.flights.values() for number in flights}):
            self._cancel(number, load, now)

    def _hear(self, event: OfPeer, now: float) -> None:
        load = self._loads.get(event.blob)
        if load is not None:
            slot = self._peers.meet(event.peer, now).slot
            far = self._peers.remote >> slot & 1
            self._outside.hear(load, slot, event) if far else load.hear(slot, event, now)
            if isinstance(event, PeerReads) and not far and event.peer < self._me:
                self._give_way(load, event.chunks, now)

    def _give_way(self, load: Load, chunks: Iterable[int], now: float) -> None:
        """Somebody began to read what this host has just begun to read, too: one of the two is enough."""
        for number in sorted({number for chunk in chunks for number in load.flights.get(chunk, ())}):
            request = self._requests[number]
            if request.via is Via.ORIGIN and now < request.sent + SETTLE:
                self._cancel(number, load, now)

    def _peer_left(self, event: PeerLeft, now: float) -> None:
        peer = self._peers.get(event.peer)
        if peer is None:
            return
        self._abandon(peer, now)
        for load in self._loads.values():
            load.leave(peer.slot)
        self._peers.leave(peer, now)

    # -- what came of a request

    def _got(self, event: Got, now: float) -> None:
        request = self._requests.get(event.request)
        if request is None or event.chunk not in request.pending:
            return
        load = self._loads[request.blob]
        if request.outside:
            load.outside_gave(request, now)
        load.left -= 1
        load.progressed = self._arrived = now
        for number in list(load.flights[event.chunk]):  # the hedge that lost, too
            self._land(number, event.chunk, load, now, delivered=number == event.request)
            if number != event.request and number not in self._requests:
                self._out.append(Cancel(number))
        if not load.left:
            self._remove(load.blob, now)
            self._out.append(Done(load.blob))

    def _failed(self, event: Failed, now: float) -> None:
        request = self._requests.get(event.request)
        if request is None:
            return
        load = self._loads[request.blob]
        chunks = self._end(event.request, load, now)
        why = " ".join(f"{event.kind}: {event.detail}".split()).removesuffix(":")
        if event.kind is Kind.FATAL:
            self._give_up(load, event.error, " ".join(event.detail.split()) or why, now)
        elif isinstance(request.via, bytes):
            load.note(request.via, why)
            self._peer_failed(load, self._peers[request.via], chunks, event, now)
        elif request.via is Via.LOCAL:
            for chunk in chunks:
                load.local &= ~(1 << chunk)  # the copy is not what it should be: from elsewhere, then
            self._out.append(Blame(load.blob, Via.LOCAL, event.kind, event.detail, 0.0))
        else:
            load.origin_error = (event.error, f"origin: {why}")
            self._origin_failed(load, chunks, event, now)

    def _peer_failed(self, load: Load, peer: PeerState, chunks: list[int], event: Failed, now: float) -> None:
        if event.kind is Kind.UNKNOWN:
            load.lose(peer.slot)
            load.far.lose(peer.slot)
        elif event.kind is Kind.MISSING:
            load.lack(peer.slot, chunks)
            load.far.lack(peer.slot, chunks)
        elif event.kind in LIES:
            self._rest(load, peer, event.kind, event.detail, LIAR_REST, now)
            self._abandon(peer, now)
        elif event.kind is Kind.BUSY:
            if now > peer.busy_until + BUSY_PATIENCE or peer.delivered > peer.busy_since:
                peer.busy_since = now
            if now > peer.busy_since + BUSY_PATIENCE:
                self._penalize(load, peer, event.kind, event.detail, now)
            else:
                wait = min(max(0.01, event.wait), LONGEST_BUSY)
                self._peers.refuse(peer, now + wait * self._random.uniform(1.0, 1.5), now)
        else:
            self._penalize(load, peer, event.kind, event.detail, now)

    def _penalize(self, load: Load, peer: PeerState, kind: Kind, detail: str, now: float) -> None:
        if peer.rests_until > now:
            return  # one lost connection makes many requests fail: it is counted once
        rest = min(LONGEST_REST, FIRST_REST * 2 ** min(peer.failures, 10)) * self._random.uniform(0.75, 1.25)
        peer.failures += 1
        self._rest(load, peer, kind, detail, rest, now)

    def _rest(self, load: Load, peer: PeerState, kind: Kind, detail: str, rest: float, now: float) -> None:
        self._peers.rest(peer, now + rest, now)
        self._out.append(Blame(load.blob, peer.name, kind, detail, rest))

    def _origin_failed(self, load: Load, chunks: list[int], event: Failed, now: float) -> None:
        load.fail_reads(chunks)
        if now >= load.origin_rests_until:  # one outage makes many reads fail: it is counted once
            pause = FIRST_PAUSE * 2 ** min(load.origin_failures, 10) * self._random.uniform(0.5, 1.5)
            pause = min(LONGEST_PAUSE, max(pause, event.wait))
            load.origin_failures += 1
            load.origin_rests_until = now + pause
            heapq.heappush(self._pauses, load.origin_rests_until)
            self._out.append(Blame(load.blob, Via.ORIGIN, event.kind, event.detail, pause))

    def _give_up(self, load: Load, error: str, message: str, now: float) -> None:
        self._remove(load.blob, now)
        self._out.append(GiveUp(load.blob, error, message))

    # -- requests: made, shortened by what arrives, ended

    def _ask(self, load: Load, where: Where, chunks: list[int], now: float) -> None:
        number = self._next = self._next + 1
        remote = isinstance(where, bytes) and self._peers.remote >> self._peers[where].slot & 1 != 0
        pending = {chunk: load.length(chunk) for chunk in chunks}
        request = self._requests[number] = Request(load.blob, where, pending, now, remote or where is Via.ORIGIN)
        for chunk, length in request.pending.items():
            load.missing &= ~(1 << chunk)
            load.flights.setdefault(chunk, []).append(number)
            self._asked += length
            if isinstance(where, bytes):
                self._peers.owe(self._peers[where], length, now)
                self._peer_pace.spend(length, now)
            elif where is Via.ORIGIN:
                self._origin_pace.spend(length, now)
        if isinstance(where, bytes):
            peer = self._peers[where]
            if peer.failures:
                self._late.append(number)  # it has yet to prove itself: nothing waits for that
            new = load.complete and peer.delivered == -NEVER
            asking = load.turns.members if new else 1  # where somebody has all, the whole swarm asks at once
            soft = min(LONGEST_SOFT, SOFT_DEADLINE + 4 * asking * self._peers.expected(peer))
            heapq.heappush(self._deadlines, (now + soft, number, False))
            heapq.heappush(self._deadlines, (now + HARD_FACTOR * soft, number, True))
        self._count(request, load, 1)
        whole = where is Via.ORIGIN and load.origin is Reach.STREAM
        self._out.append(Fetch(number, load.blob, where, tuple(chunks), whole))

    def _land(self, number: int, chunk: int, load: Load, now: float, *, delivered: bool) -> None:
        """``chunk`` is no longer awaited from request ``number``; a request that awaits nothing is over."""
        request = self._requests[number]
        length = request.pending.pop(chunk)
        load.flights[chunk].remove(number)
        if not load.flights[chunk]:
            del load.flights[chunk]
        if isinstance(request.via, bytes):
            self._peers.settle(self._peers[request.via], length, now, delivered=delivered)
        if request.pending:
            return
        del self._requests[number]
        self._count(request, load, -1)

    def _count(self, request: Request, load: Load, more: int) -> None:
        self._copying += more * (request.via is Via.LOCAL)
        self._reading += more * request.outside
        load.reading += more * request.outside
        self._reading_by_rank[load.rank] = self._reading_by_rank.get(load.rank, 0) + more * request.outside

    def _end(self, number: int, load: Load, now: float) -> list[int]:
        """Nothing more is awaited from request ``number``: what was, and no other request brings, is missing again."""
        chunks = list(self._requests[number].pending)
        for chunk in chunks:
            self._land(number, chunk, load, now, delivered=False)
            if chunk not in load.flights:
                load.missing |= 1 << chunk
        return chunks

    def _cancel(self, number: int, load: Load, now: float) -> None:
        self._end(number, load, now)
        self._out.append(Cancel(number))

    def _abandon(self, peer: PeerState, now: float) -> None:
        """Expect nothing more from ``peer``."""
        if peer.chunks:
            for number, request in list(self._requests.items()):
                if request.via == peer.name:
                    self._cancel(number, self._loads[request.blob], now)

    # -- time

    def _pass_deadlines(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number, hard = heapq.heappop(self._deadlines)
            request = self._requests.get(number)
            if request is None or not isinstance(request.via, bytes):
                continue
            load, peer = self._loads[request.blob], self._peers[request.via]
            silent = peer.delivered < (request.sent + now) / 2
            why = f"{sum(request.pending.values())} bytes did not come within {now - request.sent:.1f} s"
            if hard:
                self._out.append(Cancel(number))
                self._failed(Failed(number, Kind.STALLED, why), now)
                if silent:
                    self._abandon(peer, now)
                continue
            if now > self._arrived + SOFT_DEADLINE and self._peers.owing.bit_count() > 1:
                heapq.heappush(self._deadlines, (now + SOFT_DEADLINE, number, False))  # nothing comes from anyone
                continue
            self._late.append(number)
            if silent:
                load.note(peer.name, f"{Kind.STALLED}: {why}")
                self._penalize(load, peer, Kind.STALLED, why, now)
            else:
                peer.slower(peer.owed / (now - request.sent))

    def _hedge(self, now: float) -> None:
        """Ask somebody else for what is late, too: as soon as there is somebody, and within the budget."""
        for _ in range(min(LATE_SEEN, len(self._late))):
            number = self._late.popleft()
            request = self._requests.get(number)
            if request is None:
                continue
            load = self._loads[request.blob]
            ((chunk, length),) = request.pending.items()
            if len(load.flights[chunk]) > 1:
                continue
            where: Where | None = None
            if self._hedged + length <= HEDGE_SHARE * self._asked + HEDGE_BYTES:
                where = self._elsewhere(load, chunk, length, request.via, now)
            if where is None:
                self._late.append(number)
            else:
                self._hedged += length
                self._ask(load, where, [chunk], now)

    def _elsewhere(self, load: Load, chunk: int, length: int, asked: Where, now: float) -> Where | None:
        """Who else may be asked for a chunk that peer ``asked`` was asked for."""
        known = self._peers.get(asked) if isinstance(asked, bytes) else None
        others = (load.complete | load.holders[chunk]) & ~(1 << known.slot if known else 0)
        if able := others & self._peers.open:
            return self._peers.sample(able, length, self._random)  # even if HOST_BYTES are owed: by those who are late
        usable = self._peers.open | self._peers.busy
        if load.origin is not Reach.RANGED or others & usable or not self._origin_open(load, now):
            return None
        return Via.ORIGIN if load.turns.mine(1 << chunk & ~load.spent, 1 << chunk, usable, now) else None

    def _plan_wake(self, now: float) -> None:
        if not self._loads:
            self._beat = NEVER
        elif self._beat <= now or self._beat == NEVER:
            self._beat = now + HEARTBEAT
        while self._pauses and self._pauses[0] <= now:
            heapq.heappop(self._pauses)
        if len(self._deadlines) > 64 + 4 * len(self._requests):  # most are of requests long answered
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._requests]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][1] not in self._requests:
            heapq.heappop(self._deadlines)
        paces = (self._peer_pace.opens_at(now), self._origin_pace.opens_at(now)) if self._loads else ()
        deadlines = (entry[0] for entry in self._deadlines[:1])
        at = min(self._beat, self._peers.next_rested, self._choice.again, *self._pauses[:1], *deadlines, *paces)
        if at < self._woken or self._woken <= now:
            self._woken = at
            if at < NEVER:
                self._out.append(Wake(at))

    # -- who is asked for what

    def _dispatch(self, now: float, *, thorough: bool) -> None:
        if self._choice.again <= now:
            self._choice.again = NEVER
        self._last_rank = NEVER
        for queue in self._queues.values() if not self._congested else ():
            vain = 0
            while vain < len(queue) and (thorough or vain < LOADS_SEEN):
                load = queue[0]
                queue.rotate(-1)
                vain = 0 if load.missing and self._place(load, now, thorough) else vain + 1

    def _place(self, load: Load, now: float, thorough: bool) -> bool:
        """Make one request for ``load``; whether there was one to make."""
        wanted = load.missing
        if load.local:
            wanted &= ~load.local
            local = load.missing & load.local
            if local and self._copying < LOCAL_CHUNKS:
                self._ask(load, Via.LOCAL, [next(members_from_anywhere(local, self._random))], now)
                return True
        peers, choice, found = self._peers, self._choice, None
        able = peers.room and self._peer_pace.open(now)
        if able and (load.complete | load.partial) & peers.open:
            found = choice.of_peers(load, wanted, now, thorough=thorough)
        if found is None and choice.looks_outside(load, wanted):
            origin = self._origin_open(load, now)
            far = self._outside.may_ask(load, peers, now) if able and self._may_read(load) else 0
            if origin or far:
                found = choice.of_outside(load, wanted, now, origin=origin, far=far, thorough=thorough)
        if found is None:
            if load.turns.waits:
                self._last_rank = min(self._last_rank, load.rank)
            return False
        self._ask(load, *found, now)
        return True

    def _may_read(self, load: Load) -> bool:
        """Whether one more read from outside the own datacenter may be under way."""
        sooner = sum(count for rank, count in self._reading_by_rank.items() if rank < load.rank)
        if load.rank > self._last_rank:
            return False
        return load.reading + sooner < load.turns.at_once(self._streams) and self._reading < self._streams

    def _origin_open(self, load: Load, now: float) -> bool:
        free = self._may_read(load) and not (load.origin_failures and load.reading) and self._origin_pace.open(now)
        return load.origin is not Reach.NONE and free and now >= load.origin_rests_until
