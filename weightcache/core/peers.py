"""The peers as this host knows them: what each owes, how fast it is, whether it may be asked.

A peer is *open* (may be asked), *busy* (owes enough for now, or said so: worth waiting for), or neither (it rests after
a failure, or has yet to answer the one request that it was given to prove itself).

Sets of peers are integers, a bit each: "who has this chunk and may be asked" costs one `&`, for ten peers as for a
thousand. A peer's bit is its *slot*; the slot of one that left is given to the next that comes.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

from weightcache.core.bits import members
from weightcache.core.events import Peer

HOST_BYTES = 256 << 20  # peers that together owe this much are asked for no more,
HOST_LEAST, HOST_SECONDS = 16 << 20, 1.0  # nor those that owe this much, and what takes them so long
PEER_BYTES = 128 << 20  # a peer that owes this much is asked for no more: 16 MiB to each of eight processes
PEER_CHUNKS = 64
PEER_SECONDS = 0.1  # nor one that owes what takes it this long
UNPROVEN_CHUNKS = 2  # nor one that owes this many and never delivered any
FIRST_RATE = 100e6  # bytes/s believed of a peer before it has sent anything
LINK_RATE = 50e6  # bytes/s believed of this host's own link before anything has come: little is asked ahead
LEAST_RATE = 1e3  # bytes/s: no peer is believed slower, or it would never be tried again
RATE_WINDOW = 0.05  # seconds of delivering that make a measurement: chunks arrive in bursts
SENDERS = 16  # that owe something at once: others are asked only for what none of these has
DRAWN = 4  # holders among which one is sampled when there are many
NEVER = float("inf")


@dataclass(slots=True)
class PeerState:
    name: Peer
    slot: int
    rate: float = FIRST_RATE
    owed: int = 0  # bytes
    chunks: int = 0
    rests_until: float = -NEVER  # after a failure
    busy_until: float = -NEVER  # by its own word
    busy_since: float = -NEVER  # it says so again and again, and delivers nothing
    failures: int = 0  # since it last delivered
    delivered: float = -NEVER  # when it last did
    gone: bool = False  # it left while it rested
    window_bytes: int = 0
    window_seconds: float = 0.0
    window_at: float = 0.0

    @property
    def full(self) -> bool:
        """Whether it owes as much as it should."""
        if self.chunks >= (PEER_CHUNKS if self.delivered > -NEVER else UNPROVEN_CHUNKS):
            return True
        return self.chunks > 0 and self.owed >= min(PEER_BYTES, PEER_SECONDS * self.rate)

    def deliver(self, length: int, now: float) -> None:
        """From what it delivers while it owes anything its rate is learned."""
        self.window_bytes += length
        self.window_seconds += now - self.window_at
        self.window_at = now
        if self.window_seconds >= RATE_WINDOW:
            self.rate += 0.3 * (self.window_bytes / self.window_seconds - self.rate)
            self.window_bytes, self.window_seconds = 0, 0.0

    def slower(self, rate: float) -> None:
        """It is no faster than this."""
        self.rate = max(LEAST_RATE, min(self.rate, rate))


class Peers:
    """All that are known. ``open``, ``busy``, ``owing`` and ``remote`` (those of other datacenters) are sets of slots;
    ``owed`` are the bytes of them all."""

    def __init__(self) -> None:
        self.open = self.busy = self.owing = self.remote = 0
        self.owed = 0
        self._all = PeerState(b"", -1, rate=LINK_RATE)  # what they deliver together: this host may be the slow one
        self._known: dict[Peer, PeerState] = {}
        self._slots: list[PeerState | None] = []
        self._rests: list[tuple[float, Peer]] = []  # heap: when somebody may be asked again

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, name: Peer) -> PeerState:
        return self._known[name]

    def get(self, name: Peer) -> PeerState | None:
        return self._known.get(name)

    @property
    def rate(self) -> float:
        """Bytes per second that they deliver together."""
        return self._all.rate

    @property
    def room(self) -> bool:
        """Whether they may be asked for more: what is asked for late is asked of those who have least to do."""
        return self.owed < min(HOST_BYTES, max(HOST_LEAST, HOST_SECONDS * self._all.rate))

    @property
    def next_rested(self) -> float:
        """When somebody may be asked again."""
        return self._rests[0][0] if self._rests else NEVER

    def meet(self, name: Peer, now: float) -> PeerState:
        """The peer of that name, known already or new."""
        peer = self._known.get(name)
        if peer is None:
            slot = self._slots.index(None) if None in self._slots else len(self._slots)
            peer = self._known[name] = PeerState(name, slot)
            self._slots[slot : slot + 1] = [peer]
            self._weigh(peer, now)
        peer.gone = False
        return peer

    def place(self, peer: PeerState, *, remote: bool) -> None:
        """Where it is."""
        bit = 1 << peer.slot
        self.remote = self.remote | bit if remote else self.remote & ~bit

    def leave(self, peer: PeerState, now: float) -> None:
        """It went away and owes nothing. One that rests is remembered: leaving and coming back clears nothing."""
        peer.gone = True
        if peer.rests_until <= now:
            self.open &= ~(1 << peer.slot)
            self.busy &= ~(1 << peer.slot)
            self.remote &= ~(1 << peer.slot)
            self._slots[peer.slot] = None
            del self._known[peer.name]

    def owe(self, peer: PeerState, length: int, now: float) -> None:
        """One more chunk was asked of it."""
        if not peer.chunks:
            peer.window_at = now  # the time in which it had nothing to do does not count
        if not self.owing:
            self._all.window_at = now
        peer.chunks += 1
        peer.owed += length
        self.owed += length
        self._weigh(peer, now)

    def settle(self, peer: PeerState, length: int, now: float, *, delivered: bool) -> None:
        """It no longer owes a chunk."""
        peer.chunks -= 1
        peer.owed -= length
        self.owed -= length
        if delivered:
            peer.delivered, peer.failures = now, 0
            peer.deliver(length, now)
            self._all.deliver(length, now)
        self._weigh(peer, now)

    def expected(self, peer: PeerState) -> float:
        """In how many seconds it should have delivered what it owes; on a slow link, half of what all of them owe."""
        return max(peer.owed / peer.rate, 0.5 * self.owed / self._all.rate)

    def rest(self, peer: PeerState, until: float, now: float) -> None:
        """It failed: leave it alone."""
        peer.rests_until = max(peer.rests_until, until)
        heapq.heappush(self._rests, (peer.rests_until, peer.name))
        self._weigh(peer, now)

    def pardon(self, name: Peer, now: float) -> None:
        """What it failed with was another's fault: it may be asked again."""
        peer = self._known.get(name)
        if peer is not None:
            peer.rests_until, peer.failures = -NEVER, 0
            self._weigh(peer, now)
            if peer.gone:
                self.leave(peer, now)

    def refuse(self, peer: PeerState, until: float, now: float) -> None:
        """It said that it is busy."""
        peer.busy_until = until
        heapq.heappush(self._rests, (until, peer.name))
        self._weigh(peer, now)

    def rested(self, now: float) -> None:
        """Time has passed: whose rest is over?"""
        while self._rests and self._rests[0][0] <= now:
            peer = self._known.get(heapq.heappop(self._rests)[1])
            if peer is not None:
                self._weigh(peer, now)
                if peer.gone:
                    self.leave(peer, now)

    def askable(self, holders: int) -> int:
        """Those of ``holders`` that may be asked now; when many send already, a new one only where none of them can."""
        if self.owing.bit_count() >= SENDERS and (senders := holders & self.owing & (self.open | self.busy)):
            return senders & self.open
        return holders & self.open

    def sample(self, among: int, length: int, draw: random.Random, demand: Callable[[int], int] | None = None) -> Peer:
        """One of a set of peers (not empty) for a chunk of ``length``: the less it owes for its rate, and the less is
        in ``demand`` that it has, the likelier."""
        drawn = []
        if among.bit_count() <= SENDERS:
            drawn = [self._slots[slot] for slot in members(among)]
        while len(drawn) < DRAWN < SENDERS < among.bit_count():
            slot = int(draw.random() * len(self._slots))
            if among >> slot & 1:
                drawn.append(self._slots[slot])
        found = [peer for peer in drawn if peer is not None]
        weights = [peer.rate / (peer.owed + length) for peer in found]
        if demand is not None:
            weights = [weight / demand(peer.slot) for weight, peer in zip(weights, found, strict=True)]
        return draw.choices(found, weights)[0].name

    def _weigh(self, peer: PeerState, now: float) -> None:
        """Something about it changed: is it open, busy, or neither?"""
        bit = 1 << peer.slot
        self.open &= ~bit
        self.busy &= ~bit
        self.owing = self.owing | bit if peer.chunks else self.owing & ~bit
        if peer.rests_until > now or (peer.failures and peer.chunks):
            return
        if peer.busy_until > now or peer.full:
            self.busy |= bit
        else:
            self.open |= bit
