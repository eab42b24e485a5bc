"""The machine that plays the fleet: what it bears, how busy it was, and what it is."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightcache.tools.coldstart_settings import Settings, rate_text
from weightcache.tools.show import human

NODE_MEMORY = 140 << 20  # bytes that a daemon's processes take while they load
WORKER_MEMORY = 350 << 20  # and a worker with torch, besides the object
LEFT_OVER = 2 << 30  # bytes of the disk that stay free
CPU_SECONDS = 1.6e-9  # for a byte to be sent, shaped, received, hashed and written: 0.8 without links and shaping
BUSY = 0.9  # of all cores: more means that the machine, not the links, was measured
NODES_A_CORE = 32  # that can be started, if slowly

_TICK = os.sysconf("SC_CLK_TCK")
_USER, _NICE, _SYSTEM, _IDLE, _WAIT, _IRQ, _SOFTIRQ, _STEAL = range(8)


def facts() -> dict[str, Any]:
    """What the figures are of."""
    return {
        "cores": cores(),
        "cpu": _model(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load": round(os.getloadavg()[0], 2),
    }


def cores() -> int:
    return len(os.sched_getaffinity(0))


def _model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def too_much(settings: Settings, size: int, folder: Path) -> str:
    """Why this machine does not bear the run, or "". An estimate."""
    nodes, here = settings.nodes, cores()
    disk, free = (nodes + 1) * size + LEFT_OVER, shutil.disk_usage(folder).free
    if disk > free:
        return f"{nodes} nodes and the origin take {human(disk)} below {folder}, which has {human(free)} free"
    each = NODE_MEMORY + (WORKER_MEMORY + size if settings.device is not None else 0)
    memory, available = nodes * each, _available()
    if memory > available:
        return f"{nodes} nodes take about {human(memory)} of memory, and {human(available)} are available"
    if nodes > NODES_A_CORE * here:
        return f"{nodes} nodes are more than {here} cores can start"
    receiving = sum(role.link or 0 for role in settings.roles() if role.kind == "cold") / 8
    needed = receiving * CPU_SECONDS
    if needed > here:
        return (
            f"{nodes} nodes at {rate_text(settings.link)} each take about {needed:.1f} cores, and there are {here}: "
            "it would measure the machine"
        )
    return ""


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# -- how busy it was


@dataclass(frozen=True, slots=True)
class Busy:
    """Shares of all cores, 0 to 1. ``others``: processes that have nothing to do with the run, and stolen time."""

    all: float
    ours: float
    network: float
    others: float
    cores: int

    def to_json(self) -> dict[str, Any]:
        shares = {"all": self.all, "ours": self.ours, "network": self.network, "others": self.others}
        return {name: round(share, 4) for name, share in shares.items()} | {"cores": self.cores}


class CpuMeter:
    """Begins when it is made. ``read`` says how busy the machine was since, and how much of that we were."""

    def __init__(self) -> None:
        self._at, self._machine, self._ours = time.monotonic(), _machine(), cpu([os.getpid()])

    def read(self) -> Busy:
        """Call it while the processes of the run are still there."""
        times = [now - then for now, then in zip(_machine(), self._machine, strict=True)]
        total = sum(times) or 1.0
        ours = (cpu([os.getpid()]) - self._ours) * _TICK / total
        network = (times[_IRQ] + times[_SOFTIRQ]) / total
        busy = 1 - (times[_IDLE] + times[_WAIT]) / total
        return Busy(busy, min(ours, busy), network, max(0.0, busy - ours - network), cores())


def _machine() -> list[int]:
    """Ticks of all cores by kind, since boot."""
    with open("/proc/stat") as file:
        return [int(ticks) for ticks in file.readline().split()[1:9]]


def tree(roots: Iterable[int]) -> set[int]:
    """The processes in ``roots`` and all below them."""
    below: dict[int, list[int]] = {}
    for pid, found in _stats():
        below.setdefault(int(found[1]), []).append(pid)
    reached: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in reached:
            reached.add(pid)
            waiting += below.get(pid, ())
    return reached


def cpu(roots: Iterable[int]) -> float:
    """CPU seconds that these trees have used, with their threads and the children they have buried."""
    total = 0
    for pid in tree(roots):
        with contextlib.suppress(OSError):
            total += sum(map(int, _fields(pid)[11:15]))  # utime, stime, cutime, cstime
    return total / _TICK


def _stats() -> Iterable[tuple[int, list[str]]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), _fields(int(entry.name))


def _fields(pid: int) -> list[str]:
    """/proc/PID/stat from the state on: a process' name may hold blanks and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
