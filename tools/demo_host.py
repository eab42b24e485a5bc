"""One host of the demo: a daemon with a store of its own and an inference worker, both real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightcache.client import Client
from weightcache.config import load_config
from weightcache.errors import DaemonError, WeightcacheError, from_wire
from weightcache.tools.seaweed import die_with_parent

START_SECONDS = 60.0  # importing torch takes its time on a small machine
STOP_SECONDS = 5.0

Json = dict[str, Any]


class Host:
    """``open`` starts it, ``close`` ends both processes. ``address`` is where its peers find it."""

    def __init__(self, name: str, directory: Path, environ: Mapping[str, str]) -> None:
        self.name = name
        self.address = ""
        self._directory = directory
        directory.mkdir()
        settings = directory / "config.toml"
        settings.write_text(f'store = "{directory}/store"\nsocket = "{directory}/daemon.sock"\n')
        # What the user has set for daemons of their own is not for these.
        own = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHTCACHE_")}
        self._environ = {**own, **environ, "WEIGHTCACHE_CONFIG": str(settings)}
        self.client = Client(load_config(file=settings, environ={}), embed=False)
        self._daemon: asyncio.subprocess.Process | None = None
        self._worker: asyncio.subprocess.Process | None = None

    async def open(self, peers: Sequence[Host]) -> None:
        """Start the daemon, then the worker. Raises DaemonError when one does not start."""
        options = [option for peer in peers for option in ("--peer", peer.address)]
        self._daemon = await self._start("daemon", "-m", "weightcache.tools", "daemon", "--json", *options)
        self.address = (await self._line(self._daemon, "daemon"))["listen"]
        self._worker = await self._start("worker", "-m", "weightcache.tools.demo_worker")

    async def ready(self) -> None:
        """Wait until the worker has imported what it needs."""
        assert self._worker is not None
        await self._line(self._worker, "worker")

    async def load(self, source: str, original: Path) -> Json:
        """Have the worker load a source: seconds, number of tensors, names of those that are not the original's."""
        assert self._worker is not None
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps({"source": source, "original": str(original)}).encode() + b"\n")
        return await self._line(self._worker, "worker")

    async def moved(self) -> tuple[int, dict[str, int]]:
        """Bytes that have come from origins, and by peer, since the daemon started."""
        moved = (await self.client.status())["moved"]
        return moved["origin"], moved["peer"]

    async def close(self) -> None:
        await self.client.close()
        for process in (self._worker, self._daemon):
            if process is not None and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        for process in (self._worker, self._daemon):
            if process is not None:
                await _ended(process)

    async def _start(self, what: str, *arguments: str) -> asyncio.subprocess.Process:
        with (self._directory / f"{what}.log").open("wb") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-P", *arguments, env=self._environ, stderr=log, preexec_fn=die_with_parent,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
            )  # fmt: skip

    async def _line(self, process: asyncio.subprocess.Process, what: str) -> Json:
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_SECONDS)
        except TimeoutError:
            raise WeightcacheError(f"{self.name}: its {what} said nothing for {START_SECONDS:.0f} s") from None
        if not line:
            log = (self._directory / f"{what}.log").read_text(errors="replace").splitlines()
            raise DaemonError(f"{self.name}: its {what} ended: {log[-1] if log else 'without a word'}")
        answer: Json = json.loads(line)
        if "error" in answer:
            raise from_wire(answer["error"], f"{self.name}: {answer['message']}")
        return answer


async def _ended(process: asyncio.subprocess.Process) -> None:
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
