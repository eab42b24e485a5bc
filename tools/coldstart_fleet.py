"""The nodes of a cold start: real daemons, each with a store of its own, and a worker beside each where one loads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightcache.client import Client, Progress
from weightcache.config import load_config
from weightcache.errors import DaemonError, from_wire
from weightcache.tools.coldstart_net import Network
from weightcache.tools.coldstart_origin import variables
from weightcache.tools.coldstart_settings import Role
from weightcache.tools.seaweed import die_with_parent

PORT = 7700  # of every daemon that has a network of its own
START_SECONDS = 120.0  # many daemons start at once, on few cores
MEET_SECONDS = 60.0
STOP_SECONDS = 5.0
POLL_SECONDS = 0.05
_STARTING = 4  # daemons that start at a time

Json = dict[str, Any]


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
            self.address, self._inside = f"127.0.0.1:{_two_free_ports()}", ()
        self._daemon: asyncio.subprocess.Process | None = None
        self._worker: asyncio.subprocess.Process | None = None
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
        # What the user has set for daemons of their own is not for these.
        own = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHTCACHE_")}
        environ = own | dict(self._place.environ) | {"WEIGHTCACHE_CONFIG": str(settings)}
        self.client = Client(load_config(file=settings, environ={}), embed=False)
        module = (sys.executable, "-P", "-m")
        self._daemon = await self._start(
            "daemon", [*self._inside, *module, "weightcache.tools", "daemon", "--json"], environ
        )
        await self._line(self._daemon, "daemon")
        if self._device is not None:
            command = [*module, "weightcache.tools.coldstart_worker", self._device]
            self._worker = await self._start("worker", command, environ)
            await self._line(self._worker, "worker")

    async def wake(self, source: str) -> None:
        """Have it ask the origin once: what a daemon starts with its first load is there from then on."""
        await self.client.pull(source, revalidate=True)

    async def pull(self, source: str, on_event: Progress) -> Json:
        return await self.client.pull(source, on_event)

    async def load(self, source: str) -> Json:
        """Have the worker load a source onto its device: when it began and ended, on time.monotonic's clock."""
        assert self._worker is not None
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps({"source": source}).encode() + b"\n")
        return await self._line(self._worker, "worker", seconds=None)

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
        assert self._daemon is not None
        with contextlib.suppress(ProcessLookupError):
            self._daemon.kill()

    async def close(self) -> None:
        if hasattr(self, "client"):
            await self.client.close()
        for process in (self._worker, self._daemon):
            if process is not None and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        for process in (self._worker, self._daemon):
            if process is not None:
                await ended(process)
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _start(self, what: str, command: Sequence[str], environ: Mapping[str, str]) -> asyncio.subprocess.Process:
        with (self._folder / f"{what}.log").open("wb") as log:
            return await start(command, environ, log)

    async def _line(
        self, process: asyncio.subprocess.Process, what: str, seconds: float | None = START_SECONDS
    ) -> Json:
        name = f"{self.role.name}: its {what}"
        answer = await line(process, name, seconds, self._folder / f"{what}.log")
        if "error" in answer:
            raise from_wire(answer["error"], f"{self.role.name}: {answer['message']}")
        return answer


async def start(command: Sequence[str], environ: Mapping[str, str], log: Any) -> asyncio.subprocess.Process:
    """A process to talk to, which ends with this one."""
    return await asyncio.create_subprocess_exec(
        *command, env=environ, stderr=log, preexec_fn=die_with_parent,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


async def line(process: asyncio.subprocess.Process, name: str, seconds: float | None, log: Path) -> Json:
    """The next line of JSON that a process says. Raises DaemonError when it ends instead, or says nothing."""
    assert process.stdout is not None
    try:
        said = await asyncio.wait_for(process.stdout.readline(), seconds)
    except TimeoutError:
        raise DaemonError(f"{name} said nothing for {seconds:.0f} s") from None
    if not said:
        told = log.read_text(errors="replace").splitlines()
        raise DaemonError(f"{name} ended: {told[-1][:300] if told else 'without a word'}")
    answer: Json = json.loads(said)
    return answer


async def ended(process: asyncio.subprocess.Process) -> None:
    """Wait for a process that was told to end; kill one that does not."""
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


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
    command = [sys.executable, "-P", "-m", "weightcache.tools.coldstart_origin", str(objects)]
    if place.network is not None:
        host = place.network.address["origin"]
        command = [*place.network.inside("origin"), *command]
    log = place.folder / "origin.log"
    with log.open("wb") as file:
        process = await start([*command, host], os.environ, file)
    try:
        port = (await line(process, "the origin", START_SECONDS, log))["port"]
        yield Origin(process, log, f"http://{host}:{port}")
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Origin:
    """The running origin. ``environ``: what a daemon must know to find it."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, endpoint: str) -> None:
        self._process = process
        self._log = log
        self.pid = process.pid
        self.environ = variables(endpoint)

    async def counts(self) -> tuple[int, int]:
        """Bytes of objects that it has sent, and requests it was asked. Raises DaemonError when it is gone."""
        if self._process.returncode is not None:
            raise DaemonError("the origin has ended")
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        said = await line(self._process, "the origin", START_SECONDS, self._log)
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


def _two_free_ports() -> int:
    """A port of loopback whose successor is free, too; not of those that the kernel hands out."""
    while True:
        port = random.randrange(10_000, 32_000, 2)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 1))
            return port
