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


# Not of those that the kernel hands out to whoever connects: one of them may be taken before a server listens on it.
_LISTENABLE = (10_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Distinct ports of 127.0.0.1 on which nobody listens."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(*_LISTENABLE)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def free_pair() -> int:
    """A port whose successor is free, too."""
    while True:
        port = random.randrange(*_LISTENABLE, 2)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 1))
            return port
