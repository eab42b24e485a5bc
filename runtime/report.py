"""What a load took: seconds and bytes by stage, and on a time line.

A load makes one report when it begins and hands it down; whoever works for the load says what it did and how long it
took. Stages run beside each other: their seconds add up to more than the load took, and by how much is the overlap.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from weightcache.runtime.ceilings import Ceilings, ceilings

Json = dict[str, Any]

# In the order of a byte's way, and the machine's ceiling that bounds each.
STAGES = {
    "wait": "link",  # for bytes that the daemon still brings
    "read": "memory",  # from the page cache into pinned memory, or right into that of the CPU
    "disk": "disk",  # the same, of what the page cache did not have
    "copy": "device",  # from pinned memory to the device
    "cast": "",
    "build": "",
}
MAX_SPANS = 50_000  # of the time line: a report stays small however large the model


class Span(NamedTuple):
    """One piece of work. Times in seconds of ``time.perf_counter``, sizes in bytes; ``lane``: where it was done."""

    stage: str
    began: float
    ended: float
    size: int
    lane: str


@dataclass(slots=True)
class Sum:
    """All the work of one stage."""

    seconds: float = 0.0
    size: int = 0


class LoadReport:
    """The report of one load. Written to from any thread; whole once the load is."""

    def __init__(self, source: str = "", device: str = "cpu") -> None:
        self.source = source
        self.device = device
        self.began = time.perf_counter()
        self.ended: float | None = None
        self.first: float | None = None  # when the first tensor was there
        self.tensors = 0
        self.size = 0
        self.fallbacks: list[str] = []
        self.daemon: Json | None = None  # its own report: what it brought, and from where
        self.stages: dict[str, Sum] = {}
        self.spans: list[Span] = []
        self._lock = threading.Lock()

    def spend(self, stage: str, began: float, ended: float, size: int = 0, lane: str | None = None) -> None:
        """Say what was done; ``lane`` None: in this thread."""
        span = Span(stage, began, ended, size, lane or threading.current_thread().name)
        with self._lock:
            total = self.stages.setdefault(stage, Sum())
            total.seconds += ended - began
            total.size += size
            if len(self.spans) < MAX_SPANS:
                self.spans.append(span)

    @contextlib.contextmanager
    def stage(self, stage: str, size: int = 0) -> Iterator[None]:
        """Everything in the block is of one stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spend(stage, began, time.perf_counter(), size)

    def landed(self, size: int) -> None:
        """A tensor of so many bytes may be used."""
        if self.first is None:
            self.first = time.perf_counter()
        self.tensors += 1
        self.size += size

    def came(self, daemon: Json | None) -> None:
        """What the daemon says of the same load; None: it has no part in it, or did not say."""
        self.daemon = daemon or self.daemon

    def finish(self) -> None:
        """The load is over. The first call counts."""
        if self.ended is None:
            self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """From the beginning to the end, or until now."""
        return (self.ended or time.perf_counter()) - self.began

    @property
    def overlap(self) -> float:
        """The stages' seconds, each counted once however many threads worked at it, over those of the whole."""
        return sum(self.busy(stage) for stage in self.stages) / max(self.seconds, 1e-9)

    def busy(self, stage: str) -> float:
        """Seconds during which anybody was at a stage."""
        return _union((span.began, span.ended) for span in list(self.spans) if span.stage == stage)

    def by_source(self) -> dict[str, int]:
        """Bytes by where they came from: "local", "origin", and peers by their addresses."""
        if self.daemon is None:
            return {"local": self.size}
        found = self.daemon["bytes_by_source"]
        sizes = {"local": found["local"], **found["peer"], "origin": found["origin"]}
        return {name: size for name, size in sizes.items() if size}

    def fell_back(self, why: str) -> None:
        """Something was not done the fast way."""
        with self._lock:
            self.fallbacks.append(why)

    # -- for people, programs and Perfetto

    def to_json(self, limits: Ceilings | None = None) -> Json:
        """All of it but the time line. ``limits``: what shares are of; by default this machine's."""
        limits = limits or ceilings()
        return {
            "source": self.source,
            "device": self.device,
            "bytes": self.size,
            "tensors": self.tensors,
            "seconds": self.seconds,
            "first_tensor_seconds": self.first - self.began if self.first is not None else None,
            "overlap": self.overlap,
            "bytes_by_source": self.by_source(),
            "stages": {name: self._stage(name, limits) for name in sorted(self.stages, key=_order)},
            "ceilings": limits.to_json(),
            "fallbacks": [*self.fallbacks, *(self.daemon or {}).get("fallbacks", [])],
        }

    def _stage(self, name: str, limits: Ceilings) -> Json:
        """A stage's sums; ``share``: of the machine's ceiling, by the time during which anybody was at it."""
        total = self.stages[name]
        size = self._arrived() if name == "wait" else total.size
        limit: float | None = getattr(limits, STAGES.get(name) or "none", None)
        busy = self.busy(name)
        share = size / busy / limit if limit and busy and size else None
        return {"seconds": total.seconds, "busy": busy, "bytes": size, "share": share}

    def _arrived(self) -> int:
        return sum(size for name, size in self.by_source().items() if name != "local")

    def __str__(self) -> str:
        found = self.to_json()
        first = found["first_tensor_seconds"]
        lines = [
            f"{self.source} -> {self.device}: {self.tensors} tensors, {_bytes(self.size)} in {self.seconds:.3f} s"
            f" ({self.size / max(self.seconds, 1e-9) / 1e9:.2f} GB/s)"
            + (f", the first after {first:.3f} s" if first is not None else ""),
            "  from " + ", ".join(f"{name} {_bytes(size)}" for name, size in found["bytes_by_source"].items()),
            f"  overlap {self.overlap:.2f} (stages' seconds / all seconds)",
        ]
        for name, stage in found["stages"].items():
            line = f"  {name:6} {stage['busy']:8.3f} s  {_bytes(stage['bytes']):>9}"
            if stage["share"] is not None:
                line += f"  {stage['share']:4.0%} of what this machine's {STAGES[name]} can do"
            lines.append(line)
        lines += [f"  fell back: {why}" for why in found["fallbacks"]]
        return "\n".join(lines)

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write the time line as JSON that Perfetto and chrome://tracing open; one row a thread, and one the device."""
        pid = os.getpid()
        spans = list(self.spans)
        lanes = {lane: number for number, lane in enumerate(dict.fromkeys(span.lane for span in spans), 1)}
        events: list[Json] = [
            {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": f"load {self.source}"}},
            *(
                {"ph": "M", "name": "thread_name", "pid": pid, "tid": number, "args": {"name": lane}}
                for lane, number in lanes.items()
            ),
            *(
                {
                    "ph": "X",
                    "name": span.stage,
                    "cat": "load",
                    "ts": (span.began - self.began) * 1e6,
                    "dur": (span.ended - span.began) * 1e6,
                    "pid": pid,
                    "tid": lanes[span.lane],
                    "args": {"bytes": span.size},
                }
                for span in spans
            ),
        ]
        if self.first is not None:
            at = (self.first - self.began) * 1e6
            events.append({"ph": "i", "name": "first tensor", "ts": at, "pid": pid, "tid": 0, "s": "p"})
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)


def _order(stage: str) -> int:
    return list(STAGES).index(stage) if stage in STAGES else len(STAGES)


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in at least one of the spans."""
    total, until = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total
