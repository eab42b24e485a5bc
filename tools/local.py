"""What servers on this machine need: free ports, and an end with the process that starts them."""

from __future__ import annotations

import contextlib
import ctypes
import random
import signal
import socket

_LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may wait for another thread's lock
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """For ``preexec_fn``: who starts a process and is killed leaves it not behind."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Distinct ports of 127.0.0.1 on which nobody listens."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", 0))
            found.append(probe.getsockname()[1])
    return found


def free_pair() -> int:
    """A port whose successor is free, too: not of those that the kernel hands out to anybody who connects."""
    while True:
        port = random.randrange(10_000, 32_000, 2)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 1))
            return port
