"""``weightcache simulate``: a fleet that loads at once, in virtual time, by the planner that ships.

A ``Scenario`` says what happens, ``play`` lets it happen and returns the figures. The same scenario and seed give the
same run, event by event.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from weightcache.core.events import Reach
from weightcache.core.layout import CHUNK, ChunkPlan
from weightcache.core.neighbours import FEW, RINGS
from weightcache.errors import ConfigError, WeightcacheError
from weightcache.tools.show import human
from weightcache.tools.sim_fleet import Blob, Broken, Fleet, Host

Json = dict[str, Any]

MOST_CHUNKS = 100_000
PROGRESS_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Scenario:
    """Sizes in bytes, rates in bytes/s, times in seconds; shares are of the hosts, from 0 to 1.

    ``components``: parts of the object that are needed one after the other. ``spread``: within which hosts start.
    ``churn``: how many leave each second, while as many others join. ``disagree``: how many know only half of the rest.
    """

    hosts: int = 8
    size: int = 300_000_000
    chunk: int = CHUNK
    link: float = 50e6
    origin: float = 50e6
    latency: float = 0.0005
    spread: float = 1.0
    warm: int = 0
    churn: float = 0.0
    stragglers: float = 0.0
    slow: float = 10.0
    liars: float = 0.0
    disagree: float = 0.0
    components: int = 1
    streamed: bool = False
    seed: int = 1

    def check(self) -> None:
        """Raises ConfigError."""
        for name, least, most in (
            ("hosts", 1, 100_000), ("chunk", 1 << 16, 1 << 30), ("components", 1, 64), ("size", 1, 1 << 50),
            ("churn", 0, 1), ("stragglers", 0, 1), ("liars", 0, 1), ("disagree", 0, 1), ("warm", 0, self.hosts - 1),
            ("slow", 1, 1e6), ("latency", 0, 10), ("spread", 0, 600), ("link", 1e3, 1e13), ("origin", 1e3, 1e13),
        ):  # fmt: skip
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"simulate: --{name} is from {least:,} to {most:,}, not {value:,}")
        if self.size / self.chunk > MOST_CHUNKS or self.size < self.components:
            raise ConfigError(f"simulate: --size {human(self.size)} does not go with --chunk {human(self.chunk)}")
        if self.liars + self.stragglers > 0.9:
            raise ConfigError("simulate: --liars and --stragglers leave nobody to rely on")

    @property
    def bound(self) -> float:
        """No way of sending ends sooner than in so many seconds."""
        return self.size / (self.link if self.warm else min(self.link, self.origin))


def parts(scenario: Scenario) -> list[Blob]:
    """The components: equal shares of the object, of which the first is needed first."""
    each = math.ceil(scenario.size / scenario.components)
    sizes = [min(each, scenario.size - at) for at in range(0, scenario.size, each)]
    reach = Reach.STREAM if scenario.streamed else Reach.RANGED
    return [
        Blob(bytes([rank]) * 32, ChunkPlan(size, range(0, size, scenario.chunk)), rank, reach)
        for rank, size in enumerate(sizes, 1)
    ]


def stage(scenario: Scenario) -> tuple[Fleet, list[Host]]:
    """The fleet, about to start; and the hosts whose time counts: those that are there from the start, and are neither
    warm, slow nor liars."""
    fleet = Fleet(scenario.seed, parts(scenario), scenario.link, scenario.origin, scenario.latency)
    draw = random.Random(scenario.seed + 1)
    cold = scenario.hosts - scenario.warm
    slow, lying = round(scenario.stragglers * cold), round(scenario.liars * cold)
    counted = []
    for number in range(scenario.hosts):
        place = number - scenario.warm
        is_slow, lies = 0 <= place < slow, slow <= place < slow + lying
        host = fleet.add(scenario.link / scenario.slow if is_slow else None, lies=lies, warm=place < 0)
        if place >= 0:
            fleet.start(host, draw.random() * scenario.spread)
            if not is_slow and not lies:
                counted.append(host)
        if draw.random() < scenario.disagree:
            host.knows = partial(_sees, draw.randbytes(4))
    if scenario.churn:
        fleet.clock.at(0.0, partial(_change, fleet, scenario, draw, scenario.warm))
    return fleet, counted


def _sees(key: bytes, other: Host) -> bool:
    """Half of all hosts, which half depends on the key."""
    return random.Random(key + other.name).random() < 0.5


def _change(fleet: Fleet, scenario: Scenario, draw: random.Random, warm: int) -> None:
    """One host leaves, another one comes; and so on."""
    leaving = draw.choice(list(fleet.hosts.values())[warm:])
    fleet.kill(leaving)
    fleet.start(fleet.add(), fleet.now)
    if fleet.now < 3 * scenario.bound + scenario.spread:
        pause = draw.expovariate(scenario.churn * scenario.hosts)
        fleet.clock.at(fleet.now + pause, partial(_change, fleet, scenario, draw, warm))


def play(scenario: Scenario, hear: Callable[[Fleet], None] | None = None) -> Json:
    """Run it; the figures. Times are of a host's own start; ``over`` a bound means: as a multiple of it. Raises Broken
    when an invariant does not hold."""
    scenario.check()
    fleet, counted = stage(scenario)
    began = time.perf_counter()
    fleet.run(None if hear is None else partial(hear, fleet))
    seconds = time.perf_counter() - began
    living = [host for host in counted if host.alive]
    times = sorted(max(at for at, _ in host.ended.values()) - host.began for host in living)
    first = next(iter(fleet.blobs.values()))
    firsts = sorted(host.ended[first.name][0] - host.began for host in living)
    chunks = sum(len(blob.plan) for blob in fleet.blobs.values())
    bound = scenario.bound
    failed = {why for host in fleet.hosts.values() for _, why in host.ended.values() if why}
    return {
        "scenario": asdict(scenario),
        "bound": bound,
        "hosts": len(times),
        "last_over_bound": _round(times[-1] / bound) if times else None,
        "p99_over_bound": _round(times[math.ceil(0.99 * len(times)) - 1] / bound) if times else None,
        "p50_over_bound": _round(times[len(times) // 2] / bound) if times else None,
        "egress": _round(fleet.egress / scenario.size),
        "first_component_seconds": _round(firsts[-1]) if firsts else None,
        "first_component_share": _round(first.plan.size / scenario.size),
        "first_component_came": _round(max(host.came_first for host in living) / scenario.size) if living else None,
        "messages_per_host_and_chunk": _round(fleet.messages / (scenario.hosts * chunks)),
        "messages_bound": scenario.hosts if scenario.hosts <= FEW + 1 else 2 * RINGS + 2,
        "greetings_per_host": _round(fleet.greetings / scenario.hosts),
        "failed": sorted(failed),
        "events": fleet.clock.events,
        "decisions": fleet.decisions,
        "microseconds_per_decision": round(fleet.thinking / fleet.decisions * 1e6, 1) if fleet.decisions else None,
        "seconds": round(seconds, 2),
        "trace": fleet.trace.hexdigest(),
    }


def _round(number: float) -> float:
    return round(number, 4)


def watched(scenario: Scenario) -> Json:
    """``play``, with progress on stderr if that is a terminal. Raises WeightcacheError when an invariant breaks, with
    the seed that plays it again."""
    progress = Progress() if sys.stderr.isatty() else None
    try:
        return play(scenario, progress)
    except Broken as error:
        raise WeightcacheError(f"simulate: {error}; it happens again with --seed {scenario.seed}") from error
    finally:
        if progress is not None:
            progress.close()


def _first(found: Json) -> str:
    share, came = found["first_component_share"], found["first_component_came"]
    return f"{found['first_component_seconds']:.2f} s: {share:.0%} of the bytes, when at most {came:.1%} had come"


def shown(found: Json) -> str:
    """The figures, for people."""
    scenario = Scenario(**found["scenario"])
    over, bound = "times the bound", found["bound"]
    rows = [
        ("fleet", f"{scenario.hosts:,} hosts, {scenario.warm} warm, {human(scenario.size)} each, seed {scenario.seed}"),
        ("bound", f"{bound:.2f} s: {human(scenario.size)} at {_rate(scenario.size / bound)}"),
        ("last host", f"{found['last_over_bound']:.3f} {over}" if found["hosts"] else "nobody is left to be counted"),
        ("p99, p50", f"{found['p99_over_bound']:.3f}, {found['p50_over_bound']:.3f} {over}" if found["hosts"] else "-"),
        ("origin sent", f"{found['egress']:.3f} times the object"),
        ("first component", _first(found) if found["hosts"] else "-"),
        (
            "messages",
            f"{found['messages_per_host_and_chunk']:.2f} a host and chunk, of {found['messages_bound']} at most",
        ),
        ("greetings", f"{found['greetings_per_host']:,.0f} a host"),
        ("planner", f"{found['decisions']:,} decisions of {found['microseconds_per_decision']} us"),
        ("took", f"{found['seconds']:.1f} s for {found['events']:,} events"),
        *(("failed", why) for why in found["failed"]),
    ]
    return "\n".join(f"{name:<16} {text}" for name, text in rows)


def _rate(rate: float) -> str:
    return f"{rate * 8 / 1e9:g} Gbit/s" if rate >= 125e6 else f"{rate * 8 / 1e6:g} Mbit/s"


class Progress:
    """A line on stderr, if somebody watches."""

    def __init__(self) -> None:
        self._next = time.monotonic() + PROGRESS_SECONDS
        self._count = 0

    def __call__(self, fleet: Fleet) -> None:
        self._count += 1
        if self._count % 1024 or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PROGRESS_SECONDS
        print(f"\r{fleet.now:8.2f} s, {fleet.unfinished:,} hosts load ", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
