"""A pull of three times what the kernel lets be dirty. It cannot be faster than the disk, and must not stop the rest.

The origin's file is in memory, so the disk has one thing to do. Meanwhile another client of the same daemon loads small
files, one after the other, and a third one asks for the status.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench import rounds
from bench.daemon import MS, percentiles, probing
from bench.hosts import MB, Host, connected_host, nginx, write_random
from bench.rounds import timed
from bench.run import Run
from bench.table import Column, Row, Table, at_least, at_most
from tests.fleet.daemons import Daemon
from weightcache.client import SyncClient
from weightcache.config import Config

MEMORY = Path("/dev/shm")
TIMES = 3
SMALL_FILES, SMALL_PAUSE = 400, 0.2
BLOCK = 8 << 20
ABOUT = (
    "The volume's own speed: as many bytes written past the page cache, since volumes have bursts. 'had': until every "
    "byte is hashed and written; 'on the disk': until the disk has them, too. A small load is a file of 1 MB, never "
    "seen before, from a web server. The picture shows the bytes that were had over time; the slope of the dashed line "
    "is the volume's."
)
COLUMNS = (
    Column("speed", "GB/s"),
    Column("p50", "p50 ms", MS),
    Column("p99", "p99 ms", MS),
    Column("worst", "worst ms", MS),
    Column("count", "times", "{:,.0f}"),
)


def dirty(run: Run) -> Table:
    """How the bytes come over time, beside the volume's own speed, and what else is done meanwhile."""
    size = _size()
    table = Table("dirty", f"a pull of {size / MB:,.0f} MB, {TIMES} times the dirty limit", ABOUT, COLUMNS)
    if shutil.disk_usage(MEMORY).free < size or shutil.disk_usage(run.folder).free < 2 * size:
        table.rows.append(Row("limit", skipped=f"there is no room for it in {MEMORY} and {run.folder}"))
        return table
    own = _volume(run.folder / "own", size)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        memory = Path(enter(tempfile.TemporaryDirectory(prefix="bench-", dir=MEMORY)))
        write_random(memory / "blob", size)
        for number in range(SMALL_FILES):
            write_random(run.folder / f"small{number}", MB + number)
        large, _ = enter(nginx(memory))
        small, _ = enter(nginx(run.folder))
        receiving = enter(connected_host(Daemon(run.folder / "a"), ()))
        rounds.drain()
        sources = [small.url(f"small{number}") for number in range(SMALL_FILES)]
        with probing({"status": receiving.daemon.socket}) as answers, _loads(receiving, sources) as others:
            table.timeline = _watched(receiving, large.url("blob"))
        synced = timed(rounds.drain)
    seconds = table.timeline[-1][0]
    gaps = [later - earlier for (earlier, _), (later, _) in zip(table.timeline, table.timeline[1:], strict=False)]
    table.slope = own
    table.rows = [
        Row("limit", {"speed": own / 1e9}, "the volume's own speed"),
        Row("weightcache, had", {"speed": size / seconds / 1e9}),
        Row("weightcache, on the disk", {"speed": size / (seconds + synced) / 1e9}),
        Row("status meanwhile", percentiles(answers["status"])),
        Row("small loads meanwhile", percentiles(others)),
        Row("time without news", percentiles(gaps)),
    ]
    table.expect(at_least(0.9, "of the volume's own speed"), "weightcache, had", "speed", "limit")
    table.expect(at_most(20, "ms at p99: status"), "status meanwhile", "p99")
    return table


def _size() -> int:
    """Bytes that are TIMES the dirty limit when as many more lie in memory: those lower it."""
    lines = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    threshold = int(lines["nr_dirty_threshold"]) * os.sysconf("SC_PAGE_SIZE")
    share = int(Path("/proc/sys/vm/dirty_ratio").read_text()) / 100  # 0: the limit is fixed
    return int(TIMES * threshold / (1 + TIMES * share))


def _volume(path: Path, size: int) -> float:
    """Bytes a second that the volume takes past the page cache, over ``size`` bytes."""
    size = size // BLOCK * BLOCK
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    try:
        with mmap.mmap(-1, BLOCK) as block:  # O_DIRECT wants whole pages
            block.write(os.urandom(BLOCK))
            os.posix_fallocate(fd, 0, size)
            seconds = timed(lambda: [os.pwrite(fd, block, offset) for offset in range(0, size, BLOCK)])
    finally:
        os.close(fd)
        path.unlink()
    return size / seconds


def _watched(host: Host, source: str) -> list[tuple[float, float]]:
    """Pull; when how many bytes were had."""
    began, found = time.monotonic(), [(0.0, 0.0)]

    def heard(event: dict[str, object]) -> None:
        if event["event"] == "progress":
            found.append((time.monotonic() - began, float(str(event["done"]))))

    report = host.client.pull(source, heard)
    return [*found, (time.monotonic() - began, float(report["bytes_total"]))]


@contextlib.contextmanager
def _loads(host: Host, sources: list[str]) -> Iterator[list[float]]:
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
