"""The TCP sockets of nodes: how they listen, and how connections are set."""

from __future__ import annotations

import errno
import os
import socket
import struct

from weightcache.errors import DaemonError

_BACKLOG = 1024
_MIN_RTT = 148  # where TCP_INFO has it, in microseconds, or _NEVER
_NEVER = 0xFFFFFFFF
# A peer whose host vanished is noticed after about a minute, also on an idle connection.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


def listen(host: str, port: int) -> socket.socket:
    """A non-blocking listening socket (port 0: any free one). Raises DaemonError that says what to change."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.create_server(address, family=family, backlog=_BACKLOG)
    except socket.gaierror as error:
        raise DaemonError(f"cannot listen on {host}: {error.strerror}; name an address of this host") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise DaemonError(f"port {port} on {host} is in use: stop who has it, or choose another") from None
        raise DaemonError(f"cannot listen on {host}:{port}: {reason(error)}; name an address of this host") from None
    sock.setblocking(False)
    return sock


def reason(error: OSError) -> str:
    """Why the system refused, in its own words: event loops add theirs."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)


def tune(sock: socket.socket) -> None:
    """Options of every connection. The buffers are left to the kernel: fixing them would end its own sizing."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def round_trip(sock: socket.socket) -> float:
    """The shortest round trip that the kernel has seen lately on a connection, in seconds; 0 if it has seen none."""
    told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT + 4)
    (found,) = struct.unpack_from("=I", told, _MIN_RTT)
    return 0.0 if found == _NEVER else found / 1e6
