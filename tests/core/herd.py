"""A fleet in virtual time: real planners, joined by a network with links of so many bytes a second, and one origin.

Every transfer takes its share of the sender's way out (for reads: of what the origin gives to all) and of the
receiver's way in; those under way share each of them evenly. One host sends another one chunk at a time. What a host
gets or begins to read it tells the others as daemons do: the first in batches, and either takes a while to arrive.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from weightcache.core.bitmap import ChunkSet
from weightcache.core.events import (
    Cancel,
    Done,
    Event,
    Fetch,
    GiveUp,
    Got,
    LoadAdded,
    PeerGot,
    PeerHas,
    PeerLeft,
    PeerQuits,
    PeerReads,
    Reach,
    Tick,
    Wake,
)
from weightcache.core.layout import ChunkPlan
from weightcache.core.planner import Planner

BLOB = b"b" * 32
BATCH = 0.02  # seconds of news in one message
LATENCY = 0.005  # of a message
FIRST_BYTE = 0.03  # of the origin
END_OF_TIME = 600.0


@dataclass(eq=False)
class Transfer:
    """One request under way: its chunks arrive one after the other."""

    host: Host
    fetch: Fetch
    lengths: list[int]
    sender: Host | None  # None: the origin
    begun: bool = False
    arrived: int = 0  # chunks
    left: float = 0.0  # bytes of the chunk that comes now
    rate: float = 0.0


@dataclass(eq=False)
class Host:
    name: bytes
    planner: Planner
    link: float  # bytes/s, each way
    had: set[int] = field(default_factory=set)
    transfers: dict[int, Transfer] = field(default_factory=dict)
    news: list[int] = field(default_factory=list)
    listeners: list[Host] = field(default_factory=list)
    knows: Callable[[Host], bool] = lambda other: True
    loading: bool = False
    alive: bool = True
    wake: float | None = None
    end: Done | GiveUp | None = None
    ended_at: float = 0.0


class Herd:
    """Hosts that load one blob of equal chunks. ``egress``: bytes that the origin has sent."""

    def __init__(
        self,
        seed: int,
        hosts: int,
        plan: ChunkPlan,
        link: float,
        origin: float,
        reach: Reach = Reach.RANGED,
        prefer: tuple[str, ...] = (),
    ) -> None:
        self.random = random.Random(seed)
        self._prefer = prefer
        self.plan, self.origin, self.reach = plan, origin, reach
        self.now = self.egress = 0.0
        self.hosts = [self._host(self.random.randbytes(32), link) for _ in range(hosts)]
        self._active: dict[Transfer, None] = {}
        self._queues: dict[tuple[Host, Host], list[Transfer]] = {}  # (sender, receiver): the first is active
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def _host(self, name: bytes, link: float) -> Host:
        return Host(name, Planner(self.random.getrandbits(32), me=name, prefer=self._prefer), link)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._numbers), what))

    # -- where hosts are

    def remote(self, one: Host, other: Host) -> bool:
        """Whether they are in different datacenters."""
        return False

    def _is_outside(self, host: Host, sender: Host | None) -> bool:
        return sender is None or self.remote(host, sender)

    def arrives(self, host: Host, sender: Host | None, chunk: int) -> None:
        """A chunk has arrived."""

    # -- what hosts do

    def start(self, host: Host) -> None:
        """It asks everybody what they have, and loads."""
        host.loading = True
        holders: list[tuple[bytes, ChunkSet | None]] = []
        readers = []
        for other in self.hosts:
            if other is host or not other.alive or not host.knows(other):
                continue
            other.listeners.append(host)
            if other.loading:
                self.feed(other, PeerReads(host.name, BLOB, ()))
                host.listeners.append(other)
                outside = (t for t in other.transfers.values() if self._is_outside(other, t.sender))
                reads = [chunk for transfer in outside for chunk in transfer.fetch.chunks[transfer.arrived :]]
                readers.append((other.name, reads))
            if other.had:
                all_of_it = len(other.had) == len(self.plan)
                holders.append((other.name, None if all_of_it else ChunkSet(len(self.plan), other.had)))
        had = ChunkSet(len(self.plan))
        self.feed(host, LoadAdded(BLOB, self.plan, had, 1, self.reach, holders=holders, readers=readers))

    def kill(self, host: Host) -> None:
        host.alive = False
        for transfer in list(self._active):
            if transfer.host is host or transfer.sender is host:
                del self._active[transfer]
        for other in self.hosts:
            if other is not host and other.alive:
                self.feed(other, PeerLeft(host.name))

    def feed(self, host: Host, event: Event) -> None:
        if not host.alive:
            return
        for action in host.planner.handle(event, self.now):
            match action:
                case Fetch():
                    self._fetch(host, action)
                case Cancel(request):
                    self._over(host.transfers.pop(request))
                case Wake(at):
                    host.wake = at
                    self.at(at, partial(self._tick, host, at))
                case Done() | GiveUp():
                    host.end, host.ended_at, host.loading = action, self.now, False
                    if isinstance(action, Done):
                        assert len(host.had) == len(self.plan)
                    self._tell(host, PeerHas(host.name, BLOB, None) if host.had else PeerQuits(host.name, BLOB))

    def _tick(self, host: Host, at: float) -> None:
        if host.wake == at:
            host.wake = None
            self.feed(host, Tick())

    def _fetch(self, host: Host, fetch: Fetch) -> None:
        sender = next((other for other in self.hosts if other.name == fetch.via), None)
        assert sender is None or set(fetch.chunks) <= sender.had, "a peer is asked for what it has not got"
        lengths = [self.plan.span(chunk)[1] for chunk in fetch.chunks]
        transfer = host.transfers[fetch.request] = Transfer(host, fetch, lengths, sender, left=lengths[0])
        if self._is_outside(host, sender):
            self._tell(host, PeerReads(host.name, BLOB, fetch.chunks))
        self.at(self.now + (FIRST_BYTE if sender is None else 2 * LATENCY), partial(self._begin, transfer))

    def _begin(self, transfer: Transfer) -> None:
        host, sender = transfer.host, transfer.sender
        if not host.alive or transfer.fetch.request not in host.transfers or (sender is not None and not sender.alive):
            return
        if sender is not None:
            queue = self._queues.setdefault((sender, host), [])
            queue.append(transfer)
            if len(queue) > 1:
                return
        self._active[transfer] = None

    def _over(self, transfer: Transfer) -> None:
        """It has ended, or was called off."""
        self._active.pop(transfer, None)
        queue = self._queues.get((transfer.sender, transfer.host), []) if transfer.sender is not None else []
        if transfer in queue:
            queue.remove(transfer)
            if queue:
                self._active[queue[0]] = None

    def _announce(self, host: Host, chunk: int) -> None:
        if not host.news:
            self.at(self.now + BATCH, partial(self._flush, host))
        host.news.append(chunk)

    def _flush(self, host: Host) -> None:
        news, host.news = host.news, []
        self._tell(host, PeerGot(host.name, BLOB, news))

    def _tell(self, host: Host, event: Event) -> None:
        for other in host.listeners if host.alive else ():
            self.at(self.now + LATENCY, partial(self.feed, other, event))

    # -- time

    def run(self) -> None:
        """Until every living host has ended."""
        while any(host.alive and host.end is None for host in self.hosts):
            assert self.now < END_OF_TIME, "it takes for ever"
            self._share()
            soonest = min(((t.left / t.rate, t) for t in self._active), key=lambda pair: pair[0], default=None)
            due = self._due[0][0] if self._due else float("inf")
            if soonest is not None and self.now + soonest[0] < due:
                self._pass(soonest[0])
                self._arrive(soonest[1])
            else:
                assert due < float("inf"), "everybody sleeps"
                self._pass(max(0.0, due - self.now))
                heapq.heappop(self._due)[2]()

    def _share(self) -> None:
        ways_in: dict[Host, int] = {}
        ways_out: dict[Host | None, int] = {}
        for transfer in self._active:
            ways_in[transfer.host] = ways_in.get(transfer.host, 0) + 1
            ways_out[transfer.sender] = ways_out.get(transfer.sender, 0) + 1
        for transfer in self._active:
            given = transfer.sender.link if transfer.sender is not None else self.origin
            shares = given / ways_out[transfer.sender], transfer.host.link / ways_in[transfer.host]
            transfer.rate = min(shares)

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        for transfer in self._active:
            transfer.left -= seconds * transfer.rate
            if transfer.sender is None:
                self.egress += seconds * transfer.rate

    def _arrive(self, transfer: Transfer) -> None:
        host, chunk = transfer.host, transfer.fetch.chunks[transfer.arrived]
        transfer.arrived += 1
        if transfer.arrived < len(transfer.lengths):
            transfer.left = transfer.lengths[transfer.arrived]
        else:
            del host.transfers[transfer.fetch.request]
            self._over(transfer)
        self.arrives(host, transfer.sender, chunk)
        if chunk not in host.had:
            host.had.add(chunk)
            self._announce(host, chunk)
            self.feed(host, Got(transfer.fetch.request, chunk))
