"""An origin to a host's store, beside the programs with which people fetch from such origins."""

from __future__ import annotations

import contextlib

from bench import rivals, rounds
from bench.hosts import MB, Host, host, nginx, write_random
from bench.limit import fastest, limit
from bench.rounds import Contender, timed
from bench.run import Run
from bench.table import Table, at_least
from tests.servers.s3 import S3Server

ABOUT = (
    "Timed for weightcache: a pull by a running daemon that asks the origin for the version each time, reads, hashes "
    "and writes; for the others: the whole command. The limit has no HTTP: it shows what the machine could do."
)
BUCKET, KEY = "bench", "blob"


def origin(run: Run) -> Table:
    """S3 and a web server, each to weightcache and to others."""
    size = run.size(400 * MB, 64 * MB)
    path = write_random(run.folder / "blob", size)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        server, nginx_pids = enter(nginx(run.folder))
        s3 = enter(S3Server(run.folder / "s3"))
        s3.put(BUCKET, KEY, path)
        env = s3.env() | {"AWS_ENDPOINT_URL": s3.direct}
        daemon = enter(host(run.folder / "a", env=env | {"AWS_ALLOW_HTTP": "true"}))
        contenders = [
            enter(limit(path, run.folder, fastest(run))),
            reading("S3 -> weightcache", f"s3://{BUCKET}/{KEY}", size, daemon, [s3.pid]),
            *rivals.s3(BUCKET, KEY, run.folder, size, [s3.pid], env),
            enter(rivals.runai(BUCKET, KEY, size, [s3.pid], env)),
            reading("nginx -> weightcache", server.url("blob"), size, daemon, nginx_pids),
            *rivals.web(server.url("blob"), run.folder, size, nginx_pids),
        ]
        table = rounds.compare(
            "origin", f"an origin to the store, {size / MB:.0f} MB, loopback", ABOUT, contenders, run
        )
    for kind in ("S3", "nginx"):
        others = [
            row for row in table.rows if row.name.startswith(kind) and "weightcache" not in row.name and row.values
        ]
        best = max(others, key=lambda row: row.values["speed"], default=None)
        name = best.name if best is not None else "the fastest other"
        table.expect(at_least(1, f"times the fastest, {name}"), f"{kind} -> weightcache", "speed", name)
    return table


def reading(name: str, source: str, size: int, to: Host, server: list[int]) -> Contender:
    """A pull that asks the origin for the version."""
    return Contender(
        name,
        size,
        lambda: timed(lambda: to.pull(source, revalidate=True)),
        lambda: to.forget(source),
        sending=lambda: server,
        receiving=lambda: to.pids,
    )
