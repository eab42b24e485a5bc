"""``python -m bench [NAME...]``: measure, print tables, and write JSON and a picture of each."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bench import picture
from bench.run import Run
from bench.table import Table, show

# Name, where it is, what it shows. Those that are only run when named take minutes and much of the machine.
TABLES = {
    "peer": ("bench.peer", "one peer to one host, beside curl, aria2c, wget, libtorrent and the limit"),
    "two-peers": ("bench.peer", "two peers to one host"),
    "lanes": ("bench.lanes", "one peer to one host, with 1, 2 and 4 bulk processes on either side"),
    "small": ("bench.small", "thousands of small chunks, a hundred peers known"),
    "origin": ("bench.origin", "S3 and nginx to the store, beside s5cmd, rclone, Run:ai, curl, aria2c, wget"),
    "latency": ("bench.daemon", "the control API's answers while a gigabyte moves"),
    "memory": ("bench.daemon", "what the daemon's processes hold, idle and busy"),
    "startup": ("bench.daemon", "import, --help, daemon ready"),
    "finetunes": (
        "bench.finetunes",
        "ten fine-tunes that share 60%: bytes by source, beside the distinct ones",
    ),
    "link": ("bench.link", "over a link shaped to 1 Gbit/s; needs root"),
    "herd": ("bench.herd", "8 hosts at once, beside libtorrent and no peers; needs root, takes minutes"),
    "herd-disturbed": ("bench.herd", "the same with one host killed, slow, corrupt; needs root, takes minutes"),
    "simulated": ("bench.simulated", "fleets of 8 to 10,000 hosts in virtual time; takes many minutes of every core"),
    "warm": ("bench.load", "load_file from the page cache, beside safetensors"),
    "stream": ("bench.stream", "stream_file and the ring, beside the bound, safetensors, Run:ai and others"),
    "stream-cold": ("bench.cold", "stream_snapshot from a peer over a link shaped to 1 Gbit/s; needs root"),
    "pipeline": ("bench.pipeline", "load_pipeline beside from_pretrained, from the page cache, to the CPU"),
    "planner": ("bench.planner", "what one decision of the planner costs"),
    "landing": ("bench.landing", "ways to move a chunk from process to process"),
    "dirty": ("bench.dirty", "a pull of three times the kernel's dirty limit"),
}
ONLY_WHEN_NAMED = ("dirty", "herd", "herd-disturbed", "simulated")


def measure(name: str, run: Run) -> Table:
    """Run one comparison."""
    module, _ = TABLES[name]
    compare: Callable[[Run], Table] = getattr(importlib.import_module(module), name.replace("-", "_"))
    before = os.getloadavg()[0]
    began = time.monotonic()
    table = compare(run)
    table.facts |= {
        "load average before": round(before, 2),
        "after": round(os.getloadavg()[0], 2),
        "seconds": round(time.monotonic() - began),
    }
    return table


def machine() -> dict[str, object]:
    """What the figures are of."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="comparisons; none: all but " + ", ".join(ONLY_WHEN_NAMED)
    )
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    parser.add_argument("--quick", action="store_true", help="smaller sizes: for a look, not for figures")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender that count [5]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all results in one file [OUT/bench.json]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", metavar="DIR", help="[bench/out]")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where blobs are written: the disk to measure [OUT]")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in TABLES]
    if unknown:
        parser.error(f"no such comparison: {', '.join(unknown)}; there are {', '.join(TABLES)}")
    return given


def main() -> int:
    given = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if given.list:
        for name, (_, about) in TABLES.items():
            console.print(f"{name:12} {about}{' (only when named)' if name in ONLY_WHEN_NAMED else ''}", soft_wrap=True)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    names = given.names or [name for name in TABLES if name not in ONLY_WHEN_NAMED]
    done: list[Table] = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=given.dir or given.out) as folder:
            table = measure(name, Run(Path(folder), given.quick, given.rounds))
        show(table, console)
        done.append(table)
        (given.out / f"{name}.svg").write_text(picture.draw(table))
        result = {"machine": machine(), "quick": given.quick, "tables": [table.to_json() for table in done]}
        (given.json or given.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"\nin {given.out}: {', '.join(f'{name}.svg' for name in names)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
