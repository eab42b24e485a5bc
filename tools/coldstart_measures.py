"""The figures of a cold start, from what its nodes report: bounds, gaps, waterfalls, medians. Pure.

A run is one start of the whole fleet. Of each node it has when it started and ended, what its load reported, and a
curve: what it had over time. Times are seconds after the run's start, a node's own stages seconds after its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

TAIL = 0.05  # of a node's bytes: the last ones
POINTS = 240  # of a curve that are kept

Json = dict[str, Any]
Point = tuple[float, int, int, int]  # seconds, and bytes had so far: local, from peers, from the origin
STAGES = ("resolve", "plan", "origin", "peers", "local", "hash", "write", "link", "device")


def bound(size: int, link: float | None, origin_link: float | None, *, warm: bool) -> float | None:
    """Seconds that no fleet can beat: rates in bits a second. None: nothing limits it.

    The object must cross the origin's link once, unless somebody has it already, and each cold node's own link.
    """
    rates = [rate for rate in (link, None if warm else origin_link) if rate is not None]
    return 8 * size / min(rates) if rates else None


@dataclass(slots=True)
class NodeRun:
    """One node in one run. ``ended`` None: it failed, was killed, or was warm and did nothing."""

    name: str
    what: str  # what is special about it, or ""
    counts: bool
    link: float | None
    least: float | None = None  # seconds that it takes at least: the bound, over its own link
    address: str = ""
    began: float = 0.0
    ended: float | None = None
    error: str = ""
    report: Json | None = None
    curve: list[Point] = field(default_factory=list)
    device: float | None = None  # seconds that its worker went on after the last byte
    correct: bool | None = None  # its bytes are the object's; None: not compared
    sent: int = 0  # bytes that others had from it
    warm: bool = False
    killed: bool = False

    @property
    def seconds(self) -> float | None:
        """From its start to its last byte, linked, and on the device where one was asked for."""
        return None if self.ended is None else self.ended - self.began

    @property
    def failed(self) -> bool:
        return bool(self.error) and not self.killed

    def bytes_by_source(self) -> dict[str, int]:
        if self.report is not None:
            by = self.report["bytes_by_source"]
            return {"local": by["local"], "peers": sum(by["peer"].values()), "origin": by["origin"]}
        last = self.curve[-1] if self.curve else (0.0, 0, 0, 0)
        return {"local": last[1], "peers": last[2], "origin": last[3]}

    def line_share(self) -> float | None:
        """Of its link: what it received, over the time it took."""
        if self.link is None or not self.seconds:
            return None
        by = self.bytes_by_source()
        return 8 * (by["peers"] + by["origin"]) / self.seconds / self.link

    def waterfall(self) -> list[tuple[str, list[tuple[float, float]], float]]:
        """Each stage: its name, its spans, and how many seconds it was at work.

        Hashing and writing go on while chunks come: they are drawn as long as they took, where chunks began to come.
        """
        if self.report is None:
            return []
        stages, transfer = self.report["stages"], self.report["transfer"]
        rows: list[tuple[str, list[tuple[float, float]], float]] = []
        at = 0.0
        for name in ("resolve", "plan"):
            rows.append((name, [(at, at + stages.get(name, 0.0))], stages.get(name, 0.0)))
            at += stages.get(name, 0.0)
        for name in ("origin", "peers", "local"):
            spans = [(begin, end) for begin, end in transfer[name]]
            if spans:
                rows.append((name, spans, sum(end - begin for begin, end in spans)))
        for name, key in (("hash", "hashing"), ("write", "writing")):
            if transfer[key]:
                rows.append((name, [(at, at + transfer[key])], transfer[key]))
        at += stages.get("transfer", 0.0)
        rows.append(("link", [(at, at + stages.get("link", 0.0))], stages.get("link", 0.0)))
        if self.device is not None:
            at = (self.seconds or 0.0) - self.device
            rows.append(("device", [(at, at + self.device)], self.device))
        return rows

    def gap(self) -> dict[str, float]:
        """Where the seconds above the bound went, by stage; their sum is all of them, so "moving" may be negative.

        resolve, plan; first: until the first chunk was had; moving: slower than the bound until the last few chunks;
        tail: those; link, device.
        """
        assert self.report is not None
        assert self.seconds is not None
        assert self.least is not None
        stages, transfer = self.report["stages"], self.report["transfer"]
        before = stages.get("resolve", 0.0) + stages.get("plan", 0.0)
        first = max(0.0, (transfer["first"] or before) - before)
        tail = max(0.0, self._tail() - TAIL * self.least)
        gap = {name: stages.get(name, 0.0) for name in ("resolve", "plan")}
        gap |= {"first": first, "tail": tail, "link": stages.get("link", 0.0), "device": self.device or 0.0}
        return gap | {"moving": self.seconds - self.least - sum(gap.values())}

    def _tail(self) -> float:
        """Seconds that the last few bytes took."""
        total = sum(self.curve[-1][1:]) if self.curve else 0
        late = next((point[0] for point in self.curve if sum(point[1:]) >= (1 - TAIL) * total), None)
        return self.curve[-1][0] - late if late is not None else 0.0

    def to_json(self) -> Json:
        return {
            "name": self.name, "what": self.what, "counts": self.counts, "address": self.address, "link": self.link,
            "began": self.began, "ended": self.ended, "seconds": self.seconds, "error": self.error,
            "killed": self.killed, "correct": self.correct, "bytes_by_source": self.bytes_by_source(),
            "peer": self.report["bytes_by_source"]["peer"] if self.report else {}, "sent": self.sent,
            "stages": self.report["stages"] if self.report else {},
            "transfer": self.report["transfer"] if self.report else {}, "device": self.device,
            "fallbacks": self.report["fallbacks"] if self.report else [],
            "line_share": self.line_share(), "distance": ratio(self.seconds, self.least),
            "bound": self.least,
            "gap": self.gap() if self.least is not None and self.seconds is not None and self.report else None,
            "curve": self.curve,
        }  # fmt: skip


@dataclass(slots=True)
class Run:
    """One start of the fleet. ``egress``: bytes of the object that left the origin; None: nobody counted."""

    nodes: list[NodeRun]
    size: int
    peers: bool
    egress: int | None = None
    requests: int | None = None
    busy: Json | None = None
    least: float | None = None  # the bound

    @property
    def counted(self) -> list[NodeRun]:
        return [node for node in self.nodes if node.counts]

    @property
    def last(self) -> float | None:
        """Seconds of the slowest node that counts; None: one of them failed."""
        return slowest(self.counted)

    @property
    def failures(self) -> list[str]:
        wrong = [f"{node.name}: {node.error}" for node in self.nodes if node.failed]
        return wrong + [f"{node.name}: wrong bytes" for node in self.nodes if node.correct is False]

    def to_json(self) -> Json:
        return {
            "peers": self.peers, "seconds": self.last, "bound": self.least, "distance": ratio(self.last, self.least),
            "egress": self.egress, "egress_multiple": ratio(self.egress, self.size), "requests": self.requests,
            "busy": self.busy, "nodes": [node.to_json() for node in self.nodes],
        }  # fmt: skip


def slowest(nodes: Iterable[NodeRun]) -> float | None:
    seconds = [node.seconds for node in nodes]
    known = [one for one in seconds if one is not None]
    return max(known) if known and len(known) == len(seconds) else None


def ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None


def spread(nodes: Sequence[NodeRun]) -> None:
    """Fill in what each node sent, from what the others say to have had from it."""
    by_address = {node.address: node for node in nodes}
    for node in nodes:
        for address, size in (node.report["bytes_by_source"]["peer"] if node.report else {}).items():
            if address in by_address:
                by_address[address].sent += size


def median(runs: Sequence[Run], value: Callable[[Run], float | None]) -> float | None:
    found = [one for one in map(value, runs) if one is not None]
    return statistics.median(found) if found else None


def middle(runs: Sequence[Run]) -> Run:
    """The run whose last node took the median time: the one to draw."""
    known = sorted((run for run in runs if run.last is not None), key=lambda run: run.last or 0.0)
    return known[(len(known) - 1) // 2] if known else runs[-1]


def summary(runs: Sequence[Run], alone: Sequence[Run]) -> Json:
    """The headline: medians over the rounds."""
    seconds, without = median(runs, lambda run: run.last), median(alone, lambda run: run.last)
    least = runs[0].least
    return {
        "seconds": seconds,
        "bound": least,
        "distance": ratio(seconds, least),
        "egress_multiple": median(runs, lambda run: ratio(run.egress, run.size)),
        "without_peers": without,
        "without_peers_egress_multiple": median(alone, lambda run: ratio(run.egress, run.size)),
        "speed_up": ratio(without, seconds),
        "line_share": median(runs, _least_share),
        "busy": median(runs, lambda run: run.busy["all"] if run.busy else None),
        "rounds": len(runs),
    }


def _least_share(run: Run) -> float | None:
    """Of the line: by the node that counts and used least of it."""
    shares = [share for node in run.counted if (share := node.line_share()) is not None]
    return min(shares) if shares else None


class Curve:
    """What a node had over time, from the events of its load: exact in total, by source as often as it is told.

    Between two tellings what came is split as the next one says.
    """

    def __init__(self) -> None:
        self._totals: list[tuple[float, int]] = []
        self._told: list[Point] = []
        self._had = 0

    def hear(self, event: Json, now: float) -> None:
        match event["event"]:
            case "snapshot":
                here = sum(end - begin for file in event["files"] for begin, end in file["had"])
                self._had = here
                self._told.append((now, here, 0, 0))
            case "had":
                self._had += sum(end - begin for begin, end in event["ranges"])
            case "progress":
                self._tell(now, event["bytes_by_source"])
            case "done":
                self._tell(now, event["report"]["bytes_by_source"])
                self._had = max(self._had, event["report"]["bytes_total"])
        self._totals.append((now, self._had))

    def _tell(self, now: float, by: Json) -> None:
        self._told.append((now, by["local"], sum(by["peer"].values()), by["origin"]))

    @property
    def had(self) -> int:
        return self._had

    @property
    def told(self) -> Point:
        """The latest that is known by source."""
        return self._told[-1] if self._told else (0.0, 0, 0, 0)

    def points(self) -> list[Point]:
        """At most POINTS of them, the first and the last among them."""
        if not self._totals:
            return []
        step = max(1, -(-len(self._totals) // POINTS))
        kept = [*self._totals[:-1:step], self._totals[-1]]
        return [_split(at, had, *self._around(at)) for at, had in kept]

    def _around(self, at: float) -> tuple[Point, Point]:
        """What was told before and after a moment."""
        before = next((point for point in reversed(self._told) if point[0] <= at), (0.0, 0, 0, 0))
        after = next((point for point in self._told if point[0] >= at), self._told[-1] if self._told else before)
        return before, after


def _split(at: float, had: int, before: Point, after: Point) -> Point:
    base, whole = sum(before[1:]), sum(after[1:]) - sum(before[1:])
    part = min(1.0, max(0.0, (had - base) / whole)) if whole > 0 else 0.0
    local, peers, origin = (round(b + part * (a - b)) for b, a in zip(before[1:], after[1:], strict=True))
    return at, local, peers, origin
