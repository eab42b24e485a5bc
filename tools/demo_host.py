"""One host of the demo: a daemon with a store of its own and an inference worker, both real processes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightcache.client import Client
from weightcache.config import load_config
from weightcache.tools.child import PYTHON, Child, Json


class Host:
    """``open`` starts it, ``close`` ends both processes. ``address`` is where its peers find it."""

    def __init__(self, name: str, directory: Path, environ: Mapping[str, str]) -> None:
        self.name = name
        self.address = ""
        self._directory = directory
        directory.mkdir()
        settings = directory / "config.toml"
        settings.write_text(f'store = "{directory}/store"\nsocket = "{directory}/daemon.sock"\n')
        self._environ = {**environ, "WEIGHTCACHE_CONFIG": str(settings)}
        self.client = Client(load_config(file=settings, environ={}), embed=False)
        self._children: list[Child] = []

    async def open(self, peers: Sequence[Host]) -> None:
        """Start the daemon, then the worker. Raises DaemonError when one does not start."""
        options = [option for peer in peers for option in ("--peer", peer.address)]
        daemon = await self._start("daemon", "weightcache.tools", "daemon", "--json", *options)
        self.address = (await daemon.said())["listen"]
        self._worker = await self._start("worker", "weightcache.tools.demo_worker")

    async def ready(self) -> None:
        """Wait until the worker has imported what it needs."""
        await self._worker.said()

    async def load(self, source: str, original: Path) -> Json:
        """Have the worker load a source: seconds, number of tensors, names of those that are not the original's."""
        return await self._worker.ask({"source": source, "original": str(original)})

    async def moved(self) -> tuple[int, dict[str, int]]:
        """Bytes that have come from origins, and by peer, since the daemon started."""
        moved = (await self.client.status())["moved"]
        return moved["origin"], moved["peer"]

    async def close(self) -> None:
        await self.client.close()
        await asyncio.gather(*(child.end() for child in self._children))

    async def _start(self, what: str, *words: str) -> Child:
        name, log = f"{self.name}: its {what}", self._directory / f"{what}.log"
        self._children.append(await Child.start(name, [*PYTHON, *words], self._environ, log))
        return self._children[-1]
