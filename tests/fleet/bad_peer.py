"""A peer that knows the cluster key, and lies: the real protocol, spoken by somebody who means no good.

It dials its victim, so one daemon can meet any number of them. What it has it copied from an honest host, by asking it
as any peer would; then it breaks one promise, named by ``lie``:

    of chunks     wrong bytes, own id, wrong length, garbage, silence, reset, busy, missing, unknown, stranger
    of control    mute (answers no call), odd (answers what nobody asked)
    of manifests  no manifest, other manifest, wrong ids (and bytes to match)
    of shares     shares (says to have whatever is asked for, as part of something else)
    of snapshots  no snapshot, climbing, absolute, foreign (a source that is not asked for), local (file://)
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack

from tests.fleet.daemons import Daemon
from tests.servers.loop import LoopThread
from weightcache.core.bitmap import ChunkSet
from weightcache.core.ids import chunk_id
from weightcache.core.manifest import Manifest, decode_manifest, encode_manifest
from weightcache.core.snapshot import FileEntry, Snapshot, decode_snapshot, encode_snapshot, tree_revision
from weightcache.core.source import parse_source
from weightcache.core.wire import BUSY, MISSING, UNKNOWN, Kind, Link, Port, Role
from weightcache.net.control import ControlConnection, connect
from weightcache.net.handshake import Handshake
from weightcache.node.swarm import Info
from weightcache.tools.local import free_ports

CALLS = ("find", "want", "manifest", "shares")


@dataclass
class _Blob:
    manifest: Manifest
    data: bytes
    holes: frozenset[int] = frozenset()  # chunks that it does not say to have


class BadPeer:
    """``asked`` counts what its victims wanted of it: find, want, manifest, get."""

    def __init__(self, lie: str = "", key: bytes | None = None) -> None:
        self.lie = lie
        self.key = key
        self.node_id = os.urandom(16)
        self.asked: Counter[str] = Counter()
        self._blobs: dict[bytes, _Blob] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._thread = LoopThread("bad-peer")
        self._connections: dict[int, ControlConnection] = {}  # by the port of the host at the other end
        (port,) = free_ports(1)  # nobody listens there: peers that know it need not dial it
        self._port = port
        self._server = self._thread.run(asyncio.start_server(self._bulk, "127.0.0.1", 0))
        self._bulk_port = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.run(self._leave())
        self._thread.close()

    async def _leave(self) -> None:
        self._server.close()
        await asyncio.gather(*(connection.close() for connection in self._connections.values()))

    # -- what it does on its own

    def copy(self, honest: Daemon, source: str, data: bytes, holes: frozenset[int] = frozenset()) -> None:
        """Learn of a single file all that an honest host tells; ``data`` are its bytes."""
        self._thread.run(self._copy(honest, source, data, holes))

    async def _copy(self, honest: Daemon, source: str, data: bytes, holes: frozenset[int]) -> None:
        connection = await self._dial(honest)
        snapshot = decode_snapshot(await connection.call("find", str(parse_source(source))))
        (entry,) = snapshot.files
        manifest = decode_manifest(await connection.call("manifest", entry.blob))
        assert manifest.complete
        self._blobs[entry.blob] = _Blob(manifest, data, holes)
        self._snapshots[str(snapshot.source)] = snapshot
        if self.lie == "wrong ids":
            self._forge(entry.blob, _spoilt(data, manifest))

    def claim(self, source: str, data: bytes) -> None:
        """Say that a file it knows consists of ``data``."""
        (entry,) = self._snapshots[str(parse_source(source))].files
        self._forge(entry.blob, data)

    def _forge(self, name: bytes, data: bytes) -> None:
        blob = self._blobs[name]
        blob.data = data
        blob.manifest.checked = True
        for index, (offset, length) in enumerate(blob.manifest.plan):
            blob.manifest.learn(index, chunk_id(data[offset : offset + length]))

    def meet(self, victim: Daemon) -> None:
        """Connect to a victim and wait until it counts this as a peer."""
        self._thread.run(self._dial(victim))
        victim.meets(self)

    async def _dial(self, host: Daemon) -> ControlConnection:
        def introduce() -> bytes:
            return Info("default", self.address, f"127.0.0.1:{self._bulk_port}", "0").encode()

        if host.port not in self._connections:
            self._connections[host.port] = await connect(
                "127.0.0.1", host.port, self.key, self.node_id, introduce, self._answer
            )
        return self._connections[host.port]

    def call(self, host: Daemon, kind: str, body: Any) -> Any:
        """Ask a host something, as any peer may. Raises what the host answers."""

        async def ask() -> Any:
            return await (await self._dial(host)).call(kind, body)

        return self._thread.run(ask())

    # -- what it answers

    async def _answer(self, connection: ControlConnection, kind: str, body: Any) -> Any:
        if kind not in CALLS:
            return None
        self.asked[kind] += 1
        if self.lie == "mute":
            await asyncio.Event().wait()
        if self.lie == "odd":
            return {"what": "ever"}
        match kind:
            case "find":
                snapshot = self._snapshots.get(body)
                return self._snapshot(snapshot) if snapshot is not None else None
            case "want":
                return [self._state(blob) for blob in body]
            case "manifest":
                return self._manifest(body)
            case "shares" if self.lie == "shares":
                return [[next(iter(self._blobs)), 0] for _ in body]
        return None

    def _state(self, name: bytes) -> list[Any] | None:
        blob = self._blobs.get(name)
        if blob is None:
            return None
        count = len(blob.manifest)
        return [ChunkSet(count, set(range(count)) - blob.holes).encode() if blob.holes else True, None]

    def _manifest(self, name: bytes) -> bytes | None:
        blob = self._blobs.get(name)
        if blob is None:
            return None
        if self.lie == "no manifest":
            return b"\xc1" * 100
        if self.lie == "other manifest":
            other = Manifest(bytes(32), blob.manifest.plan, bytes(blob.manifest.ids))
            return encode_manifest(other)
        return encode_manifest(blob.manifest)

    def _snapshot(self, snapshot: Snapshot) -> bytes:
        (entry,) = snapshot.files
        match self.lie:
            case "no snapshot":
                return b"\xc1" * 100
            case "climbing" | "absolute":
                path = "../../escaped" if self.lie == "climbing" else "/tmp/escaped"
                fields = msgpack.unpackb(encode_snapshot(snapshot))
                fields[4][0][0] = path
                return bytes(msgpack.packb(fields))
            case "foreign":
                return encode_snapshot(_of(snapshot, replace(entry, source=parse_source("s3://elsewhere/secret"))))
            case "local":
                return encode_snapshot(_of(snapshot, replace(entry, source=parse_source("file:///etc/hostname"))))
        return encode_snapshot(snapshot)

    # -- the bulk port

    async def _bulk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(Role.SERVER, Port.BULK)
        handshake = Handshake(link, self.key, self.node_id, b"")
        try:
            while data := await reader.read(1 << 16):
                while data:
                    space = link.space()
                    count = min(len(space), len(data))
                    space[:count] = data[:count]
                    link.filled(count)
                    data = data[count:]
                    if not handshake.done:
                        writer.write(handshake.advance())
                    while handshake.done and (frame := link.receive()):
                        self.asked["get"] += 1
                        await self._send(writer, link, *frame.fields)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _send(self, writer: asyncio.StreamWriter, link: Link, number: int, name: bytes, index: int) -> None:
        blob = self._blobs[name]
        offset, length = blob.manifest.plan.span(index)
        body, chunk = blob.data[offset : offset + length], blob.manifest.id(index)
        assert chunk is not None
        forged = bytes([body[0] ^ 1]) + body[1:]
        match self.lie:
            case "silence":
                return
            case "garbage":
                writer.write(random.Random(0).randbytes(4096))
                return
            case "busy" | "missing" | "unknown":
                reason = {"busy": BUSY, "missing": MISSING, "unknown": UNKNOWN}[self.lie]
                writer.write(link.send(Kind.NO, number, reason, 20))
                return
            case "stranger":
                number += 1000
            case "wrong bytes":
                body = forged
            case "own id":
                body, chunk = forged, chunk_id(forged)
            case "wrong length":
                body = body[:-1]
        writer.write(link.send(Kind.DATA, number, len(body), chunk))
        if self.lie == "reset":
            writer.write(body[: len(body) // 2])
            await writer.drain()
            option = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            writer.transport.abort()
            raise ConnectionResetError
        writer.write(body)
        link.moved(len(body))
        await writer.drain()


def _spoilt(data: bytes, manifest: Manifest) -> bytes:
    """``data`` with a wrong byte at the end of each chunk (the beginning is the header: it stays one)."""
    spoilt = bytearray(data)
    for offset, length in list(manifest.plan)[1:]:
        spoilt[offset + length - 1] ^= 1
    return bytes(spoilt)


def _of(snapshot: Snapshot, entry: FileEntry) -> Snapshot:
    return replace(snapshot, files=(entry,), revision=tree_revision([entry]))


def read(report: dict[str, Any]) -> bytes:
    """The bytes of the one file that a load brought."""
    return Path(report["path"]).read_bytes()
