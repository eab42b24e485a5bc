"""``asyncio.run`` for a command: a signal always wakes its loop."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """What ``work`` returns. Ctrl-C cancels it and is raised when it has ended."""
    return asyncio.run(_woken(work))


async def _woken(work: Coroutine[Any, Any, Result]) -> Result:
    # Python runs a signal's handler between two of its steps: one that comes just before the loop goes to sleep would
    # be seen when something else wakes it. A byte from the signal itself does.
    loop = asyncio.get_running_loop()
    sleeping, waking = socket.socketpair()
    with sleeping, waking:
        sleeping.setblocking(False)
        waking.setblocking(False)
        loop.add_reader(sleeping, sleeping.recv, 4096)
        before = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        try:
            return await work
        finally:
            signal.set_wakeup_fd(before)
            loop.remove_reader(sleeping)
