"""What the servers share: waiting for a condition with a deadline, an event loop in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from weightcache.tools.local import die_with_parent

PATIENCE = 3

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 20.0, what: str = "condition") -> T:
    """The first true value of ``condition()``; AssertionError when there is none in time.

    ``seconds`` are a quiet machine's; a busy one has more of them, within pytest's own limit.
    """
    deadline = time.monotonic() + max(seconds, min(PATIENCE * seconds, 90.0))
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


SPAWNER = ThreadPoolExecutor(1, "spawner")  # a child's "parent" is the thread that made it: this one lasts


def spawn(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that is killed when this one ends, however it ends: no test run leaves a server behind."""

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, preexec_fn=die_with_parent, **options)

    return SPAWNER.submit(start).result()


class LoopThread:
    """An event loop in a thread of its own, so that a server answers while the test's loop is busy or blocked."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        self.loop.call_soon_threadsafe(function, *arguments)

    def close(self) -> None:
        async def cancel() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        if self.loop.is_closed():
            return
        self.run(cancel())
        self.call(self.loop.stop)
        self._thread.join(10)
        self.loop.close()
