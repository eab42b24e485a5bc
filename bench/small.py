"""Thousands of small chunks, and a hundred peers known."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import rounds
from bench.hosts import holder, host, nginx, pulling, write_random
from bench.limit import fastest, limit
from bench.run import Run
from bench.standing import ROOT
from bench.table import Table, at_least
from tests.fleet.daemons import Daemon
from tests.servers.loop import spawn

ABOUT = (
    "Peers that listen have nothing of the blob but want it: they are told of each chunk. Peers that serve have all of "
    "it. They are weightcache's own connections and sending processes, without a store. The number of chunks is what "
    "the kernel's dirty limit has room for; with --dir on a tmpfs there is no such limit."
)
MIB = 1 << 20
CROWD = 99  # besides the daemon that has the blob
LARGE = "one blob, largest chunks"


def small(run: Run) -> Table:
    """Chunks of 1 MiB, and a hundred peers known, beside large chunks and one peer."""
    count = chunks_within(rounds.dirty_room(run.folder), 300 if run.quick else 5000)
    folder, size = run.folder, count * MIB
    write_random(folder / "large", size)
    size = write_tensors(folder / "small.safetensors", count).stat().st_size
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        server, _ = enter(nginx(folder))
        large, tensors = server.url("large"), server.url("small.safetensors")
        sending = enter(holder(Daemon(folder / "a"), [large, tensors]))
        about = [tensors, str(folder / "small.safetensors"), sending.daemon.address]
        watching, watch_pid = enter(crowd("watch", *about))
        holding, hold_pid = enter(crowd("hold", *about))
        alone = enter(host(folder / "b", peers=[sending]))
        watched = enter(host(folder / "c", peers=[sending], known=watching))
        served = enter(host(folder / "d", peers=[sending], known=holding))
        path = folder / "small.safetensors"
        contenders = [
            enter(limit(path, folder, fastest(run))),
            pulling(LARGE, large, count * MIB, alone, [sending]),
            pulling(f"{count:,} x 1 MiB, one peer", tensors, size, alone, [sending]),
            pulling(f"{count:,} x 1 MiB, {CROWD} listen", tensors, size, watched, [sending, watch_pid]),
            pulling(f"{count:,} x 1 MiB, {CROWD} serve", tensors, size, served, [sending, hold_pid]),
        ]
        table = rounds.compare("small", f"{count:,} chunks of 1 MiB, {CROWD} peers known", ABOUT, contenders, run)
    for row in table.rows[2:]:
        table.expect(at_least(0.8, f"of the large blob's speed: {row.name}"), row.name, "speed", LARGE)
    return table


@contextlib.contextmanager
def crowd(role: str, source: str, path: str, address: str) -> Iterator[tuple[list[str], int]]:
    """Peers that watch or hold; their addresses, and the process they live in."""
    command = [sys.executable, "-m", "bench.crowd", str(CROWD), role, source, path, address]
    process = spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline()), process.pid
    finally:
        process.kill()
        process.communicate()


def chunks_within(room: int, wanted: int) -> int:
    """As many chunks of 1 MiB as may be written without the kernel's slowing the writer down."""
    return max(1, min(wanted, room // MIB))


def write_tensors(path: Path, count: int) -> Path:
    """A safetensors file of ``count`` tensors of 1 MiB, which all differ."""
    tensors = {
        f"layer.{number}.weight": {"dtype": "U8", "shape": [MIB], "data_offsets": [number * MIB, (number + 1) * MIB]}
        for number in range(count)
    }
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    block = bytearray(random.Random(count).randbytes(MIB))
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for number in range(count):
            block[:8] = number.to_bytes(8, "little")
            file.write(block)
    return path
