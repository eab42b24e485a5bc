"""Several bulk processes a side: what they bring where cores are free for them, and what they cost where none are."""

from __future__ import annotations

import contextlib
import os

from bench import rounds
from bench.hosts import MB, Host, holder, host, nginx, pulling, write_random
from bench.limit import fastest, limit
from bench.run import Run
from bench.small import write_tensors
from bench.table import Table, at_least
from tests.fleet.daemons import Daemon, slowly, written

ABOUT = (
    "Slowed: each receiving process lands at most 100 MB/s and idles the rest of the time, so that it is not this "
    "machine's cores that hold several; chunks of 1 MiB. Shares: of all the bytes, by process."
)
COUNTS = (1, 2, 4)


def lanes(run: Run) -> Table:
    """One daemon to another, with 1, 2 and 4 processes on either side."""
    size = run.size(400 * MB, 64 * MB)
    path = write_random(run.folder / "blob", size)
    small = write_tensors(run.folder / "small.safetensors", run.size(200, 64)).stat().st_size
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        server, _ = enter(nginx(run.folder))
        contenders, pairs = [enter(limit(path, run.folder, fastest(run)))], []
        for name, moved, slowed in (("blob", size, ""), ("small.safetensors", small, " slowed")):
            for count in COUNTS:
                folder, option, source = run.folder / f"{count}{slowed}", f"--bulk-processes={count}", server.url(name)
                of = enter(holder(Daemon(folder / "a", option), [source]))
                to = enter(host(folder / "b", option, peers=[of], env=slowly() if slowed else None))
                contenders.append(pulling(f"{count}{slowed}", source, moved, to, [of]))
                pairs.append((of, to))
        title = f"one peer to one host, {size / MB:.0f} MB, loopback, {len(os.sched_getaffinity(0))} cores"
        table = rounds.compare("lanes", title, ABOUT, contenders, run)
        for row, (of, to) in zip(table.rows[1:], pairs, strict=True):
            row.note = f"receiving: {shares(to, 'recv')}; sending: {shares(of, 'send')}"
    table.expect(at_least(0.9, "of one process' speed"), "2", "speed", "1")
    table.expect(at_least(1.8, "times one process' speed, slowed"), "2 slowed", "speed", "1 slowed")
    table.expect(at_least(3.2, "times one process' speed, slowed"), "4 slowed", "speed", "1 slowed")
    return table


def shares(of: Host, role: str) -> str:
    """Which part of the bytes each process of a role has written, to a file or to a peer."""
    counts = [written(pid) for pid in of.client.status()["processes"][role]]
    return ", ".join(f"{100 * count / sum(counts):.0f}%" for count in counts)
