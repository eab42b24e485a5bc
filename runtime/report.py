"""What a load took: seconds and bytes by stage, and on a time line.

A load makes one report when it begins and hands it down; whoever works for the load says what it did and how long it
took. Stages run beside each other: their seconds add up to more than the load took, and by how much is the overlap.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Json = dict[str, Any]

# In the order of a byte's way. "wait": for bytes that the daemon still brings; "read": from the page cache or disk
# into pinned memory, or right into that of the CPU; "copy": from there to the device.
STAGES = ("wait", "read", "copy", "cast", "build")
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

    def finish(self) -> None:
        """The load is over. The first call counts."""
        if self.ended is None:
            self.ended = time.perf_counter()

    def fell_back(self, why: str) -> None:
        """Something was not done the fast way."""
        with self._lock:
            self.fallbacks.append(why)
