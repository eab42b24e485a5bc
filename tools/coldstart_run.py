"""Plays a cold start: the stage (network, object, origin), then rounds with peers and without, each a fleet of its own.

Everything is made anew for each run, so that cold means cold, and goes when the run ends, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from weightcache.client import Client
from weightcache.config import Config, socket_folder
from weightcache.errors import ConfigError, DaemonError, WeightcacheError
from weightcache.tools import coldstart_net as net
from weightcache.tools.coldstart_fleet import Node, Origin, Place, every, fleet, origin
from weightcache.tools.coldstart_machine import BUSY, CpuMeter, cores, too_much
from weightcache.tools.coldstart_measures import Curve, NodeRun, Run, bound, spread
from weightcache.tools.coldstart_object import write_object
from weightcache.tools.coldstart_origin import BUCKET
from weightcache.tools.coldstart_settings import Role, Settings

PREFIX = "weightcache-coldstart-"  # of the temporary folder
OBJECT = "checkpoint.safetensors"
SMALL = "small"  # what daemons load first, so that their processes are there

Json = dict[str, Any]


class Watcher(Protocol):
    """Who looks on: what goes on now, and what each node has."""

    def begin(self, title: str, roles: Sequence[Role], size: int) -> None: ...

    def moved(self, name: str, curve: Curve) -> None: ...

    def ended(self, node: NodeRun) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(slots=True)
class Result:
    """All that was measured. ``source``: what was loaded, for people. ``notes``: what a reader must know."""

    settings: Settings
    source: str
    size: int
    files: int
    namespaces: bool
    runs: list[Run] = field(default_factory=list)
    alone: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [failure for run in (*self.runs, *self.alone) for failure in run.failures]


@dataclass(slots=True)
class Stage:
    """What every run of one invocation shares. ``digests``: of the object's files, by path."""

    settings: Settings
    place: Place
    origin: Origin
    source: str
    digests: dict[str, bytes]
    size: int


def why_no_network(settings: Settings, *, loopback: bool) -> str:
    """Why the nodes live on loopback, or "". Raises ConfigError if the links that are asked for need a network."""
    why = "--loopback was given" if loopback else net.missing()
    if why and (settings.link is not None or settings.origin_link is not None):
        raise ConfigError(f"--link and --origin-link need network namespaces, and {why}")
    return why


@contextlib.asynccontextmanager
async def stage(
    settings: Settings, config: Config, folder: Path, watcher: Watcher, *, network: bool
) -> AsyncIterator[Stage]:
    """The stage, set up in ``folder``; all of it is gone when the block ends. Raises ConfigError if it is too much."""
    for below in {folder, Path(socket_folder())}:
        clear(below)
    name = f"{PREFIX}{os.getpid()}-{net.started(os.getpid())}-"
    async with contextlib.AsyncExitStack() as stack:
        try:
            own = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix=name, dir=folder, ignore_cleanup_errors=True))
            )
        except OSError as error:
            raise ConfigError(f"--dir {folder}: {error.strerror}") from None
        objects = own / "objects"
        objects.mkdir()
        size = settings.size or 0
        if settings.source is None:
            _refuse(settings, size, folder)
            watcher.say("making an object")
            await asyncio.to_thread(write_object, objects / OBJECT, size)
            key = OBJECT
        else:
            watcher.say(f"copying {settings.source} to this machine's origin")
            key = await _copy(settings.source, replace_store(config, own / "mirror"), objects)
        digests = await asyncio.to_thread(_digests, objects)
        size = sum((objects / name).stat().st_size for name in digests)
        (objects / SMALL).write_bytes(b"small")
        _refuse(settings, size, folder)
        made = None
        if network:
            links = {"origin": settings.origin_link} | {role.name: role.link for role in settings.roles()}
            made = stack.enter_context(net.network(links))
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=name, dir=socket_folder())))
        place = Place(own, sockets, made, {})
        server = await stack.enter_async_context(origin(objects, place))
        yield Stage(settings, replace(place, environ=server.environ), server, f"s3://{BUCKET}/{key}", digests, size)


def _refuse(settings: Settings, size: int, folder: Path) -> None:
    why = "" if settings.force else too_much(settings, size, folder)
    if why:
        raise ConfigError(f"coldstart: {why}; take fewer or smaller ones, or --force")


def clear(folder: Path) -> None:
    """Remove what runs that were killed have left there."""
    for left in folder.glob(f"{PREFIX}*-*-*"):
        pid, _, rest = left.name.removeprefix(PREFIX).partition("-")
        if pid.isdigit() and net.started(int(pid)) != rest.partition("-")[0]:
            shutil.rmtree(left, ignore_errors=True)


def replace_store(config: Config, store: Path) -> Config:
    """The user's way to origins, with a store of our own."""
    return Config(store=store, socket=None, origin=config.origin)


async def _copy(source: str, config: Config, objects: Path) -> str:
    """Bring a source into the folder of objects, once, whatever is loaded from there later; its key, or its prefix."""
    async with Client(config) as client:
        path = Path((await client.pull(source))["path"])

    def link() -> str:
        if path.is_file():
            os.link(path, objects / path.name)
            return path.name
        shutil.copytree(path, objects / "files", copy_function=os.link)
        return "files/"

    return await asyncio.to_thread(link)


def _digests(folder: Path) -> dict[str, bytes]:
    from blake3 import blake3

    return {
        str(path.relative_to(folder)): blake3(max_threads=blake3.AUTO).update_mmap(path).digest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- one run


async def play(stage: Stage, roles: Sequence[Role], watcher: Watcher, title: str, *, peers: bool) -> Run:
    """One start of the fleet."""
    settings = stage.settings
    warm = any(role.kind == "warm" for role in roles)
    runs = [NodeRun(role.name, role.what, role.counts, role.link, warm=role.kind != "cold") for role in roles]
    run = Run(runs, stage.size, peers)
    run.least = bound(stage.size, settings.link, settings.origin_link, warm=warm and peers)
    for node in runs:
        node.least = bound(stage.size, node.link, settings.origin_link, warm=warm and peers)
    watcher.say(f"{title}: starting {len(roles)} daemons")
    async with fleet(roles, stage.place, peers=peers, device=settings.device) as nodes:
        holders = [node for node in nodes if node.role.kind != "cold"]
        if not settings.fresh:
            await every(node.wake(f"s3://{BUCKET}/{SMALL}") for node in nodes)
        if holders:
            watcher.say(f"{title}: bringing the object to {', '.join(node.role.name for node in holders)}")
            await every(node.pull(stage.source) for node in holders)
            await every(node.spoil(stage.source) for node in holders if node.role.kind == "corrupt")
        await asyncio.to_thread(os.sync)  # what was written before is not written in the middle of it
        watcher.begin(title, roles, stage.size)
        await _start(stage, run, nodes, watcher)
        watcher.say(f"{title}: comparing bytes")
        await every(_compare(stage, node, seen) for node, seen in zip(nodes, runs, strict=True))
    spread(runs)
    return run


async def _start(stage: Stage, run: Run, nodes: list[Node], watcher: Watcher) -> None:
    """Let every cold node load, disturb those that are to be disturbed, and wait for all."""
    cold = [(node, seen) for node, seen in zip(nodes, run.nodes, strict=True) if node.role.kind == "cold"]
    curves = {node.role.name: Curve() for node, _ in cold}
    expected = run.size * len(cold)
    half = asyncio.Event()
    sent, requests = await stage.origin.counts()
    meter, began = CpuMeter(), time.monotonic()

    def heard(node: Node) -> Callable[[Json], None]:
        curve = curves[node.role.name]

        def hear(event: Json) -> None:
            curve.hear(event, time.monotonic() - began)
            watcher.moved(node.role.name, curve)
            if not half.is_set() and 2 * sum(one.had for one in curves.values()) >= expected:
                half.set()

        return hear

    async def load(node: Node, seen: NodeRun) -> None:
        await asyncio.sleep(node.role.delay)
        seen.address, seen.began = node.address, time.monotonic() - began
        try:
            working = asyncio.ensure_future(node.load(stage.source)) if stage.settings.device is not None else None
            try:
                seen.report = await node.pull(stage.source, heard(node))
                seen.ended = time.monotonic() - began
                if working is not None:
                    ended = (await working)["ended"] - began
                    seen.device = max(0.0, ended - seen.ended)
                    seen.ended = max(seen.ended, ended)
            finally:
                if working is not None:
                    working.cancel()
        except WeightcacheError as error:
            seen.error, seen.killed = ("killed", True) if node.dead else (str(error), False)
        finally:
            seen.curve = curves[node.role.name].points()
            watcher.ended(seen)

    async def kill(node: Node) -> None:
        assert node.role.kill is not None
        if node.role.kill.at is None:
            await half.wait()
        else:
            await asyncio.sleep(node.role.kill.at)
        node.kill()

    for node, seen in zip(nodes, run.nodes, strict=True):
        seen.address = node.address
    killing = [asyncio.ensure_future(kill(node)) for node in nodes if node.role.kill is not None]
    try:
        await every(load(node, seen) for node, seen in cold)
    finally:
        for task in killing:
            task.cancel()
        await asyncio.gather(*killing, return_exceptions=True)
    run.busy = meter.read().to_json()
    with contextlib.suppress(DaemonError):  # it is gone: the rows say what came of that
        now = await stage.origin.counts()
        run.egress, run.requests = now[0] - sent, now[1] - requests


async def _compare(stage: Stage, node: Node, seen: NodeRun) -> None:
    """Whether a node's files are the object's, byte by byte."""
    if seen.report is None:
        return
    path = Path(seen.report["path"])
    single = path.is_file()
    found = await asyncio.to_thread(_digests, path.parent if single else path)
    wanted = {
        name.rpartition("/")[2] if single else name.removeprefix("files/"): d for name, d in stage.digests.items()
    }
    seen.correct = found == wanted


async def measure(stage: Stage, watcher: Watcher, result: Result) -> None:
    """All rounds, by turns with and without peers; ``result`` has what there is, also when it is interrupted."""
    settings = stage.settings
    for number in range(1, settings.rounds + 1):
        count = f"round {number} of {settings.rounds}, " if settings.rounds > 1 else ""
        result.runs.append(await play(stage, settings.roles(), watcher, f"{count}with peers", peers=True))
        if settings.baseline:
            result.alone.append(await play(stage, settings.alone(), watcher, f"{count}without peers", peers=False))
        if result.failures:
            break
    busy = max((run.busy["all"] for run in result.runs if run.busy is not None), default=0.0)
    if busy >= BUSY:
        result.notes.append(f"{cores()} cores were {busy:.0%} busy: this measures the machine, not the links")
    others = max((run.busy["others"] for run in result.runs if run.busy is not None), default=0.0)
    if others > 0.1:
        result.notes.append(f"other work took {others:.0%} of the machine meanwhile: the figures are worse for it")


@contextlib.asynccontextmanager
async def ending_with(task: asyncio.Task[Any] | None) -> AsyncIterator[list[int]]:
    """SIGTERM, SIGHUP and Ctrl-C cancel the task, so that all is cleaned up; the list tells which it was."""
    assert task is not None
    got: list[int] = []

    def stop(number: int) -> None:
        if not got:
            task.cancel()
        got.append(number)

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        yield got
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
