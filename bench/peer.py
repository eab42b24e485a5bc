"""One host's blob to another host, on this machine's loopback. With ``--dir /dev/shm`` their stores are in memory."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench import rivals, rounds
from bench.hosts import MB, MEMORY, Host, holder, host, nginx, pulling, write_random
from bench.limit import fastest, limit
from bench.rounds import Contender, timed
from bench.run import Run
from bench.table import Table, at_least, at_most
from tests.fleet.daemons import Daemon

ABOUT = (
    "Timed for weightcache: a client's pull, from the call until every byte is hashed, written and linked, of a source "
    "that the daemon resolved within the last minute; daemons and their processes are up. 'first': the daemon is up, "
    "has an empty store and never pulled: it asks its peers for the source, and starts its receiving process."
)
FIRST = "weightcache, first"
OURS = "weightcache"


@contextlib.contextmanager
def first_pull(folder: Path, source: str, size: int, serving: Host) -> Iterator[Contender]:
    """A pull by a daemon that has just started, on an empty store."""
    with contextlib.ExitStack() as running:
        new: list[Host] = []

        def clear() -> None:
            running.close()
            new.clear()
            shutil.rmtree(folder, ignore_errors=True)

        yield Contender(
            FIRST,
            size,
            lambda: timed(lambda: new[0].pull(source)),
            clear,
            lambda: new.append(running.enter_context(host(folder, peers=[serving]))),
            lambda: serving.pids,
            lambda: new[0].pids if new else [],
        )


def peer(run: Run) -> Table:
    """One daemon to another, beside the limit and other programs."""
    size = run.size(400 * MB, 64 * MB)
    path = write_random(run.folder / "blob", size)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        server, nginx_pids = enter(nginx(run.folder))
        source = server.url("blob")
        sending = enter(holder(Daemon(run.folder / "a"), [source]))
        receiving = enter(host(run.folder / "b", peers=[sending]))
        memory = Path(enter(tempfile.TemporaryDirectory(prefix="bench-", dir=MEMORY)))
        in_memory = enter(host(memory / "d", peers=[sending]))
        contenders = [
            enter(limit(path, run.folder, fastest(run))),
            enter(limit(path, run.folder, replace(fastest(run), xxh3=True), "limit, and xxh3")),
            pulling(OURS, source, size, receiving, [sending]),
            enter(first_pull(run.folder / "c", source, size, sending)),
            pulling("weightcache, store on tmpfs", source, size, in_memory, [sending]),
            *rivals.web(source, run.folder, size, nginx_pids),
            enter(rivals.libtorrent(path, run.folder)),
        ]
        table = rounds.compare("peer", f"one peer to one host, {size / MB:.0f} MB, loopback", ABOUT, contenders, run)
    table.expect(at_least(0.9, "of the limit"), OURS, "ratio")
    table.expect(at_least(2.5, "times curl"), OURS, "speed", "nginx -> curl")
    table.expect(at_least(8, "times libtorrent"), OURS, "speed", "libtorrent")
    table.expect(at_most(1.2, "CPU of the limit's, both sides"), OURS, "cpu_ratio")
    return table


def two_peers(run: Run) -> Table:
    """The same bytes from two daemons at once."""
    size = run.size(400 * MB, 64 * MB)
    path = write_random(run.folder / "blob", size)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        server, _ = enter(nginx(run.folder))
        source = server.url("blob")
        first, second = (enter(holder(Daemon(run.folder / name), [source])) for name in "ab")
        one = enter(host(run.folder / "c", peers=[first]))
        two = enter(host(run.folder / "d", peers=[first, second]))
        contenders = [
            enter(limit(path, run.folder, fastest(run))),
            pulling("weightcache, one peer", source, size, one, [first]),
            pulling("weightcache, two peers", source, size, two, [first, second]),
        ]
        table = rounds.compare(
            "two-peers", f"two peers to one host, {size / MB:.0f} MB, loopback", ABOUT, contenders, run
        )
    table.expect(at_least(1, "times one peer"), "weightcache, two peers", "speed", "weightcache, one peer")
    return table
