"""The daemon itself: how soon it answers while bytes move, what memory it holds, how soon it is there."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bench import rounds
from bench.hosts import MB, holder, host, nginx, write_random
from bench.processes import HighWater
from bench.processes import memory as held_by
from bench.rounds import timed
from bench.run import Run
from bench.standing import ROOT
from bench.table import Column, Row, Table, at_most
from tests.fleet.daemons import Daemon
from tests.servers.loop import spawn, wait_until
from tests.servers.s3 import S3Server

MS = "{:.1f}"
LATENCIES = (
    Column("p50", "p50 ms", MS),
    Column("p99", "p99 ms", MS, bars=True),
    Column("worst", "worst ms", MS),
    Column("count", "requests", "{:,.0f}"),
)


# -- latency


@contextlib.contextmanager
def probing(sockets: dict[str, Path]) -> Iterator[dict[str, list[float]]]:
    """Ask who listens at these sockets for their status, 100 times a second each, while the block runs; seconds."""
    probes = {
        name: spawn(
            [sys.executable, "-m", "bench.probe", str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name, path in sockets.items()
    }
    found: dict[str, list[float]] = {}
    for probe in probes.values():
        assert probe.stdout is not None
        probe.stdout.readline()  # it has begun
    yield found
    for name, probe in probes.items():
        out, _ = probe.communicate()
        found[name] = json.loads(out)


@contextlib.contextmanager
def bare_answerer(path: Path) -> Iterator[None]:
    """A process that answers at a socket and does nothing else: what the machine's scheduler alone costs."""
    process = spawn([sys.executable, "-m", "bench.probe", "--answer", str(path)], cwd=ROOT)
    try:
        wait_until(path.exists, what="the answering process")
        yield
    finally:
        process.kill()
        process.wait()


def latency(run: Run) -> Table:
    """How soon the control API answers, idle and while a gigabyte moves."""
    size = run.size(1000 * MB, 100 * MB)
    write_random(run.folder / "blob", size)
    rows: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        server, _ = enter(nginx(run.folder))
        source = server.url("blob")
        sending = enter(holder(Daemon(run.folder / "a"), [source]))
        receiving = enter(host(run.folder / "b", peers=[sending]))
        enter(bare_answerer(run.folder / "bare"))
        sockets = {
            "limit": run.folder / "bare", "weightcache, receiving": receiving.daemon.socket,
            "weightcache, sending": sending.daemon.socket,
        }  # fmt: skip
        with probing(sockets) as idle:
            time.sleep(2.0)
        for _ in range(run.rounds + 1):
            receiving.forget(source)
            rounds.drain()
            with probing(sockets) as busy:
                receiving.pull(source)
            for name, seconds in busy.items():
                rows.setdefault(name, []).extend(seconds)
    table = Table(
        "latency", f"GET /v1/status while {size / MB:.0f} MB move, loopback",
        "Asked over a new connection each time, 100 times a second, by a process of its own for each. 'limit' is a "
        "process that only answers: the rest is what the kernel's scheduler takes with all cores busy.",
        LATENCIES,
        [Row(f"{name}, idle", percentiles(seconds)) for name, seconds in idle.items()]
        + [Row(name, percentiles(seconds)) for name, seconds in rows.items()],
    )  # fmt: skip
    for name in ("weightcache, receiving", "weightcache, sending"):
        table.expect(at_most(20, f"ms at p99: {name}"), name, "p99")
    return table


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[len(ordered) * 99 // 100]
    return {
        "p50": ordered[len(ordered) // 2] * 1e3, "p99": p99 * 1e3, "worst": ordered[-1] * 1e3, "count": len(ordered),
    }  # fmt: skip


# -- memory

FROM_S3 = ", from S3"


def memory(run: Run) -> Table:
    """All processes of a daemon together: idle, while it moves blobs of several sizes, and after."""
    sizes = [run.size(full * MB, quick * MB) for full, quick in ((250, 16), (1000, 32), (2000, 64))]
    columns = (
        Column("sending", "MB\nsending", "{:.0f}"), Column("receiving", "MB\nreceiving", "{:.0f}", bars=True),
        Column("more_sending", "more than idle\nsending", "{:.0f}"),
        Column("more_receiving", "more than idle\nreceiving", "{:.0f}"),
    )  # fmt: skip
    table = Table(
        "memory", "a daemon's memory, all its processes together",
        "PSS: pages they share are counted once. Idle: just started, connected to one peer. While it moves: the most "
        "that 20 samples a second saw. From S3: by another daemon, which has no peer.", columns,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        server, _ = enter(nginx(run.folder))
        for size in sizes:
            write_random(run.folder / f"blob{size}", size)
        sending = enter(holder(Daemon(run.folder / "a"), [server.url(f"blob{size}") for size in sizes]))
        receiving = enter(host(run.folder / "b", peers=[sending]))
        before = {"sending": held_by(sending.pids), "receiving": held_by(receiving.pids)}
        table.rows.append(_held("idle", before, before, "the sending one has pulled from an origin before"))
        for size in sizes:
            rounds.drain()
            source = server.url(f"blob{size}")
            with HighWater(lambda: sending.pids) as most_sending, HighWater(lambda: receiving.pids) as most_receiving:
                receiving.pull(source)
            most = {"sending": most_sending.bytes, "receiving": most_receiving.bytes}
            table.rows.append(_held(f"{size / MB:.0f} MB", most, before))
            receiving.forget(source)
        after = {"sending": held_by(sending.pids), "receiving": held_by(receiving.pids)}
        table.rows.append(_held("after", after, before))
        s3 = enter(S3Server(run.folder / "s3"))
        env = s3.env() | {"AWS_ENDPOINT_URL": s3.direct, "AWS_ALLOW_HTTP": "true"}
        reading = enter(host(run.folder / "c", env=env))
        before = {"receiving": held_by(reading.pids)}
        for size in sizes:
            s3.put("bench", f"blob{size}", run.folder / f"blob{size}")
            rounds.drain()
            with HighWater(lambda: reading.pids) as most_reading:
                reading.pull(f"s3://bench/blob{size}")
            table.rows.append(_held(f"{size / MB:.0f} MB{FROM_S3}", {"receiving": most_reading.bytes}, before))
            reading.forget(f"s3://bench/blob{size}")
    smallest, largest = (f"{size / MB:.0f} MB" for size in (sizes[0], sizes[-1]))
    table.expect(at_most(120, "MB idle"), "idle", "receiving")
    for side in ("sending", "receiving"):
        table.expect(at_most(100, f"MB more while {largest} move, {side}"), largest, f"more_{side}")
        table.expect(at_most(1.2, f"times the memory of {smallest}, {side}"), largest, side, smallest)
    largest += FROM_S3
    table.expect(at_most(100, f"MB more while {largest} move"), largest, "more_receiving")
    table.expect(at_most(1.2, f"times the memory of {smallest}{FROM_S3}"), largest, "receiving", smallest + FROM_S3)
    return table


def _held(name: str, held: dict[str, int], idle: dict[str, int], note: str = "") -> Row:
    values = {side: size / MB for side, size in held.items()}
    return Row(name, values | {f"more_{side}": (held[side] - idle[side]) / MB for side in held}, note)


# -- startup


def startup(run: Run) -> Table:
    """From nothing to an import, a help text, a daemon that answers."""
    python = [sys.executable]
    work = {
        "limit": [*python, "-c", "pass"],
        "import weightcache": [*python, "-c", "import weightcache"],
        "weightcache --help": [str(Path(sys.executable).parent / "weightcache"), "--help"],
        "import weightcache.runtime": [*python, "-c", "import weightcache.runtime"],
        "import torch": [*python, "-c", "import torch"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*work, "daemon ready")}
    for number in range(2 * run.rounds + 1):
        for name, command in work.items():
            spent = timed(partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL, cwd=run.folder))
            if number:
                seconds[name].append(spent)
        with contextlib.closing(_Ready(run.folder / "daemon")) as daemon:
            if number:
                seconds["daemon ready"].append(daemon.seconds)
    table = Table(
        "startup", "from the start of a process",
        "Processes from their start to their end, everything in the page cache; the daemon until it says that it "
        "answers, on an existing empty store. The limit is an interpreter that does nothing.",
        (Column("ms", "median ms", "{:.0f}", bars=True), Column("worst", "worst ms", "{:.0f}")),
        [
            Row(name, {"ms": statistics.median(spent) * 1e3, "worst": max(spent) * 1e3})
            for name, spent in seconds.items()
        ],
        facts={"rounds": 2 * run.rounds},
    )  # fmt: skip
    for name, most in (("import weightcache", 150), ("weightcache --help", 300), ("daemon ready", 700)):
        table.expect(at_most(most, f"ms: {name}"), name, "ms")
    return table


class _Ready:
    """A daemon from its start to the line that says it is ready."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        command = [str(Path(sys.executable).parent / "weightcache"), "daemon"]
        command += [f"--store={root / 'store'}", f"--socket={root / 'sock'}", "--listen=127.0.0.1:0"]
        began = time.perf_counter()
        self._process = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.seconds = time.perf_counter() - began
        if not line.startswith(b"ready"):
            raise SystemExit("the daemon did not start")

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()
