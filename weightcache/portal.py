"""An event loop in a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from weightcache.waiting import take

Result = TypeVar("Result")


class Portal:
    """Runs coroutines from any thread. Made in one process, it is of no use in its children: see ``alive``."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="weightcache", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread is in this process: a fork copies no threads."""
        return self._pid == os.getpid() and self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine and wait for it. Ctrl-C cancels it."""
        done: queue.SimpleQueue[asyncio.Task[Result]] = queue.SimpleQueue()
        begun: list[asyncio.Task[Result]] = []

        def begin() -> None:
            begun.append(self._loop.create_task(work))
            begun[0].add_done_callback(done.put)

        def cancel() -> None:
            if begun:
                begun[0].cancel()
            else:
                work.close()

        try:
            self._loop.call_soon_threadsafe(begin)
            return take(done).result()
        except BaseException:
            self.soon(cancel)
            raise

    def soon(self, callback: Callable[[], object]) -> None:
        """Call something on the loop. Never blocks; without effect once the loop has ended."""
        if self.alive:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        if self.alive:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
