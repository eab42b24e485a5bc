"""Entry of the bulk processes: ``python -m weightcache.node.bulk ROLE FD``.

``send`` serves chunks to peers, ``recv`` fetches them from peers, ``origin`` resolves sources, reads origins, and
copies from this host's own disk. Each ends when its channel does, and with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import resource
import signal
import socket
import sys

from weightcache import log
from weightcache.net.channel import Channel

_PR_SET_PDEATHSIG = 1


def main(role: str, fd: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the daemon's to handle
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # a descriptor a connection, and one a blob
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sock = socket.socket(fileno=fd)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        if role == "send":
            from weightcache.net.server import run_sender

            run_sender(Channel(sock))
        elif role == "recv":
            from weightcache.net.client import run_receiver

            run_receiver(Channel(sock))
        elif role == "origin":
            from weightcache.node.reader import run_reader

            run_reader(sock)
        else:
            sys.exit(f"weightcache.node.bulk: no such role: {role}")


if __name__ == "__main__":
    log.configure("warning")
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except Exception:
        logging.getLogger(__name__).exception("bulk process failed")  # a line of the daemon's log, like every other
        sys.exit(1)
