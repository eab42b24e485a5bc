"""Peers that are there: ``python -m bench.crowd COUNT ROLE SOURCE FILE ADDRESS``, in one process and its forks.

Each has an identity, control connections and, if ROLE is ``hold``, a sending process of its own, all of them
weightcache's; what it lacks is a store: it says to have all of one blob, FILE, about which the daemon at ADDRESS was
asked. With ROLE ``watch`` it has nothing of it but wants it, so everyone who loads it tells it about every chunk.
Prints their addresses as one line of JSON, and lives until its input ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from weightcache.config import parse_address
from weightcache.core.bitmap import ChunkSet
from weightcache.core.manifest import decode_manifest
from weightcache.core.snapshot import decode_snapshot
from weightcache.net.channel import Channel, pair
from weightcache.net.control import ControlConnection, ControlServer, connect
from weightcache.net.server import run_sender
from weightcache.net.sockets import listen
from weightcache.net.table import write_table
from weightcache.node.swarm import Info

HOST = "127.0.0.1"
Sender = tuple[Channel, socket.socket]


def identity(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Knowledge:
    """One blob, as the daemon that has it tells of it, and what everyone here says of it."""

    def __init__(self, snapshot: bytes, manifest: bytes, *, holds: bool) -> None:
        self.blob = decode_snapshot(snapshot).files[0].blob
        self.manifest = manifest
        self._snapshot = snapshot
        self._holds = holds
        self._asking: set[asyncio.Future[Any]] = set()

    @classmethod
    async def ask(cls, source: str, address: str, *, holds: bool) -> Knowledge:
        async def silent(connection: ControlConnection, kind: str, body: Any) -> None: ...

        connection = await connect(
            *parse_address(address), None, identity(0), Info("default", "", "", "bench").encode, silent
        )
        snapshot = await connection.call("find", source)
        manifest = await connection.call("manifest", decode_snapshot(snapshot).files[0].blob)
        await connection.close()
        return cls(snapshot, manifest, holds=holds)

    async def answer(self, connection: ControlConnection, kind: str, body: Any) -> Any:
        if kind == "want":
            return [True if self._holds and blob == self.blob else None for blob in body]
        return {"find": self._snapshot, "manifest": self.manifest}.get(kind) if self._holds else None

    def connected(self, connection: ControlConnection) -> None:
        if not self._holds:
            asking = asyncio.ensure_future(connection.call("want", [self.blob]))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)


def fork_sender(number: int) -> Sender:
    """A sending process; the channel to it, and where its peers connect."""
    ours, theirs = pair()
    if not os.fork():
        ours.close()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        run_sender(Channel(theirs))
        os._exit(0)
    theirs.close()
    channel = Channel(ours)
    channel.send("config", {"key": b"", "node_id": identity(number)})
    return channel, listen(HOST, 0)


def hand_over(channel: Channel, listener: socket.socket) -> None:
    channel.send("connection", fds=[listener.accept()[0].detach()])


async def live(source: str, path: str, address: str, senders: Sequence[Sender | None]) -> None:
    known = await Knowledge.ask(source, address, holds=senders[0] is not None)
    manifest = decode_manifest(known.manifest)
    servers, addresses = [], []
    for number, sender in enumerate(senders, start=1):
        bulk = ""
        if sender is not None:
            channel, listener = sender
            asyncio.get_running_loop().add_reader(listener, hand_over, channel, listener)
            bulk = f"{HOST}:{listener.getsockname()[1]}"
            fds = [os.open(path, os.O_RDONLY), write_table(manifest, ChunkSet(len(manifest), full=True))]
            channel.send("blob", manifest.blob, fds=fds)
        introduction = Info("default", "", bulk, "bench").encode
        server = ControlServer(HOST, 0, None, identity(number), introduction, known.answer, known.connected)
        addresses.append(f"{HOST}:{await server.start()}")
        servers.append(server)
    print(json.dumps(addresses), flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main(count: str, role: str, source: str, path: str, address: str) -> None:
    senders = [fork_sender(number) if role == "hold" else None for number in range(1, int(count) + 1)]
    asyncio.run(live(source, path, address, senders))


if __name__ == "__main__":
    main(*sys.argv[1:])
