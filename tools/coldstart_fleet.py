"""The nodes of a cold start: real daemons, each with a store of its own, and a worker beside each where one loads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightcache.client import Client, Progress
from weightcache.config import load_config
from weightcache.errors import DaemonError
from weightcache.tools.child import PYTHON, Child, Json
from weightcache.tools.coldstart_net import Network
from weightcache.tools.coldstart_origin import variables
from weightcache.tools.coldstart_settings import Role
from weightcache.tools.local import free_pair

PORT = 7700  # of every daemon that has a network of its own
MEET_SECONDS = 60.0
POLL_SECONDS = 0.05
_STARTING = 4  # daemons that start at a time


@dataclass(frozen=True, slots=True)
class Place:
    """Where nodes are made: the folder, their network (None: loopback), what leads to the origin.

    ``sockets``: a folder whose path is short, as that of a socket must be.
    """

    folder: Path
    sockets: Path
    network: Network | None
    environ: Mapping[str, str]


class Node:
    """One daemon, and a worker if ``device`` is given. ``address``: where its peers find it."""

    def __init__(self, role: Role, place: Place, device: str | None = None) -> None:
        self.role = role
        self.dead = False  # killed on purpose
        self._place = place
        self._device = device
        self._folder = place.folder / role.name
        self._folder.mkdir()
        if place.network is not None:
            self.address = f"{place.network.address[role.name]}:{PORT}"
            self._inside = place.network.inside(role.name)
        else:
            self.address, self._inside = f"127.0.0.1:{free_pair()}", ()
        self._children: list[Child] = []  # the daemon, and the worker
        self.client: Client

    async def open(self, peers: Sequence[str]) -> None:
        """Start its processes. Raises DaemonError when one does not start."""
        key = self._folder / "key"  # what is not loopback must have one
        key.touch(0o600)
        key.write_text("of this benchmark only")
        settings = self._folder / "config.toml"
        lines = {
            "store": str(self._folder / "store"), "socket": str(self._place.sockets / self.role.name),
            "listen": self.address, "peers": list(peers), "cluster_key_file": str(key),
        }  # fmt: skip
        settings.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items()))
        environ = {**self._place.environ, "WEIGHTCACHE_CONFIG": str(settings)}
        self.client = Client(load_config(file=settings, environ={}), embed=False)
        await self._start("daemon", [*self._inside, *PYTHON, "weightcache.tools", "daemon", "--json"], environ)
        if self._device is not None:
            await self._start("worker", [*PYTHON, "weightcache.tools.coldstart_worker", self._device], environ)

    async def wake(self, source: str) -> None:
        """Have it ask the origin once: what a daemon starts with its first load is there from then on."""
        await self.client.pull(source, revalidate=True)

    async def pull(self, source: str, on_event: Progress | None = None) -> Json:
        return await self.client.pull(source, on_event)

    async def load(self, source: str) -> Json:
        """Have the worker load a source onto its device: when it began and ended, on time.monotonic's clock."""
        _, worker = self._children
        return await worker.ask({"source": source}, seconds=None)

    async def meet(self, others: int) -> None:
        """Wait until it is connected with so many peers."""
        deadline = time.monotonic() + MEET_SECONDS
        while (met := sum(peer["state"] == "connected" for peer in await self.client.peers())) < others:
            if time.monotonic() > deadline:
                raise DaemonError(f"{self.role.name} met {met} of {others} peers within {MEET_SECONDS:.0f} s")
            await asyncio.sleep(POLL_SECONDS)

    async def spoil(self, source: str) -> None:
        """Flip a bit in each chunk that its disk holds of a source, as a bad disk would: it was hashed long ago."""
        path = await self.client.path(source)
        for file in await self.client.manifest(source):
            await asyncio.to_thread(_flip, path if path.is_file() else path / file["path"], file["chunks"])

    def kill(self) -> None:
        """As a crash would."""
        self.dead = True
        with contextlib.suppress(ProcessLookupError):
            self._children[0].process.kill()

    async def close(self) -> None:
        if hasattr(self, "client"):
            await self.client.close()
        await asyncio.gather(*(child.end() for child in self._children))
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _start(self, what: str, command: Sequence[str], environ: Mapping[str, str]) -> None:
        child = await Child.start(f"{self.role.name}: its {what}", command, environ, self._folder / f"{what}.log")
        self._children.append(child)
        await child.said()


@contextlib.asynccontextmanager
async def fleet(
    roles: Sequence[Role], place: Place, *, peers: bool, device: str | None = None
) -> AsyncIterator[list[Node]]:
    """Nodes that are up and, with ``peers``, know each other. Their processes and files go when the block ends."""
    nodes = [Node(role, place, device) for role in roles]
    gate = asyncio.Semaphore(_STARTING)

    async def begin(node: Node) -> None:
        async with gate:
            await node.open([other.address for other in nodes if other is not node] if peers else [])

    try:
        await every(begin(node) for node in nodes)
        await every(node.meet(len(nodes) - 1 if peers else 0) for node in nodes)
        yield nodes
    finally:
        # One that cannot be closed must not keep the others, and a second Ctrl-C none of them.
        await asyncio.shield(asyncio.gather(*(node.close() for node in nodes), return_exceptions=True))


async def every(work: Any) -> list[Any]:
    """All of it at once; the first failure cancels the rest, and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def origin(objects: Path, place: Place) -> AsyncIterator[Origin]:
    """The origin over a folder of objects: behind its link if there is a network."""
    host = "127.0.0.1"
    command = [*PYTHON, "weightcache.tools.coldstart_origin", str(objects)]
    if place.network is not None:
        host = place.network.address["origin"]
        command = [*place.network.inside("origin"), *command]
    child = await Child.start("the origin", [*command, host], {}, place.folder / "origin.log")
    try:
        yield Origin(child, f"http://{host}:{(await child.said())['port']}")
    finally:
        await child.end()


class Origin:
    """The running origin. ``environ``: what a daemon must know to find it."""

    def __init__(self, child: Child, endpoint: str) -> None:
        self._child = child
        self.pid = child.process.pid
        self.environ = variables(endpoint)

    async def counts(self) -> tuple[int, int]:
        """Bytes of objects that it has sent, and requests it was asked. Raises DaemonError when it is gone."""
        said = await self._child.ask({})
        return said["sent"], said["requests"]


def _flip(path: Path, chunks: Sequence[Json]) -> None:
    path.chmod(0o644)
    with open(path, "r+b", buffering=0) as file:
        for chunk in chunks:
            at = chunk["offset"] + chunk["length"] - 1
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
