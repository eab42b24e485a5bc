"""Processes that speak in lines of JSON: a daemon with ``--json``, a worker, an origin. Both ends of the pipe.

A child says that it is ready, then answers each line with one. What failed is ``{"error", "message"}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from weightcache.client import SyncClient
from weightcache.errors import DaemonError, from_wire, to_wire
from weightcache.tools.local import die_with_parent

START_SECONDS = 120.0  # many may start at once, on few cores, and import torch
STOP_SECONDS = 5.0
PYTHON = (sys.executable, "-P", "-m")

Json = dict[str, Any]


class Child:
    """A running process; ``name`` is for people."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self._log = log

    @classmethod
    async def start(cls, name: str, command: Sequence[str], environ: Mapping[str, str], log: Path) -> Self:
        """Start one that ends with this process. Its stderr goes to ``log``."""
        # What the user has set for daemons of their own is not for these.
        own = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHTCACHE_")}
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *command, env=own | dict(environ), stderr=file, preexec_fn=die_with_parent,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        return cls(name, process, log)

    async def said(self, seconds: float | None = START_SECONDS) -> Json:
        """What it says next. Raises what that tells of; DaemonError when it ends instead, or is silent so long."""
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), seconds)
        except TimeoutError:
            raise DaemonError(f"{self.name} said nothing for {seconds:.0f} s") from None
        if not line:
            told = self._log.read_text(errors="replace").splitlines()
            raise DaemonError(f"{self.name} ended: {told[-1][:300] if told else 'without a word'}")
        answer: Json = json.loads(line)
        if "error" in answer:
            raise from_wire(answer["error"], f"{self.name}: {answer['message']}")
        return answer

    async def ask(self, what: Json, seconds: float | None = START_SECONDS) -> Json:
        """What it answers to a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        return await self.said(seconds)

    async def end(self) -> None:
        await end(self.process)


async def end(process: asyncio.subprocess.Process) -> None:
    """Tell a process to end, and wait for it; kill one that does not."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)  # terminate() may reap one that has ended, which asyncio then misses
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


def answer(work: Callable[[Json], Json]) -> None:
    """The other end, in a worker: do ``work`` for each line of the input, until there is none."""
    with SyncClient() as client:
        client.status()  # what is only imported once is not part of a load
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        try:
            answer = work(json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent tells of it
            name, message = to_wire(error)
            answer = {"error": name, "message": message}
        print(json.dumps(answer), flush=True)
