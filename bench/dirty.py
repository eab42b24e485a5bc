"""A pull of three times what the kernel lets be dirty. It cannot be faster than the disk, and must not stop the rest.

The kernel's limit is lowered meanwhile, so that this takes a minute; only root may do that. The origin's file is in
memory, so the disk has one thing to do. Beside the pull, one without a dirty budget, and two loops that only write: one
leaves it to the kernel when, one has it begin at once. While each of them runs, another client of the daemon loads
small files, one after the other, and a third one asks for the status.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from bench import rounds
from bench.daemon import MS, percentiles, probing
from bench.hosts import MB, MEMORY, Host, connected_host, nginx, write_random
from bench.rounds import timed
from bench.run import Run
from bench.table import Column, Row, Table, at_least, at_most
from tests.fleet.daemons import Daemon
from weightcache.client import SyncClient
from weightcache.config import Config
from weightcache.store.files import start_flush

VM = Path("/proc/sys/vm")
LIMIT, TIMES = 1 << 30, 3  # bytes that may be dirty; a pull has so many times as many
TURNS = 2
SMALL_FILES, SMALL_PAUSE = 600, 0.1
ALONE_SECONDS = 3.0
BLOCK = 8 << 20
PULL, NO_BUDGET, BARE, EARLY = "weightcache", "weightcache, no budget", "bare loop", "bare loop, early write-back"
ABOUT = (
    "Each twice, in either order. The limit is the volume's own speed: as many bytes written past the page cache. "
    "'had': until every byte is written (and hashed, but for the bare loops); 'on the disk': until the disk "
    "has them, too. 'stall': the longest time in which nothing was had. A small load is a file of 1 MB, never seen "
    "before, from a web server. The picture shows the bytes that were had over time, the second time; the slope of the "
    "dashed line is the volume's."
)
COLUMNS = (
    Column("speed", "GB/s\nhad"),
    Column("disk", "GB/s\non the disk"),
    Column("stall", "stall\nms", "{:,.0f}"),
    Column("status", "status\np99 ms", MS),
    Column("p50", "small loads\np50 ms", MS),
    Column("p99", "small loads\np99 ms", MS),
    Column("count", "small loads", "{:,.0f}"),
)
Timeline = list[tuple[float, float]]  # seconds, and the bytes that were had by then


@dataclass(slots=True)
class Way:
    """A way to bring the bytes, while ``host`` serves others; and what its turns took, in seconds."""

    host: Host
    move: Callable[[], Timeline]
    clear: Callable[[], None]
    had: float = 0.0
    synced: float = 0.0
    stall: float = 0.0
    status: list[float] = field(default_factory=list)
    small: list[float] = field(default_factory=list)

    def turn(self, fresh: Iterator[str]) -> Timeline:
        rounds.drain()
        with probing({"status": self.host.daemon.socket}) as answers, _loads(self.host, fresh) as others:
            timeline = self.move()
        self.synced += timed(rounds.drain)
        self.clear()
        self.had += timeline[-1][0]
        self.stall = max(self.stall, _stall(timeline))
        self.status += answers["status"]
        self.small += others
        return timeline

    def row(self, name: str, size: int) -> Row:
        values = {"speed": TURNS * size / self.had / 1e9, "disk": TURNS * size / (self.had + self.synced) / 1e9}
        values |= {"stall": self.stall * 1e3, "status": percentiles(self.status)["p99"]}
        return Row(name, percentiles(self.small) | values)


def dirty(run: Run) -> Table:
    """How the bytes come over time, beside the volume's own speed, and what else is done meanwhile."""
    limit = run.size(LIMIT, LIMIT // 4)
    size = TIMES * limit
    table = Table("dirty", f"a pull of {size / MB:,.0f} MB, {TIMES} times the dirty limit", ABOUT, COLUMNS)
    if why := _hindrance(run.folder, size):
        table.rows.append(Row("limit", skipped=why))
        return table
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        memory = Path(enter(tempfile.TemporaryDirectory(prefix="bench-", dir=MEMORY)))
        write_random(memory / "blob", size)
        for number in range(SMALL_FILES):
            write_random(memory / f"small{number}", MB + number)
        enter(_dirty_limit(limit))
        server, _ = enter(nginx(memory))
        paced = enter(connected_host(Daemon(run.folder / "a"), ()))
        unpaced = enter(connected_host(Daemon(run.folder / "b", f"--dirty-budget={size}"), ()))
        fresh = (server.url(f"small{number}") for number in range(SMALL_FILES))
        blob, target, source = memory / "blob", run.folder / "target", server.url("blob")
        ways = {
            BARE: Way(paced, lambda: _bare(blob, target, early=False), target.unlink),
            EARLY: Way(paced, lambda: _bare(blob, target, early=True), target.unlink),
            NO_BUDGET: Way(unpaced, lambda: _pulled(unpaced, source), lambda: unpaced.forget(source)),
            PULL: Way(paced, lambda: _pulled(paced, source), lambda: paced.forget(source)),
        }
        with probing({"status": paced.daemon.socket}) as answers, _loads(paced, fresh) as others:
            time.sleep(ALONE_SECONDS)
        alone = percentiles(others) | {"status": percentiles(answers["status"])["p99"]}
        own = 0.0
        for names in (list(ways), list(ways)[::-1]):
            rounds.drain()
            own += _volume(run.folder / "own", size)
            for name in names:
                table.timelines[name] = ways[name].turn(fresh)
        table.slope = TURNS * size / own
        table.rows.append(Row("limit", {"speed": table.slope / 1e9, "disk": table.slope / 1e9}))
        table.rows += [way.row(name, size) for name, way in ways.items()]
        table.rows.append(Row("nothing else moves", alone))
    table.expect(at_least(0.9, "of the volume's own speed"), PULL, "disk", "limit")
    table.expect(at_least(0.95, "of the speed without a budget"), PULL, "disk", NO_BUDGET)
    table.expect(at_most(20, "ms at p99: status"), PULL, "status")
    table.expect(at_most(1, "times the small loads' p99 without a budget"), PULL, "p99", NO_BUDGET)
    return table


def _hindrance(folder: Path, size: int) -> str:
    """Why it cannot be done here, or ""."""
    if shutil.disk_usage(MEMORY).free < 2 * size or shutil.disk_usage(folder).free < 3 * size:
        return f"there is no room for it in {MEMORY} and {folder}"
    return "" if os.access(VM / "dirty_bytes", os.W_OK) else "only root may lower the kernel's dirty limit"


@contextlib.contextmanager
def _dirty_limit(size: int) -> Iterator[None]:
    """Let ``size`` bytes be dirty, and half of them before the kernel begins to write, while the block runs."""
    before = {name: (VM / name).read_text() for name in ("dirty_bytes", "dirty_background_bytes")}
    ratios = {name: (VM / name).read_text() for name in ("dirty_ratio", "dirty_background_ratio")}
    try:
        (VM / "dirty_background_bytes").write_text(str(size // 2))
        (VM / "dirty_bytes").write_text(str(size))
        yield
    finally:  # of bytes and ratio, the one that is written last counts, and the other reads 0
        for name, value in (before | ratios).items():
            if int(value):
                (VM / name).write_text(value)


def _volume(path: Path, size: int) -> float:
    """Seconds that the volume takes for ``size`` bytes past the page cache."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    try:
        with mmap.mmap(-1, BLOCK) as block:  # O_DIRECT wants whole pages
            block.write(os.urandom(BLOCK))
            os.posix_fallocate(fd, 0, size)
            return timed(lambda: [os.pwrite(fd, block, offset) for offset in range(0, size, BLOCK)])
    finally:
        os.close(fd)
        path.unlink()


def _bare(source: Path, target: Path, *, early: bool) -> Timeline:
    """Copy, and nothing else; ``early``: have the kernel begin to write each block at once."""
    with open(source, "rb") as reading, open(target, "wb") as writing:
        size = source.stat().st_size
        os.posix_fallocate(writing.fileno(), 0, size)
        block = bytearray(BLOCK)
        began, found = time.monotonic(), [(0.0, 0.0)]
        for offset in range(0, size, BLOCK):
            count = reading.readinto(block)
            os.pwrite(writing.fileno(), block[:count], offset)
            if early:
                start_flush(writing.fileno(), offset, count)
            found.append((time.monotonic() - began, float(offset + count)))
    return found


def _pulled(host: Host, source: str) -> Timeline:
    began, found = time.monotonic(), [(0.0, 0.0)]

    def heard(event: dict[str, object]) -> None:
        if event["event"] == "progress":
            found.append((time.monotonic() - began, float(str(event["done"]))))

    report = host.client.pull(source, heard)
    return [*found, (time.monotonic() - began, float(report["bytes_total"]))]


def _stall(timeline: Timeline) -> float:
    """The longest time in which nothing was had, in seconds."""
    since, most = 0.0, 0.0
    for (_, before), (at, had) in pairwise(timeline):
        most = max(most, at - since)
        since = at if had > before else since
    return most


@contextlib.contextmanager
def _loads(host: Host, sources: Iterator[str]) -> Iterator[list[float]]:
    """Load these one after the other, by a client of their own, while the block runs; seconds."""
    found: list[float] = []
    over = threading.Event()

    def work() -> None:
        with SyncClient(Config(store=host.daemon.store, socket=host.daemon.socket)) as client:
            for source in sources:
                found.append(timed(lambda source=source: client.pull(source)))  # type: ignore[misc]
                if over.wait(SMALL_PAUSE):
                    return

    thread = threading.Thread(target=work, name="small loads")
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
