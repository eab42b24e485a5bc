"""What processes cost: CPU seconds and memory, of whole trees, from /proc."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from weightcache.tools.coldstart_machine import cpu, tree

__all__ = ["HighWater", "Pids", "cpu", "machine_cpu", "memory", "own_cpu", "tree"]

_TICK = os.sysconf("SC_CLK_TCK")
_SAMPLE_SECONDS = 0.05

Pids = Callable[[], Iterable[int]]


def own_cpu() -> float:
    """CPU seconds of this process and of the children it has buried."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def memory(roots: Iterable[int]) -> int:
    """Bytes these trees hold (PSS): pages they share are counted once between them."""
    total = 0
    for pid in tree(roots):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total


def machine_cpu() -> float:
    """CPU seconds that everything on this machine has used, and what its hypervisor withheld."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICK


class HighWater:
    """The most memory in ``bytes`` that some trees held while the block ran, sampled."""

    def __init__(self, pids: Pids) -> None:
        self.bytes = 0
        self._pids = pids
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="high water")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, memory(self._pids()))
            if self._over.wait(_SAMPLE_SECONDS):
                return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
