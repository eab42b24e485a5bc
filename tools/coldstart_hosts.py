"""A cold start of a fleet that is there: daemons of this machine by their sockets, others by a command.

Nothing is started or disturbed. A host that has the object already is warm; ``evict`` makes the hosts forget it first.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightcache.client import Client
from weightcache.config import Config
from weightcache.errors import ConfigError, DaemonError, WeightcacheError, from_wire
from weightcache.tools.child import end
from weightcache.tools.coldstart_fleet import every
from weightcache.tools.coldstart_measures import Curve, NodeRun, Run, bound, spread
from weightcache.tools.coldstart_run import Watcher
from weightcache.tools.coldstart_settings import Role, Settings

ASK_SECONDS = 30.0  # for a host to say that it is there
MAX_LINE = 64 << 20

Json = dict[str, Any]


class Host:
    """One daemon: at a socket of this machine, if ``name`` has a slash, else wherever ``via`` leads."""

    def __init__(self, name: str, via: str) -> None:
        self.name = name
        self._client = Client(Config(socket=Path(name)), embed=False) if "/" in name else None
        self._command = shlex.split(via.replace("{host}", shlex.quote(name)))

    async def check(self) -> None:
        """Raise DaemonError unless it answers."""
        if self._client is not None:
            await self._client.status()
            return
        async for _ in self._say("status", "--json", seconds=ASK_SECONDS):
            pass

    async def evict(self, source: str) -> None:
        try:
            if self._client is not None:
                await self._client.evict([source])
                return
            async for _ in self._say("evict", "--json", source, seconds=ASK_SECONDS):
                pass
        except WeightcacheError as error:
            if type(error).__name__ != "UnknownBlob":  # it has nothing of it: all the better
                raise

    async def pull(self, source: str, hear: Callable[[Json], None]) -> Json:
        if self._client is not None:
            return await self._client.pull(source, hear)
        report: Json | None = None  # the answer is read to its end, or its process would outlive the loop
        async for event in self._say("pull", "--json", "--events", source):
            if "event" in event:
                hear(event)
            else:
                hear({"event": "done", "report": event})
                report = event
        if report is not None:
            return report
        raise DaemonError(f"{self.name}: pull ended without a report")

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _say(self, *words: str, seconds: float | None = None) -> AsyncIterator[Json]:
        """Run a command there; its lines of JSON. Raises what it reports, DaemonError when it cannot be run."""
        # ssh hands its words to a shell.
        said = [shlex.quote(word) for word in words] if Path(self._command[0]).name == "ssh" else words
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, *said, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE, limit=MAX_LINE, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise DaemonError(f"{self.name}: {self._command[0]}: {error.strerror}; see --via") from None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(seconds):
                async for line in process.stdout:
                    try:
                        event = json.loads(line)
                    except ValueError:
                        continue  # a greeting, perhaps
                    if isinstance(event, dict) and "message" in event and "error" in event:
                        raise from_wire(event["error"], f"{self.name}: {event['message']}")
                    yield event
                told = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
                if await process.wait():
                    why = told[-1][:300] if told else f"exit {process.returncode}"
                    raise DaemonError(f"{self.name}: {shlex.join(self._command)}: {why}")
        except TimeoutError:
            raise DaemonError(f"{self.name}: no answer within {seconds:.0f} s") from None
        finally:
            if process.returncode is None:
                await end(process)


def check(settings: Settings, hosts: Sequence[str], *, loopback: bool) -> None:
    """Raise ConfigError for what cannot be done to a fleet that is there."""
    if settings.source is None:
        raise ConfigError("--hosts: give the SOURCE that they are to load")
    if not hosts:
        raise ConfigError("--hosts: name them, such as gpu-1,gpu-2")
    if len(set(hosts)) < len(hosts):
        raise ConfigError("--hosts: one of them is named twice")
    for name, given in (
        ("--warm", settings.warm), ("--kill", settings.kill), ("--slow", settings.slow),
        ("--join-after", settings.join_after), ("--corrupt", settings.corrupt), ("--load", settings.device),
        ("--loopback", loopback),
    ):  # fmt: skip
        if given:
            raise ConfigError(f"{name}: not with --hosts, which only loads on daemons that are there")


async def play(settings: Settings, names: Sequence[str], via: str, watcher: Watcher, *, evict: bool) -> Run:
    """Load on all of them at once."""
    assert settings.source is not None
    hosts = [Host(name, via) for name in names]
    try:
        watcher.say("asking the hosts")
        await every(host.check() for host in hosts)
        if evict:
            await every(host.evict(settings.source or "") for host in hosts)
        roles = [Role(name, link=settings.link) for name in names]
        runs = [NodeRun(role.name, "", True, role.link) for role in roles]
        curves = {name: Curve() for name in names}
        watcher.begin("the fleet", roles, 0)
        began = time.monotonic()

        async def load(host: Host, seen: NodeRun) -> None:
            def hear(event: Json) -> None:
                curves[host.name].hear(event, time.monotonic() - began)
                watcher.moved(host.name, curves[host.name])

            try:
                seen.report = await host.pull(settings.source or "", hear)
                seen.ended = time.monotonic() - began
            except WeightcacheError as error:
                seen.error = str(error)
            finally:
                seen.curve = curves[host.name].points()
                watcher.ended(seen)

        await every(load(host, seen) for host, seen in zip(hosts, runs, strict=True))
    finally:
        await asyncio.gather(*(host.close() for host in hosts), return_exceptions=True)
    return _finished(settings, runs)


def _finished(settings: Settings, nodes: list[NodeRun]) -> Run:
    size = max((node.report["bytes_total"] for node in nodes if node.report), default=0)
    for index, node in enumerate(nodes):
        if node.report is not None and node.report["bytes_by_source"]["local"] == size:
            nodes[index] = replace(node, what="warm", counts=False, warm=True)
    run = Run(nodes, size, peers=True)
    run.least = bound(size, settings.link, settings.origin_link, warm=any(node.warm for node in nodes))
    for node in nodes:
        node.least = run.least
    run.egress = sum(node.bytes_by_source()["origin"] for node in nodes)
    spread(nodes)
    return run
