"""Ways to move a chunk from process to process, and what weightcache's own bulk processes cost over them.

Bare loops differ in how they send (from the mapping, or by sendfile), when they hash (each chunk when it is whole, or
each piece of up to 1 MiB as it comes) and when they wake up (for any byte, or for 512 KiB). ``processes`` are the
sender and the receiver without daemons: handshake, epoll, channel, xxh3-128 and all.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import rounds
from bench.bare import Way
from bench.hosts import MB, write_random
from bench.limit import WAYS, fastest, limit
from bench.rounds import Contender
from bench.run import Run
from bench.standing import ROOT
from bench.table import Table, at_least
from tests.servers.loop import spawn
from weightcache.core.bitmap import ChunkSet
from weightcache.core.ids import chunk_id
from weightcache.core.layout import plan
from weightcache.core.manifest import Manifest
from weightcache.net.channel import Channel, Message, pair
from weightcache.net.table import write_table

MORE_WAYS = {
    "sendfile, xxh3": Way(sendfile=True, xxh3=True),
    "sendfile, pieces, xxh3": Way(sendfile=True, pieces=True, xxh3=True),
    "sendfile, not hashed": Way(sendfile=True, blake3=False),
}
ABOUT = "The limit is the fastest of these ways, once more."
_BULK = """
import socket, sys
from weightcache.net.channel import Channel
from weightcache.net.{module} import {run}
{run}(Channel(socket.socket(fileno=int(sys.argv[1]))))
"""


@contextmanager
def bulk(module: str, run: str) -> Iterator[tuple[Channel, int]]:
    """A bulk process: the node's end of its channel, and its id."""
    ours, theirs = pair()
    command = [sys.executable, "-c", _BULK.format(module=module, run=run), str(theirs.fileno())]
    process = spawn(command, pass_fds=(theirs.fileno(),), cwd=ROOT)
    theirs.close()
    channel = Channel(ours)
    try:
        yield channel, process.pid
    finally:
        channel.close()
        process.wait(10)


def receive(channel: Channel) -> Message:
    while (message := channel.receive()) is None:
        if channel.ended:
            raise SystemExit("a bulk process died")
        select.select([channel], [], [])
    return message


class Processes:
    """A sender that has the source as a blob, and a receiver that knows the sender."""

    def __init__(self, sender: Channel, receiver: Channel, source: int, size: int) -> None:
        self._sender, self._receiver = sender, receiver
        cut = plan(size, None)
        self._manifest = Manifest(bytes(32), cut)
        for index, (offset, length) in enumerate(cut):
            self._manifest.learn(index, chunk_id(os.pread(source, length, offset)))
        sender.send("config", {"key": b"", "node_id": bytes(16)})
        table = write_table(self._manifest, ChunkSet(len(cut), full=True))
        sender.send("blob", bytes(32), fds=(os.dup(source), table))
        receiver.send("config", {"key": b"", "node_id": b"r" * 16})
        receive(receiver)  # "ready"
        self._listener = socket.create_server(("127.0.0.1", 0))
        receiver.send("peer", bytes(16), *self._listener.getsockname())
        self._number = self._handle = 0

    def move(self, target: Path) -> float:
        """Seconds from the node's request to the processes' last answer."""
        self._handle += 1
        self._receiver.send("blob", self._handle, fds=(os.open(target, os.O_WRONLY),))
        wanted = []
        for index, (offset, length) in enumerate(self._manifest.plan):
            self._number += 1
            chunk = self._manifest.id(index)
            wanted.append([self._number, self._handle, self._manifest.blob, index, offset, length, chunk])
        began = time.perf_counter()
        self._receiver.send("get", bytes(16), wanted)
        if self._handle == 1:  # now it connects
            with self._listener:
                self._sender.send("connection", fds=[self._listener.accept()[0].detach()])
        left = len(wanted)
        while left:
            kind, answers = receive(self._receiver).fields
            if kind != "got":
                raise SystemExit(f"failed: {answers}")
            left -= len(answers)
        seconds = time.perf_counter() - began
        self._receiver.send("close", self._handle)
        return seconds


@contextmanager
def processes(source: Path, folder: Path) -> Iterator[Contender]:
    """The product's own two processes as a contender."""
    size, target = source.stat().st_size, folder / "processes"

    def reserve() -> None:
        with open(target, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    with (
        bulk("server", "run_sender") as (sender, sender_pid),
        bulk("client", "run_receiver") as (receiver, receiver_pid),
        open(source, "rb") as file,
    ):
        pair_of_them = Processes(sender, receiver, file.fileno(), size)
        yield Contender(
            "processes",
            size,
            lambda: pair_of_them.move(target),
            lambda: target.unlink(missing_ok=True),
            reserve,
            lambda: [sender_pid],
            lambda: [receiver_pid],
        )


def landing(run: Run) -> Table:
    """Every way, and the product's own."""
    size = run.size(400 * MB, 64 * MB)
    path = write_random(run.folder / "blob", size)
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(limit(path, run.folder, fastest(run)))]
        ways = (WAYS | MORE_WAYS).items()
        contenders += [stack.enter_context(limit(path, run.folder, way, name)) for name, way in ways]
        contenders.append(stack.enter_context(processes(path, run.folder)))
        title = f"ways from process to process, {size / MB:.0f} MB, loopback"
        table = rounds.compare("landing", title, ABOUT, contenders, run)
    table.expect(at_least(0.9, "of the limit"), "processes", "ratio")
    return table
