"""The channel between the node and a bulk process: whole messages with file descriptors, over a SOCK_SEQPACKET socket.

A message is a msgpack array ``[kind, ...]`` of at most MAX_MESSAGE bytes. This is the face for a process with a
``selectors`` loop; the node's face is net/node_channel.py.

Descriptors have one owner at any time. ``send`` takes them over and closes this process's copy once they are on their
way (or never will be); ``receive`` hands them to the caller, who closes them. They are close-on-exec from the start.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack

from weightcache.errors import ProtocolError

MAX_MESSAGE = 128 << 10  # bytes
MAX_FDS = 4  # with one message
_BUFFER = 2 << 20  # bytes the socket holds each way: some messages of the largest size
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * array("i").itemsize)
_TRUNCATED = socket.MSG_TRUNC | socket.MSG_CTRUNC


class Message(NamedTuple):
    """One message: its array, and the descriptors that came with it (the caller's to close)."""

    fields: list[Any]
    fds: tuple[int, ...]


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets for the two ends of a channel. Neither is inherited unless it is passed on explicitly."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Channel:
    """One end. Nothing here blocks: what does not fit is queued until ``flush``; ``backlog`` says whether there is any.

    The queue needs no bound of its own: a bulk process answers what it was asked, and the node waits for its turn
    (NodeChannel). ``ended`` once the other end is gone: nothing comes any more, and what is sent is dropped.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self.ended = False
        self._socket = sock
        self._buffer = bytearray(MAX_MESSAGE)
        self._queue: deque[tuple[bytes, Sequence[int]]] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def backlog(self) -> int:
        """Messages that wait for the socket to take them."""
        return len(self._queue)

    def send(self, *fields: Any, fds: Sequence[int] = ()) -> None:
        """Send ``[*fields]`` and ``fds``, which now belong to the channel. Raises ProtocolError if it is too large."""
        data = msgpack.packb(fields)
        if len(data) > MAX_MESSAGE:
            close_all(fds)
            raise ProtocolError(f"channel message {fields[0]!r} of {len(data)} bytes: at most {MAX_MESSAGE} fit")
        self._queue.append((data, fds))
        if self.ended or len(self._queue) == 1:
            self.flush()

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it."""
        while self._queue:
            data, fds = self._queue[0]
            try:
                if not self.ended and fds:
                    socket.send_fds(self._socket, [data], fds)
                elif not self.ended:
                    self._socket.send(data)
            except BlockingIOError:
                return
            except OSError:
                self.ended = True
            self._queue.popleft()
            close_all(fds)

    def receive(self) -> Message | None:
        """The next message, or None when there is none now (or none any more: see ``ended``)."""
        try:
            size, ancillary, flags, _ = self._socket.recvmsg_into([self._buffer], _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError:
            self.ended = True
            return None
        fds = array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if not size:
            self.ended = True
            return None
        try:
            if flags & _TRUNCATED:
                raise ProtocolError(f"a channel message exceeds {MAX_MESSAGE} bytes or {MAX_FDS} descriptors")
            return Message(msgpack.unpackb(memoryview(self._buffer)[:size], strict_map_key=False), tuple(fds))
        except BaseException:
            close_all(fds)
            raise

    def close(self) -> None:
        """Close this end, and the descriptors that were never sent."""
        self.ended = True
        self.flush()
        self._socket.close()


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that a message brought."""
    for fd in fds:
        os.close(fd)
