"""How long the planner thinks: microseconds per event, by the number of peers and of loads.

Each scenario brings its loads to the end in virtual time: the oldest request is answered, the planner decides what to
ask for next. One event and its actions count as one decision. "swarm": as many peers have some of the same blob and
announce what they get, in batches; "herd": they load it, too, and each reads its share from the origin.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable

from bench.run import Run
from bench.table import Column, Row, Table, at_most
from weightcache.core.bitmap import ChunkSet
from weightcache.core.events import Done, Event, Fetch, Got, LoadAdded, PeerGot, PeerHas, PeerReads, Reach, Tick, Wake
from weightcache.core.layout import ChunkPlan
from weightcache.core.planner import Planner

MIB = 1 << 20
CHUNKS = 5_000
LOADS = 200
SECONDS_A_CHUNK = MIB / 5e9  # on this host's link
BATCH = 32  # chunks in one announcement
ABOUT = (
    "'news' are the load and what each peer has of it; the rest are answers, in virtual time, until the loads are done."
)
COLUMNS = (
    Column("events", "events", "{:,.0f}"),
    Column("median", "median us", "{:.1f}"),
    Column("mean", "mean us", "{:.1f}", bars=True),
    Column("p99", "p99 us", "{:.1f}"),
    Column("worst", "worst ms"),
)

State = Callable[[random.Random, int], ChunkSet | None]  # what one peer has of a blob of so many chunks


class Bench:
    def __init__(self) -> None:
        self.planner = Planner(seed=1)
        self.now = 0.0
        self.wake = float("inf")
        self.waiting: deque[tuple[int, int]] = deque()  # (request, chunk)
        self.spent: list[float] = []
        self.loads = 0  # that have not ended

    def feed(self, event: Event) -> None:
        began = time.thread_time()  # of this CPU: whoever else is at work here does not count
        actions = self.planner.handle(event, self.now)
        self.spent.append(time.thread_time() - began)
        for action in actions:
            match action:
                case Fetch():
                    self.waiting.extend((action.request, chunk) for chunk in action.chunks)
                case Done():
                    self.loads -= 1
                case Wake():
                    self.wake = action.at

    def add(self, loads: int, chunks: int, peers: list[bytes], state: State, *, herd: bool) -> None:
        self.loads += loads
        draw = random.Random(2)
        plan = ChunkPlan(chunks * MIB, range(0, chunks * MIB, MIB))
        for number in range(loads):
            self.feed(LoadAdded(blob(number), plan, ChunkSet(chunks), number % 3, Reach.RANGED))
            for peer in peers:
                self.feed(PeerHas(peer, blob(number), state(draw, chunks)))
                if herd:
                    self.feed(PeerReads(peer, blob(number), ()))

    def drain(self, announce: Callable[[], Event | None] = lambda: None) -> None:
        """Answer requests until the loads are done; after each, ``announce`` may have news."""
        while self.loads:
            self.now = max(self.now + SECONDS_A_CHUNK, 0.0 if self.waiting else self.wake)
            if self.now >= self.wake:
                self.wake = float("inf")
                self.feed(Tick())
            if self.waiting:
                self.feed(Got(*self.waiting.popleft()))
            if (news := announce()) is not None:
                self.feed(news)

    def row(self, name: str) -> Row:
        """What the events since the last row took."""
        ordered, self.spent = sorted(self.spent), []
        values = {
            "events": len(ordered),
            "median": statistics.median(ordered) * 1e6,
            "mean": statistics.mean(ordered) * 1e6,
            "p99": ordered[len(ordered) * 99 // 100] * 1e6,
            "worst": ordered[-1] * 1e3,
        }
        return Row(name, values)


def blob(number: int) -> bytes:
    return number.to_bytes(32, "big")


def complete(draw: random.Random, chunks: int) -> ChunkSet | None:
    return None


def half(draw: random.Random, chunks: int) -> ChunkSet | None:
    return ChunkSet(chunks, draw.sample(range(chunks), chunks // 2))


def nothing(draw: random.Random, chunks: int) -> ChunkSet | None:
    return ChunkSet(chunks)


def swarm(peers: list[bytes], chunks: int) -> Callable[[], Event | None]:
    """Peers that load the same blob as fast as this host; each of their batches is news."""
    draw = random.Random(3)

    def announce() -> Event | None:
        return PeerGot(draw.choice(peers), blob(0), sorted(draw.sample(range(chunks), min(BATCH, chunks))))

    return announce


def planner(run: Run) -> Table:
    """Every scenario with ten, a hundred and a thousand peers."""
    chunks, loads = (CHUNKS // 10, LOADS // 10) if run.quick else (CHUNKS, LOADS)
    scenarios: list[tuple[str, int, int, State]] = [
        ("complete", 1, chunks, complete),
        ("random halves", 1, chunks, half),
        ("swarm", 1, chunks, nothing),
        ("herd", 1, chunks, nothing),
        (f"{loads} loads", loads, chunks // loads, complete),
        (f"{loads} loads, halves", loads, chunks // loads, half),
    ]
    counts = (10, 100, 1_000)
    table = Table("planner", "what one event costs the planner, its actions included", ABOUT, COLUMNS)
    for count in counts:
        peers = [blob(1_000_000 + number) for number in range(count)]
        for name, of, each, state in scenarios:
            bench = Bench()
            bench.add(of, each, peers, state, herd=name == "herd")
            table.rows.append(bench.row(f"{name}, {count:,} peers: news"))
            bench.drain(swarm(peers, each) if name in ("swarm", "herd") else lambda: None)
            table.rows.append(bench.row(f"{name}, {count:,} peers"))
    for name, *_ in scenarios:
        few, many = (f"{name}, {count:,} peers" for count in (counts[0], counts[-1]))
        table.expect(at_most(50, f"us a decision: {many}"), many, "mean")
        table.expect(at_most(1.5, f"times that of {counts[0]} peers: {many}"), many, "mean", few)
    return table
