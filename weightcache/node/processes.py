"""The bulk processes of a node: started when first needed, watched, started again when they die.

Each is ``python -m weightcache.node.bulk ROLE FD`` at the other end of a channel. Bytes of blobs never cross it: blobs
cross as descriptors, tables as memory files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from weightcache.log import fields
from weightcache.net.channel import close_all, pair
from weightcache.net.node_channel import ChannelClosed, NodeChannel

log = logging.getLogger(__name__)

STOP_SECONDS = 1.0
STEADY_SECONDS = 10.0  # a process that lived as long is started again at once
# obstore's threads would have up to 16 heaps (glibc), each of which keeps what it once needed: 40 MB more.
_ALLOCATOR = {"MALLOC_ARENA_MAX": "2"}
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # before one that keeps dying is


class BulkProcess:
    """One bulk process. ``on_message(fields, fds)`` owns the descriptors; ``on_death(reason)``: it ended by itself.

    It may be started again after that. Messages to a process that does not run are dropped: whatever they asked for has
    failed with it, and ``on_death`` said so.
    """

    def __init__(
        self,
        role: str,
        config: dict[str, Any],
        on_message: Callable[[list[Any], tuple[int, ...]], None],
        on_death: Callable[[str], None],
    ) -> None:
        self.role = role
        self._config = config
        self._on_message = on_message
        self._on_death = on_death
        self._process: asyncio.subprocess.Process | None = None
        self._channel: NodeChannel | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopped = False
        self._deaths = 0  # in a row, of processes that did not live long

    @property
    def running(self) -> bool:
        return self._channel is not None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self.running else None

    def start(self) -> None:
        """Start it, unless it runs; messages may follow at once. Its first message is the configuration."""
        if self._channel is not None or self._stopped:
            return
        ours, theirs = pair()
        self._channel = NodeChannel(ours)
        self._channel.post("config", self._config)
        self._watch = asyncio.ensure_future(self._keep(self._channel, theirs))

    def send(self, *message: Any, fds: Sequence[int] = ()) -> None:
        """Queue a message. ``fds`` belong to the channel from here on."""
        if self._channel is None:
            close_all(fds)
            return
        with contextlib.suppress(ChannelClosed):
            self._channel.post(*message, fds=fds)

    async def _keep(self, channel: NodeChannel, theirs: socket.socket) -> None:
        """One process' life, from start to burial. Until it is buried, no other is started in its place."""
        loop = asyncio.get_running_loop()
        began, why, process = loop.time(), "", None
        try:
            with theirs:
                if self._deaths:
                    await asyncio.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._deaths, 10)))
                began = loop.time()
                process = self._process = await self._spawn(theirs.fileno())
            while (message := await channel.receive()) is not None:
                self._on_message(message.fields, message.fds)
        except Exception as error:
            log.exception("bulk process given up", extra=fields(role=self.role))
            why = f"{type(error).__name__}: {error}"  # who waits for the process must hear of it, whatever it is
        channel.close()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            code = await process.wait()
            why = why or f"exit {code}"
        log.error("bulk process died", extra=fields(role=self.role, why=why))
        self._channel = self._process = None
        self._deaths = 0 if loop.time() - began >= STEADY_SECONDS else self._deaths + 1
        self._on_death(f"this host's own {self.role} process died ({why})")

    async def _spawn(self, fd: int) -> asyncio.subprocess.Process:
        # -P: the working directory is no place to import from.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "weightcache.node.bulk", self.role, str(fd),
            pass_fds=(fd,), stdin=asyncio.subprocess.DEVNULL, start_new_session=True, env={**_ALLOCATOR, **os.environ},
        )  # fmt: skip
        log.info("bulk process started", extra=fields(role=self.role, pid=process.pid))
        return process

    async def stop(self) -> None:
        """Close the channel, which ends the process; kill it if it lingers."""
        self._stopped = True
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


def usual_processes() -> int:
    """How many processes a side suit this machine: when all are busy, half of its cores are left to workers."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 4))


def pids(processes: Iterable[BulkProcess]) -> list[int]:
    """Of those that run."""
    return [process.pid for process in processes if process.pid is not None]
