"""A fleet in virtual time: real planners, joined by a network, and one origin.

Theory of operation. Each host runs the planner that ships. What a planner asks for becomes a transfer: after the
latency of its question it waits in the *lane* between the two hosts, which carries one chunk after the other, whole:
what has not arrived in full, and been checked, is not had and is served to nobody. What a host gets it tells its
neighbours in batches, what it begins to read at once, as daemons do; either takes the latency of a message.

In a fleet of more than APART hosts those that see everybody share one list of who loads and reads what, so that
thousands cost no square of that. Otherwise, and who sees but some of the others, keep their own, as every daemon does.

A referee watches: see ``Broken``. All randomness comes from one seed.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from xxhash import xxh3_128

from weightcache.core import events as said
from weightcache.core.bitmap import ChunkSet
from weightcache.core.bits import members
from weightcache.core.events import Event, Fetch, OfPeer, Peer, Reach, Via
from weightcache.core.layout import CHUNK, ChunkPlan
from weightcache.core.neighbours import FEW, Crowd
from weightcache.core.peers import HOST_BYTES
from weightcache.core.planner import HEDGE_BYTES, HEDGE_SHARE, Planner
from weightcache.tools.sim_network import NEVER, Clock, Flow, Network, Port
from weightcache.tools.sim_roll import Roll

BATCH = 0.02  # seconds of news in one message
FIRST_BYTE = 0.03  # seconds, of the origin
STREAMS = 8  # reads of one host at once
END_OF_TIME = 3600.0
APART = 256  # hosts, up to which each keeps its own list
SAMPLED = 16  # one decision of so many is timed: the clock costs as much as some
MOST_REQUESTS = 200  # by one host, for one chunk: more is for ever


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True, slots=True)
class Blob:
    """What is loaded; those of lower rank come first."""

    name: bytes
    plan: ChunkPlan
    rank: int = 1
    reach: Reach = Reach.RANGED

    @property
    def all(self) -> int:
        """All of its chunks, as a set of bits."""
        return (1 << len(self.plan)) - 1


def everybody(other: Host) -> bool:
    return True


def _outside(host: Host, sender: Host | None) -> bool:
    """Whether what it sends is read from outside of the host's datacenter."""
    return sender is None or sender.place != host.place


class Transfer:
    """One request under way: its chunks arrive one after the other."""

    __slots__ = ("arrived", "fetch", "flow", "host", "over", "sender")

    def __init__(self, host: Host, fetch: Fetch, sender: Host | None) -> None:
        self.host, self.fetch, self.sender = host, fetch, sender  # no sender: the origin
        self.arrived = 0  # chunks
        self.flow: Flow | None = None  # while its bytes move
        self.over = False


@dataclass(eq=False, slots=True)
class Host:
    """``had``, ``ended``, ``crowds``: by blob. ``knows``: whom it sees. ``told``: who heard its news last. ``place``:
    its datacenter."""

    name: Peer
    planner: Planner
    up: Port
    down: Port
    lies: bool = False
    place: int = 0
    alive: bool = True
    began: float = 0.0
    knows: Callable[[Host], bool] = everybody
    crowds: dict[bytes, Crowd] = field(default_factory=dict)
    told: dict[bytes, tuple[Peer, ...]] = field(default_factory=dict)
    met: dict[Peer, None] = field(default_factory=dict)  # who ever heard of it
    had: dict[bytes, int] = field(default_factory=dict)
    loading: dict[bytes, Blob] = field(default_factory=dict)
    ended: dict[bytes, tuple[float, str]] = field(default_factory=dict)  # when, and why it failed ("": it did not)
    transfers: dict[int, Transfer] = field(default_factory=dict)
    lanes: dict[Peer, deque[Transfer]] = field(default_factory=dict)  # from each sender: the first one moves
    news: dict[bytes, list[int]] = field(default_factory=dict)
    wake: float = NEVER
    requests: dict[tuple[bytes, int], int] = field(default_factory=dict)
    owed: int = 0  # bytes that peers owe it
    reading: int = 0
    asked: int = 0  # bytes, ever
    twice: int = 0  # of these, while another was asked for them, too
    came: int = 0  # bytes, ever
    came_first: int = 0  # of these, when the first of its loads ended


class Fleet:
    """Hosts that load blobs, at links of ``link`` bytes/s each way; ``origin`` is what the origin gives to all."""

    def __init__(
        self, seed: int, blobs: Iterable[Blob], link: float, origin: float, latency: float = 0.005,
        prefer: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.random = random.Random(seed)
        self.blobs = {blob.name: blob for blob in blobs}
        self.clock = Clock()
        self.hosts: dict[Peer, Host] = {}
        self.origin = Port(origin)
        self.messages = 0  # of control, ever: news of chunks,
        self.greetings = 0  # and who loads what, a few for each load and pair of hosts
        self.decisions = 0
        self.thinking = 0.0  # CPU seconds of this machine, in planners
        self.trace = xxh3_128()  # of all that was asked for, and when
        self.crossed = 0  # bytes, between datacenters
        self._link, self._latency, self._prefer = link, latency, prefer
        self._network = Network(self.clock)
        self._unfinished: dict[Peer, None] = {}  # hosts that live, and load or will
        self._rolls = {name: Roll(name) for name in self.blobs}
        self._apart: bool | None = None  # whether every host keeps its own list; known when the first one loads
        self._choosy: dict[Peer, Host] = {}  # hosts that load, and keep their own list

    @property
    def now(self) -> float:
        return self.clock.now

    @property
    def unfinished(self) -> int:
        """How many hosts live, and load or will."""
        return len(self._unfinished)

    @property
    def egress(self) -> float:
        """Bytes that the origin has sent."""
        return self.origin.carried

    def add(self, link: float | None = None, *, lies: bool = False, warm: bool = False, place: int = 0) -> Host:
        """One more host. It does nothing yet; a warm one has everything."""
        rate = link or self._link
        name = self.random.randbytes(32)
        crowds: dict[bytes, Crowd] = {}
        draw = self.random.getrandbits(32)
        planner = Planner(draw, STREAMS, me=name, prefer=self._prefer, crowds=crowds.__getitem__)
        host = self.hosts[name] = Host(name, planner, Port(rate), Port(rate), lies, place, crowds=crowds)
        if warm:
            host.had = {blob.name: blob.all for blob in self.blobs.values()}
        return host

    # -- what hosts do

    def start(self, host: Host, when: float = 0.0) -> None:
        """It asks everybody what they have, at ``when``; after a round trip it knows, and loads."""
        host.began = when
        self._unfinished[host.name] = None
        self.clock.at(when + 2 * self._latency, partial(self._load, host))

    def _load(self, host: Host) -> None:
        if not host.alive:
            return
        host.loading = dict(self.blobs)
        if self._apart is None:
            self._apart = len(self.hosts) <= APART
        if host.knows is not everybody or self._apart:
            self._choosy[host.name] = host
        seen = [other for other in self.hosts.values() if other is not host and other.alive and host.knows(other)]
        self.greetings += 2 * len(seen)
        for other in seen:
            if other.place != host.place:
                self.feed(host, said.PeerMet(other.name, remote=True))
                self.feed(other, said.PeerMet(host.name, remote=True))
        for blob in sorted(self.blobs.values(), key=lambda blob: blob.rank):
            self._enter(host, blob, seen)

    def _enter(self, host: Host, blob: Blob, seen: list[Host]) -> None:
        """It begins to load a blob: whoever will tell it news tells what there is."""
        roll = self._rolls[blob.name]
        crowd = host.crowds[blob.name] = Crowd(blob.name) if host.name in self._choosy else roll
        members = [other for other in seen if blob.name in other.loading]
        roll.enter(host.name)
        if crowd is not roll:
            for name in (host.name, *(other.name for other in members if other.place == host.place)):
                crowd.join(name)
        near = {name: self.hosts[name] for name in self._near(host, blob.name)}
        near |= {name: other for name, other in self._choosy.items() if other is not host and other.loading}
        told = [other for other in (near.values() if crowd is roll else members) if host.knows(other)]
        for other in told:
            host.met[other.name] = other.met[host.name] = None
            self.feed(other, said.PeerReads(host.name, blob.name, ()))
        whole = [other for other in seen if other.had.get(blob.name) == blob.all]
        if len(whole) > FEW:
            whole = self.random.sample(whole, FEW)
        some = [other for other in told if other.had.get(blob.name)]
        for other in whole:
            other.met[host.name] = None
        holders = [(other.name, self._state(other, blob)) for other in dict.fromkeys((*whole, *some))]
        readers = [(other.name, self._reads(other, blob)) for other in told]
        host.told[blob.name] = self._near(host, blob.name)
        had = ChunkSet(len(blob.plan))
        self.feed(
            host, said.LoadAdded(blob.name, blob.plan, had, blob.rank, blob.reach, holders=holders, readers=readers)
        )

    def _near(self, host: Host, blob: bytes) -> tuple[Peer, ...]:
        """Who hears its news of a blob."""
        return tuple(name for name in host.crowds[blob].rings.near(host.name) if name in self.hosts)

    def _leave(self, host: Host, blob: bytes) -> None:
        """It loads a blob no more: whom it parted are neighbours now, and tell each other what they have."""
        roll = self._rolls[blob]
        parted = roll.rings.near(host.name)
        roll.leave(host.name)
        for name in parted:
            if (other := self.hosts.get(name)) is not None and blob in other.loading:
                self._listeners(other, blob)

    def _listeners(self, host: Host, blob: bytes) -> tuple[Peer, ...]:
        """Who hears its news of a blob; who is new among them hears what it has."""
        near = host.crowds[blob].rings.near(host.name)
        before = host.told.get(blob, ())
        if near is before:
            return near
        host.told[blob] = near
        known = frozenset(before)
        new = [name for name in near if name not in known and name in self.hosts]
        if new:
            reads = said.PeerReads(host.name, blob, self._reads(host, self.blobs[blob]))
            got = said.PeerGot(host.name, blob, tuple(members(host.had.get(blob, 0))))
            host.met.update(dict.fromkeys(new))
            for event in (reads, got):
                self._send(new, event)
        return near

    def _state(self, host: Host, blob: Blob) -> ChunkSet | None:
        had = host.had[blob.name]
        return None if had == blob.all else ChunkSet(len(blob.plan), members(had))

    def _reads(self, host: Host, blob: Blob) -> list[int]:
        reads = [t for t in host.transfers.values() if _outside(host, t.sender) and t.fetch.blob == blob.name]
        return [chunk for transfer in reads for chunk in transfer.fetch.chunks[transfer.arrived :]]

    def kill(self, host: Host) -> None:
        """It dies: its connections end."""
        if not host.alive:
            return
        host.alive = False
        self._unfinished.pop(host.name, None)
        del self.hosts[host.name]
        for transfer in list(host.transfers.values()):
            self._stop(transfer)
        for blob in host.loading:
            self._leave(host, blob)
        self._choosy.pop(host.name, None)
        for other in self.hosts.values():
            for transfer in list(other.lanes.get(host.name, ())):
                self._stop(transfer)
        heirs = {name: None for blob in host.loading for name in self._rolls[blob].next(self.blobs[blob].plan)}
        met = [self.hosts[name] for name in {**host.met, **self._choosy, **heirs} if name in self.hosts]
        self.clock.at(self.now + self._latency, partial(self._deliver, met, said.PeerLeft(host.name)))

    def feed(self, host: Host, event: Event) -> None:
        """One event for a host's planner, and what the planner makes of it."""
        if not host.alive:
            return
        self.decisions += 1
        if self.decisions % SAMPLED:
            actions = host.planner.handle(event, self.now)
        else:
            began = time.process_time()
            actions = host.planner.handle(event, self.now)
            self.thinking += SAMPLED * (time.process_time() - began)
        for action in actions:
            match action:
                case Fetch():
                    self._fetch(host, action)
                case said.Cancel(request):
                    if (transfer := host.transfers.pop(request, None)) is not None:
                        self._over(transfer)
                case said.Wake(at):
                    if host.wake > at or host.wake <= self.now:
                        host.wake = at
                        self.clock.at(at, partial(self._tick, host, at))
                case said.Done(blob):
                    if host.had.get(blob, 0) != self.blobs[blob].all:
                        raise Broken("a load is done that is not")
                    self._ended(host, blob, "", said.PeerHas(host.name, blob, None))
                case said.GiveUp(blob, _, why):
                    if not why.strip():
                        raise Broken("a load fails without a reason")
                    self._ended(host, blob, why, said.PeerQuits(host.name, blob))

    def _ended(self, host: Host, blob: bytes, why: str, news: OfPeer) -> None:
        host.came_first = host.came_first or host.came
        host.ended[blob] = self.now, why
        del host.loading[blob]
        host.news.pop(blob, None)
        self._tell(host, blob, news)
        self._leave(host, blob)
        self.greetings += 2 * (len(self.hosts) - 1)  # that it has all, and wants no more news: to everybody
        if not host.loading:
            self._unfinished.pop(host.name, None)
            self._choosy.pop(host.name, None)

    def _tick(self, host: Host, at: float) -> None:
        if host.wake == at:
            host.wake = NEVER
            self.feed(host, said.Tick())

    # -- transfers

    def _fetch(self, host: Host, fetch: Fetch) -> None:
        sender = self.hosts.get(fetch.via) if isinstance(fetch.via, bytes) else None
        self._check(host, fetch, sender)
        self.trace.update(f"{self.now!r} {fetch!r}".encode())
        transfer = host.transfers[fetch.request] = Transfer(host, fetch, sender)
        if fetch.via is Via.ORIGIN:
            host.reading += 1
            self._say_reads(host, fetch.blob, fetch.chunks)
            self.clock.at(self.now + FIRST_BYTE, partial(self._read, transfer))
        elif sender is not None:  # else it has just died: that news is on its way
            host.owed += self._length(fetch, 0)
            if _outside(host, sender):
                self._say_reads(host, fetch.blob, fetch.chunks)
            self.clock.at(self.now + 2 * self._latency, partial(self._queue, transfer, sender))

    def _length(self, fetch: Fetch, index: int) -> int:
        return self.blobs[fetch.blob].plan.span(fetch.chunks[index])[1]

    def _read(self, transfer: Transfer) -> None:
        if not transfer.over:
            self._move(transfer, self.origin)

    def _queue(self, transfer: Transfer, sender: Host) -> None:
        if transfer.over or not sender.alive:
            return
        lane = transfer.host.lanes.setdefault(sender.name, deque())
        lane.append(transfer)
        if len(lane) == 1:
            self._move(transfer, sender.up)

    def _move(self, transfer: Transfer, port: Port) -> None:
        transfer.flow = Flow(
            port, transfer.host.down, self._length(transfer.fetch, transfer.arrived), partial(self._arrive, transfer)
        )
        self._network.begin(transfer.flow)

    def _arrive(self, transfer: Transfer) -> None:
        host, fetch, flow = transfer.host, transfer.fetch, transfer.flow
        assert flow is not None
        blob, chunk = self.blobs[fetch.blob], fetch.chunks[transfer.arrived]
        transfer.arrived += 1
        if transfer.arrived < len(fetch.chunks):
            self._network.more(flow, self._length(fetch, transfer.arrived), partial(self._arrive, transfer))
        else:
            del host.transfers[fetch.request]
            self._over(transfer)
        if transfer.sender is not None and transfer.sender.lies:
            self.feed(host, said.Failed(fetch.request, said.Kind.MISMATCH, "other bytes"))
            return
        if transfer.sender is not None and _outside(host, transfer.sender):
            self.crossed += blob.plan.span(chunk)[1]
        had = host.had.get(blob.name, 0)
        if not had >> chunk & 1:
            host.had[blob.name] = had | 1 << chunk
            host.came += blob.plan.span(chunk)[1]
            self._announce(host, blob.name, chunk)
            self.feed(host, said.Got(fetch.request, chunk))

    def _over(self, transfer: Transfer) -> None:
        """It has ended, or was called off: the next of its lane may go."""
        host, sender, flow = transfer.host, transfer.sender, transfer.flow
        if transfer.over:
            return
        transfer.over = True
        if sender is None:
            host.reading -= transfer.fetch.via is Via.ORIGIN
            blob = transfer.fetch.blob
            many = len(self._rolls[blob]) > FEW + 1
            if many and transfer.fetch.via is Via.ORIGIN and not self._reads(host, self.blobs[blob]):
                self._say_reads(host, blob, ())  # others wait for that
        else:
            host.owed -= self._length(transfer.fetch, 0)
            if (lane := host.lanes.get(sender.name)) is not None and transfer in lane:
                lane.remove(transfer)
                if flow is not None and lane:
                    following = lane[0]
                    following.flow, transfer.flow = flow, None
                    self._network.more(flow, self._length(following.fetch, 0), partial(self._arrive, following))
                    return
        if flow is not None:
            self._network.end(flow)

    def _stop(self, transfer: Transfer) -> None:
        """No byte of it will come; its host has yet to hear."""
        if (flow := transfer.flow) is not None:
            transfer.flow = None
            self._network.end(flow)

    # -- news

    def _announce(self, host: Host, blob: bytes, chunk: int) -> None:
        if not host.news:
            self.clock.at(self.now + BATCH, partial(self._flush, host))
        host.news.setdefault(blob, []).append(chunk)

    def _flush(self, host: Host) -> None:
        news, host.news = host.news, {}
        for blob, chunks in news.items():
            self._tell(host, blob, said.PeerGot(host.name, blob, chunks))

    def _tell(self, host: Host, blob: bytes, event: OfPeer) -> None:
        if not host.alive:
            return
        all_hear = isinstance(event, said.PeerHas | said.PeerQuits)
        others = [name for name, other in self._choosy.items() if all_hear or other.place != host.place]
        self._send(dict.fromkeys((*self._listeners(host, blob), *others)), event)

    def _send(self, names: Iterable[Peer], event: OfPeer) -> None:
        hosts = [self.hosts[name] for name in names if name in self.hosts and name != event.peer]
        if hosts:
            if not isinstance(event, said.PeerHas | said.PeerQuits):
                self.messages += len(hosts)
            self.clock.at(self.now + self._latency, partial(self._deliver, hosts, event))

    def _deliver(self, listeners: list[Host], event: OfPeer | said.PeerLeft) -> None:
        for listener in listeners:
            if listener.loading:
                self.feed(listener, event)

    def _say_reads(self, host: Host, blob: bytes, chunks: Sequence[int]) -> None:
        """All who load the blob hear what is read: each chunk is read but once."""
        roll = self._rolls[blob]
        roll.reads.say(host.name, chunks, self.now)
        names = {**dict.fromkeys(roll.next(self.blobs[blob].plan)), **self._choosy}
        self.messages += max(0, len(roll) - len(names) - 1)
        self._send(names, said.PeerReads(host.name, blob, chunks))

    # -- the referee

    def _check(self, host: Host, fetch: Fetch, sender: Host | None) -> None:
        had = host.had.get(fetch.blob, 0)
        for chunk in fetch.chunks:
            if had >> chunk & 1:
                raise Broken(f"chunk {chunk} is asked for again")
            key = fetch.blob, chunk
            host.requests[key] = host.requests.get(key, 0) + 1
            if host.requests[key] > MOST_REQUESTS:
                raise Broken(f"chunk {chunk} is asked for for ever")
        if sender is not None and not sender.had.get(fetch.blob, 0) >> fetch.chunks[0] & 1:
            raise Broken("a peer is asked for what it has not got")
        if isinstance(fetch.via, bytes):
            length = self._length(fetch, 0)
            host.asked += length
            if any(fetch.chunks[0] in t.fetch.chunks for t in host.transfers.values() if t.fetch.blob == fetch.blob):
                host.twice += length
            if host.twice > HEDGE_SHARE * host.asked + HEDGE_BYTES + CHUNK:
                raise Broken("more is asked for twice than may be")
            if host.owed > HOST_BYTES + HEDGE_BYTES + CHUNK:
                raise Broken("peers owe a host more than they may")
        elif host.reading >= STREAMS:
            raise Broken("more reads at once than may be")

    # -- time

    def run(self, watch: Callable[[], None] | None = None) -> None:
        """Until every living host has ended. Raises Broken."""
        while self._unfinished:
            if not self.clock.step():
                raise Broken("everybody sleeps")
            if self.now > END_OF_TIME:
                raise Broken("it takes for ever")
            if watch is not None:
                watch()
