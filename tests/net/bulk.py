"""Bulk processes as a node sees them, and peers written by hand to talk to them, well or badly."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from weightcache.core.bitmap import ChunkSet
from weightcache.core.ids import chunk_id
from weightcache.core.layout import CHUNK, plan
from weightcache.core.manifest import Manifest
from weightcache.core.wire import Frame, Link, Port, Role
from weightcache.net.channel import Channel, Message, pair
from weightcache.net.handshake import Handshake
from weightcache.net.table import write_table

KEY = b"the key of this cluster"
SENDER, RECEIVER = b"sender--" * 2, b"receiver" * 2
BLOB = b"b" * 32
SECONDS = 30.0  # for anything that should come at once, on a busy machine

_RUN = """
import socket, sys
from weightcache.net.channel import Channel
from weightcache.net.{module} import {run}
{run}(Channel(socket.socket(fileno=int(sys.argv[1]))))
"""


class Bulk:
    """A bulk process and the node's end of its channel."""

    def __init__(self, module: str, run: str, **config: Any) -> None:
        ours, theirs = pair()
        program = _RUN.format(module=module, run=run)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(theirs.fileno())], pass_fds=(theirs.fileno(),)
        )
        theirs.close()
        self.channel = Channel(ours)
        self._sending = threading.Lock()
        self.send("config", config)

    def send(self, *fields: Any, fds: Sequence[int] = ()) -> None:
        with self._sending:
            self.channel.send(*fields, fds=fds)

    def message(self, kind: str) -> Message:
        """The next message of a kind; others are passed over."""
        until = time.monotonic() + SECONDS
        while True:
            message = self.channel.receive()
            if message is None:
                assert not self.channel.ended, "the process has ended"
                ready = select.select([self.channel], [], [], until - time.monotonic())[0]
                assert ready, f"no {kind!r} came"
            elif message.fields[0] == kind:
                return message

    def close(self) -> None:
        self.channel.close()
        assert self.process.wait(SECONDS) == 0

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.process.kill()
            self.process.wait()
            self.channel.close()

    def open_files(self) -> list[str]:
        folder = f"/proc/{self.process.pid}/fd"
        return [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]


class Sender(Bulk):
    """It is handed whoever connects to ``port``."""

    def __init__(self, **config: Any) -> None:
        super().__init__("server", "run_sender", **{"key": KEY} | {"node_id": SENDER} | config)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # closed
                return
            self.send("connection", fds=[sock.detach()])

    def close(self) -> None:
        self._stop()
        super().close()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._stop()
        super().__exit__(kind, error, trace)

    def _stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()

    def blob(self, path: str, manifest: Manifest, had: ChunkSet) -> None:
        fds = (os.open(path, os.O_RDONLY), write_table(manifest, had))
        self.send("blob", manifest.blob, fds=fds)


class Receiver(Bulk):
    def __init__(self, **config: Any) -> None:
        super().__init__("client", "run_receiver", **{"key": KEY} | {"node_id": RECEIVER} | config)
        self.got: dict[int, list[Any]] = {}
        self.failed: dict[int, list[Any]] = {}

    def answers(self, count: int) -> None:
        """Wait until so many requests have been answered in all, one way or the other."""
        until = time.monotonic() + SECONDS
        while len(self.got) + len(self.failed) < count:
            message = self.channel.receive()
            if message is None:
                assert not self.channel.ended, "the process has ended"
                assert select.select([self.channel], [], [], until - time.monotonic())[0], "no answer came"
                continue
            kind, *answers = message.fields
            for number, *rest in answers[0] if answers else ():  # "ready" has none
                assert number not in self.got
                assert number not in self.failed
                (self.got if kind == "got" else self.failed)[number] = rest


def manifest_of(data: bytes, *, blob: bytes = BLOB) -> Manifest:
    manifest = Manifest(blob, plan(len(data), None))
    for index, (offset, length) in enumerate(manifest.plan):
        manifest.learn(index, chunk_id(data[offset : offset + length]))
    return manifest


def sample(chunks: float) -> bytes:
    """So many chunks of bytes, no two chunks alike."""
    return os.urandom(int(chunks * CHUNK))


class Talker:
    """One end of a bulk connection over a real socket, for a test to speak through."""

    def __init__(self, sock: socket.socket, role: Role, *, key: bytes = KEY, node: bytes = RECEIVER) -> None:
        sock.settimeout(SECONDS)
        self.sock = sock
        self.link = Link(role, Port.BULK)
        self.handshake = Handshake(self.link, key, node, b"")

    @classmethod
    def dial(cls, port: int, *, small: bool = False, **how: bytes) -> Talker:
        """Connect to a sender and shake hands. ``small``: with the least receive buffer there is."""
        sock = socket.socket()
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        return cls(sock, Role.CLIENT, **how).shake()

    @classmethod
    def accept(cls, server: socket.socket, **how: bytes) -> Talker:
        """Let a receiver connect, and shake hands."""
        server.settimeout(SECONDS)
        return cls(server.accept()[0], Role.SERVER, **{"node": SENDER} | how).shake()

    def shake(self) -> Talker:
        self.sock.sendall(self.handshake.start())
        while not self.handshake.done:
            self._fill()
            self.sock.sendall(self.handshake.advance())
        return self

    def _fill(self) -> None:
        count = self.sock.recv_into(self.link.space())
        if not count:
            raise ConnectionResetError("closed by the peer")
        self.link.filled(count)

    def send(self, kind: Any, *fields: Any) -> None:
        self.sock.sendall(self.link.send(kind, *fields))

    def frame(self) -> Frame:
        while (frame := self.link.receive()) is None:
            self._fill()
        return frame

    def raw(self) -> bytes:
        """The bytes that follow a DATA frame."""
        found = bytearray()
        while self.link.bytes_left:
            part: bytes | memoryview = self.link.take(CHUNK) or self.sock.recv(min(1 << 20, self.link.bytes_left))
            if not part:
                raise ConnectionResetError("closed by the peer")
            found += part
            self.link.moved(len(part))
        return bytes(found)

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Talker:
        return self

    def __exit__(self, *how: object) -> None:
        self.close()


def read_to_end(sock: socket.socket) -> bytes:
    """All that a peer sends until it closes; a reset counts as closing."""
    sock.settimeout(SECONDS)
    found = b""
    try:
        while part := sock.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def eventually(condition: Any, what: str) -> None:
    """Poll until a condition holds."""
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, what
        select.select([], [], [], 0.01)
