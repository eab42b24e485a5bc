"""Contenders that move the same bytes, measured side by side.

They take turns, so that a busy moment of the machine hurts all; medians are given. A turn that other work disturbed is
taken again, within bounds: of all turns those that were disturbed least count, and the table says how much. Before each
turn what the last one wrote is gone and the disk is idle: its throttling is not what is measured. The first turn of
each warms up; it is the one in which memory is sampled, since that costs CPU.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.processes import HighWater, cpu, machine_cpu, own_cpu
from bench.run import Run
from bench.table import Column, Row, Table

DIRTY = 32 << 20  # bytes not yet written: as good as none
DRAIN_SECONDS = 120.0
QUIET = 0.2  # cores that other work may take during a turn
TOUCHED = 2  # times what a turn moves
MOST = 3  # times as many turns as are to count

SPEED = Column("speed", "GB/s", "{:.2f}", bars=True)
RATIO = Column("ratio", "of limit", "{:.2f}")
SENDING = Column("cpu_sending", "CPU s/GB\nsending", "{:.2f}")
RECEIVING = Column("cpu_receiving", "CPU s/GB\nreceiving", "{:.2f}")
BOTH = Column("cpu_ratio", "CPU, both,\nof limit's", "{:.2f}")
MEMORY_SENDING = Column("memory_sending", "peak MB\nsending", "{:.0f}")
MEMORY_RECEIVING = Column("memory_receiving", "peak MB\nreceiving", "{:.0f}")
COLUMNS = (SPEED, RATIO, SENDING, RECEIVING, BOTH, MEMORY_SENDING, MEMORY_RECEIVING)


class Unavailable(Exception):
    """A contender cannot take part; the text says why, and what to install."""


def nothing() -> None: ...


def nobody() -> Iterable[int]:
    return ()


@dataclass(slots=True)
class Contender:
    """``move`` is one turn; it returns its seconds. ``prepare`` comes before one, ``clear`` removes what it brought.

    ``sending`` and ``receiving`` are the processes at either end. What this process and its short-lived children use
    during a turn counts as receiving, too.
    """

    name: str
    size: int
    move: Callable[[], float]
    clear: Callable[[], None] = nothing
    prepare: Callable[[], None] = nothing
    sending: Callable[[], Iterable[int]] = nobody
    receiving: Callable[[], Iterable[int]] = nobody
    note: str = ""
    fresh: bool = True  # it takes memory that nobody had before, which is then to be there


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn took. ``sending``, ``receiving``: CPU seconds; ``others``: cores that other work took meanwhile."""

    seconds: float
    sending: float
    receiving: float
    others: float


@dataclass(slots=True)
class Tally:
    """The turns of one contender. Memory in bytes."""

    turns: list[Turn] = field(default_factory=list)
    memory_sending: int = 0
    memory_receiving: int = 0
    failed: str = ""

    def enough(self, rounds: int) -> bool:
        quiet = sum(turn.others <= QUIET for turn in self.turns)
        return bool(self.failed) or quiet >= rounds or len(self.turns) >= MOST * rounds

    def counted(self, rounds: int) -> list[Turn]:
        """The turns that were disturbed least."""
        return sorted(self.turns, key=lambda turn: turn.others)[:rounds]


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def drain() -> None:
    """Wait until the disks have what was written."""
    os.sync()
    deadline = time.monotonic() + DRAIN_SECONDS
    while unwritten() > DIRTY and time.monotonic() < deadline:
        time.sleep(0.05)


def unwritten() -> int:
    """Bytes in the page cache that the disks do not have yet."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(lines[name].split()[0]) << 10 for name in ("Dirty", "Writeback"))


def dirty_room(folder: Path) -> int:
    """Bytes that may be written in ``folder`` without the kernel's slowing the writer down; half of that, for care."""
    lines = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    slowed = int(lines["nr_dirty_threshold"]) + int(lines["nr_dirty_background_threshold"])  # it begins at their mean
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    return min(slowed * os.sysconf("SC_PAGE_SIZE") // 4, free // 4)


def touch(folder: Path, size: int) -> None:
    """Have the kernel's free memory hold ``size`` bytes that were a file's just now.

    Under a hypervisor, memory that this machine has not used for a second is not there: its first use takes up to
    twenty times as long, and would be the page cache's in some turns and not in others. What was freed by a file goes
    to the next file; what was a process' own memory often does not.
    """
    block = bytes(8 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        for at in range(0, size, len(block)):
            os.pwrite(file.fileno(), block[: size - at], at)


def take_turns(contenders: Sequence[Contender], run: Run) -> list[Tally]:
    """Let each contender warm up once, then have turns until enough of them were quiet, or there were many."""
    tallies = [Tally() for _ in contenders]
    for number in range(MOST * run.rounds + 1):
        for contender, tally in zip(contenders, tallies, strict=True):
            if tally.enough(run.rounds):
                continue
            try:
                contender.clear()
                contender.prepare()
                drain()
                if contender.fresh:
                    touch(run.folder, TOUCHED * contender.size)
                (_turn if number else _warm_up)(contender, tally)
            except (
                Unavailable,
                AssertionError,
                OSError,
                subprocess.SubprocessError,
            ) as error:  # a wait that failed, too
                tally.failed = str(error)
    return tallies


def _warm_up(contender: Contender, tally: Tally) -> None:
    with HighWater(contender.sending) as sending, HighWater(contender.receiving) as receiving:
        contender.move()
    tally.memory_sending, tally.memory_receiving = sending.bytes, receiving.bytes


def _turn(contender: Contender, tally: Tally) -> None:
    began = time.monotonic()
    machine, own = machine_cpu(), own_cpu()
    sending, receiving = cpu(contender.sending()), cpu(contender.receiving())
    seconds = contender.move()
    sending, receiving = cpu(contender.sending()) - sending, cpu(contender.receiving()) - receiving
    receiving += own_cpu() - own
    others = (machine_cpu() - machine - sending - receiving) / (time.monotonic() - began)
    tally.turns.append(Turn(seconds, sending, receiving, max(0.0, others)))


def compare(name: str, title: str, about: str, contenders: Sequence[Contender], run: Run) -> Table:
    """Let contenders take turns; ratios are to the first."""
    tallies = take_turns(contenders, run)
    if tallies[0].failed:
        raise SystemExit(f"{contenders[0].name}: {tallies[0].failed}")
    counted = [turn for tally in tallies for turn in tally.counted(run.rounds)]
    facts = {
        "rounds": run.rounds,
        "turns left out because other work disturbed them": sum(len(tally.turns) for tally in tallies) - len(counted),
        "cores that other work took in the rest": f"{statistics.median(turn.others for turn in counted):.2f}",
    }
    base = _values(contenders[0], tallies[0], run.rounds)
    table = Table(name, title, about, COLUMNS, facts=facts)
    for contender, tally in zip(contenders, tallies, strict=True):
        if tally.failed:
            table.rows.append(Row(contender.name, skipped=tally.failed))
            continue
        values = _values(contender, tally, run.rounds)
        values["ratio"] = values["speed"] / base["speed"]
        values["cpu_ratio"] = (values["cpu_sending"] + values["cpu_receiving"]) / (
            base["cpu_sending"] + base["cpu_receiving"]
        )
        table.rows.append(Row(contender.name, values, contender.note))
    return table


def _values(contender: Contender, tally: Tally, rounds: int) -> dict[str, float]:
    turns = tally.counted(rounds)
    gigabytes = contender.size * len(turns) / 1e9
    return {
        "speed": contender.size / statistics.median(turn.seconds for turn in turns) / 1e9,
        "slowest": contender.size / max(turn.seconds for turn in turns) / 1e9,
        "fastest": contender.size / min(turn.seconds for turn in turns) / 1e9,
        "cpu_sending": sum(turn.sending for turn in turns) / gigabytes,
        "cpu_receiving": sum(turn.receiving for turn in turns) / gigabytes,
        "memory_sending": tally.memory_sending / 1e6,
        "memory_receiving": tally.memory_receiving / 1e6,
        "others": max(turn.others for turn in turns),
    }
