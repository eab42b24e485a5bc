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

_TICK = os.sysconf("SC_CLK_TCK")
_SAMPLE_SECONDS = 0.05

Pids = Callable[[], Iterable[int]]


def tree(roots: Iterable[int]) -> set[int]:
    """The processes in ``roots`` and all below them."""
    below: dict[int, list[int]] = {}
    for pid, fields in _stats():
        below.setdefault(int(fields[1]), []).append(pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += below.get(pid, ())
    return found


def _stats() -> Iterable[tuple[int, list[str]]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), _fields(int(entry.name))


def _fields(pid: int) -> list[str]:
    """/proc/PID/stat from the state on: a process' name may hold blanks and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu(roots: Iterable[int]) -> float:
    """CPU seconds that these trees have used, with their threads and the children they have buried."""
    total = 0
    for pid in tree(roots):
        with contextlib.suppress(OSError):
            total += sum(map(int, _fields(pid)[11:15]))  # utime, stime, cutime, cstime
    return total / _TICK


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
