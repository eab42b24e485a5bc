"""A ``send`` process: hands chunks of this host's blobs to peers, by sendfile from the page cache.

Theory of operation. One thread, one epoll loop; nothing blocks but the disk. The node accepts the connections of peers
and hands each to one of its senders. A connection (Upload) walks through handshake, requests, answers; answers go out
in the order of the requests. A turn sends at most TURN bytes, and each round of the loop gives every writable
connection one turn: a slow reader holds nothing but its own socket.

The node says which blobs there are, each with an open descriptor. A GET for another makes the process ask ("want"),
once; the connection waits at that request until the node says "blob" or "none", or WANT_SECONDS pass.

Under a bandwidth cap a connection whose turn would pass it waits in line, unwatched, until the cap lets it (``Pace``);
what takes longer than AHEAD seconds at that rate is refused as busy, so that nobody waits for a host that cannot, and
takes it for a dead one.

All that peers can make this process hold is bounded: connections; those that have not proved the key (the oldest goes
first); requests of each (over ``pipeline`` they are refused as busy, over twice that they are not read); blobs asked
for.

    node -> sender                                sender -> node
    ["config", {SenderConfig}]
    ["connection"] + fd                           ["taken"]                      the connection
    ["blob", blob] + fds (blob, table)            ["want", blob]                 answer with "blob" or "none"
    ["none", blob]
    ["had", blob, [[index, id], ...]]             ["sent", {peer id: bytes}]     each second in which any were
    ["drop", blob]                                ["dropped", blob]              its descriptor is closed
                                                  ["connections", count]         when it has changed
                                                  ["fault", blob, index, text]   the disk does not give what was had
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from errno import EIO
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT

from weightcache.core.bitmap import ChunkSet
from weightcache.core.layout import CHUNK
from weightcache.core.manifest import Manifest
from weightcache.core.pace import Pace
from weightcache.core.wire import BUSY, MISSING, UNKNOWN, Kind, Link, Port, Role
from weightcache.errors import ProtocolError
from weightcache.net.channel import Channel, Message, close_all
from weightcache.net.handshake import DEADLINE, Handshake
from weightcache.net.loop import Loop, configuration
from weightcache.net.sockets import tune
from weightcache.net.table import read_table

TURN = CHUNK  # bytes one connection may send before the others have their turn
TURNS = 200  # a second at least, under a bandwidth cap
AHEAD = 1.0  # seconds' worth of answers begun at a time, under a bandwidth cap
WANT_SECONDS = 5.0  # the node's time to answer "want"
_MAX_WANTED = 256  # blobs asked of the node at a time


@dataclass(frozen=True, slots=True)
class SenderConfig:
    """What the node tells a sender. Times in seconds."""

    key: bytes | None = field(repr=False)
    node_id: bytes
    info: bytes = b""
    connections: int = 1024  # that have proved the key
    pending: int = 64  # that have not yet
    pipeline: int = 16  # requests of one connection
    handshake: float = DEADLINE
    stall: float = 30.0  # who takes no byte of an answer for so long is cut off
    bandwidth: int | None = None  # bytes of blobs a second, to all peers together


class Blob:
    """One blob that can be sent. ``fd`` stays open as long as a connection is in the middle of a chunk."""

    __slots__ = ("dropped", "fd", "had", "manifest", "name", "sending")

    def __init__(self, name: bytes, fd: int, manifest: Manifest, had: ChunkSet) -> None:
        self.name = name
        self.fd = fd
        self.manifest = manifest
        self.had = had
        self.sending = 0  # connections in the middle of a chunk
        self.dropped = False


class Request:
    """One GET. ``refusal`` is set once it is clear that the answer is NO."""

    __slots__ = ("blob", "index", "number", "refusal")

    def __init__(self, number: int, blob: bytes, index: int, refusal: str) -> None:
        self.number = number
        self.blob = blob
        self.index = index
        self.refusal = refusal


class Upload:
    """One peer's connection: what it asked for, and the answer on its way (a frame, then a range of a blob)."""

    __slots__ = ("asked", "awaits", "blob", "frame", "handshake", "index", "link", "moved_at", "offset", "sock")

    def __init__(self, sock: socket.socket, config: SenderConfig, now: float) -> None:
        self.sock = sock
        self.link = Link(Role.SERVER, Port.BULK)
        self.handshake = Handshake(self.link, config.key, config.node_id, config.info)
        self.asked: deque[Request] = deque()
        self.awaits = b""  # the blob asked of the node, while the first request waits for it
        self.frame = b""
        self.blob: Blob | None = None
        self.index = self.offset = 0
        self.moved_at = now

    @property
    def answering(self) -> bool:
        return bool(self.frame) or self.blob is not None


def run_sender(channel: Channel) -> None:
    """Serve peers until the channel ends. The node's first message must be "config"."""
    settings = configuration(channel)
    if settings is not None:
        Sender(channel, SenderConfig(**settings)).run()


class Sender:
    """What the node and the peers may do to this process."""

    def __init__(self, channel: Channel, config: SenderConfig) -> None:
        self._channel = channel
        self._config = config
        self._loop = Loop(channel, min(1.0, config.handshake / 4, config.stall / 4))
        self._blobs: dict[bytes, Blob] = {}
        self._wanted: dict[bytes, float] = {}  # blob asked of the node -> when to stop waiting
        self._pending: dict[Upload, float] = {}  # handshake not done, oldest first -> when to give up
        self._uploads: set[Upload] = set()  # the others
        self._sent: dict[bytes, int] = {}
        self._counted = 0
        self._pace = Pace(config.bandwidth)
        self._turn = TURN if config.bandwidth is None else max(4096, min(TURN, config.bandwidth // TURNS))
        self._ahead = math.inf if config.bandwidth is None else AHEAD * config.bandwidth
        self._due = 0  # bytes of the answers that have begun
        self._waiting: dict[Upload, None] = {}  # for the cap, in order

    def run(self) -> None:
        self._loop.run(self._on_message, self._on_tick, self._resume)

    # The node

    def _on_message(self, message: Message) -> None:
        fields, fds = message
        match fields:
            case ["connection"]:
                self._accept(*fds)
            case ["blob", bytes(name)]:
                self._add(name, *fds)
            case ["had", bytes(name), list(chunks)] if name in self._blobs:
                blob = self._blobs[name]
                for index, chunk in chunks:
                    blob.manifest.learn(index, chunk)
                    blob.had.add(index)
            case ["drop", bytes(name)] if name in self._blobs:
                blob = self._blobs.pop(name)
                blob.dropped = True
                self._close_unused(blob)
            case ["had" | "drop", *_]:
                pass  # the sender never had the blob: it is told of all that happens to any
            case ["none", bytes(name)]:
                self._settle(name, UNKNOWN)
            case _:
                close_all(fds)
                raise ProtocolError(f"the node sent the sender {str(fields[:1])[:40]}, which it does not know")

    def _add(self, name: bytes, fd: int, table: int) -> None:
        try:
            manifest, had = read_table(table)
        finally:
            os.close(table)
        known = self._blobs.get(name)
        if known:
            os.close(fd)
            known.manifest, known.had = manifest, had
        else:
            self._blobs[name] = Blob(name, fd, manifest, had)
        self._settle(name)

    def _settle(self, name: bytes, refusal: str = "") -> None:
        """The node has answered "want" (or will not): go on with the connections that waited."""
        self._wanted.pop(name, None)
        for upload in list(self._uploads):
            for request in upload.asked if refusal else ():
                if request.blob == name and not request.refusal:
                    request.refusal = refusal
            if upload.awaits == name:
                upload.awaits = b""
                self._guarded(upload, 0)

    def _close_unused(self, blob: Blob) -> None:
        if blob.dropped and not blob.sending:
            os.close(blob.fd)
            self._channel.send("dropped", blob.name)

    def _on_tick(self) -> None:
        now = self._loop.now
        for upload, deadline in list(self._pending.items()):
            if now < deadline:
                break
            self._close(upload)
        stalled = [u for u in self._uploads if u.answering and now - u.moved_at > self._config.stall]
        for upload in [u for u in stalled if u not in self._waiting]:
            self._close(upload)
        for name in [name for name, deadline in self._wanted.items() if now > deadline]:
            self._settle(name, BUSY)
        if self._channel.backlog:
            return
        if self._sent:
            self._channel.send("sent", self._sent)
            self._sent = {}
        if self._counted != len(self._uploads):
            self._counted = len(self._uploads)
            self._channel.send("connections", self._counted)

    # Peers

    def _accept(self, fd: int) -> None:
        self._channel.send("taken")
        sock = socket.socket(fileno=fd)
        tune(sock)
        if len(self._pending) >= self._config.pending:
            self._close(next(iter(self._pending)))
        upload = Upload(sock, self._config, self._loop.now)
        self._pending[upload] = self._loop.now + self._config.handshake
        self._watch(upload)

    def _guarded(self, upload: Upload, events: int) -> None:
        """One connection's turn. Whatever goes wrong ends that connection only."""
        try:
            if events & (EPOLLHUP | EPOLLERR):
                raise ConnectionResetError
            if events & EPOLLIN:
                self._receive(upload)
            self._pump(upload)
        except ProtocolError:
            with contextlib.suppress(OSError):
                upload.sock.send(upload.handshake.farewell)
            self._close(upload)
        except OSError:
            self._close(upload)
        else:
            self._watch(upload)

    def _receive(self, upload: Upload) -> None:
        self._read_requests(upload)
        if len(upload.asked) >= 2 * self._config.pipeline:
            return
        try:
            count = upload.sock.recv_into(upload.link.space())
        except BlockingIOError:
            return
        if not count:
            raise ConnectionResetError
        upload.link.filled(count)
        if upload in self._pending:
            upload.frame += upload.handshake.advance()
            if upload.handshake.done:
                del self._pending[upload]
                if len(self._uploads) >= self._config.connections:
                    raise ConnectionResetError
                self._uploads.add(upload)
        self._read_requests(upload)

    def _pump(self, upload: Upload) -> None:
        """Send up to a turn's bytes of answers."""
        if upload in self._waiting:
            return
        budget, now = self._turn, time.monotonic()
        try:
            while budget > 0 and (upload.answering or self._begin_answer(upload)):
                if upload.blob is not None and not self._pace.open(now):
                    self._waiting[upload] = None
                    return
                budget -= self._send_some(upload, budget, now)
        except BlockingIOError:
            pass

    def _resume(self) -> None:
        """Give those that wait for the cap their turns, in order, as far as it lets them."""
        now = time.monotonic()
        while self._waiting and self._pace.open(now):
            upload = next(iter(self._waiting))
            del self._waiting[upload]
            upload.moved_at = self._loop.now
            self._guarded(upload, 0)
        self._loop.alarm = self._pace.opens_at(now) if self._waiting else math.inf

    def _begin_answer(self, upload: Upload) -> bool:
        """Make the next answer ready; False when there is nothing to answer, or not yet."""
        self._read_requests(upload)
        if upload.awaits or not upload.asked:
            return False
        request = upload.asked[0]
        blob = self._blobs.get(request.blob)
        if not request.refusal and blob is None:
            if request.blob in self._wanted:
                upload.awaits = request.blob
                return False
            request.refusal = UNKNOWN
        upload.asked.popleft()
        upload.moved_at = self._loop.now
        if blob is not None and not request.refusal:
            chunk = blob.manifest.id(request.index) if request.index in blob.had else None
            if chunk is not None and self._due > self._ahead:
                request.refusal = BUSY
            elif chunk is not None:
                upload.offset, length = blob.manifest.plan.span(request.index)
                upload.frame = upload.link.send(Kind.DATA, request.number, length, chunk)
                upload.index, upload.blob = request.index, blob
                blob.sending += 1
                self._due += length
                return True
        reason = request.refusal or MISSING
        # Jitter, so that those who were refused together do not come back together.
        wait = 20 + os.urandom(1)[0] if reason == BUSY else 0
        upload.frame = upload.link.send(Kind.NO, request.number, reason, wait)
        return True

    def _read_requests(self, upload: Upload) -> None:
        """Take requests from what has been received, as long as there is room for them."""
        limit = self._config.pipeline
        while len(upload.asked) < 2 * limit and upload.handshake.done:
            frame = upload.link.receive()
            if frame is None:
                return
            number, name, index = frame.fields
            refusal = BUSY if len(upload.asked) >= limit else ""
            if not refusal and name not in self._blobs and name not in self._wanted:
                if len(self._wanted) < _MAX_WANTED:
                    self._wanted[name] = self._loop.now + WANT_SECONDS
                    self._channel.send("want", name)
                else:
                    refusal = BUSY
            upload.asked.append(Request(number, name, index, refusal))

    def _send_some(self, upload: Upload, most: int, now: float) -> int:
        """Send what the socket takes of the current answer; raises BlockingIOError when that is nothing."""
        blob = upload.blob
        if upload.frame:
            count = upload.sock.send(upload.frame, socket.MSG_MORE if blob else 0)
            upload.frame = upload.frame[count:]
        elif blob is not None:
            count = self._send_file(upload, blob, min(most, upload.link.bytes_left))
            upload.offset += count
            upload.link.moved(count)
            self._due -= count
            self._pace.spend(count, now)
            peer = upload.handshake.peer_id
            self._sent[peer] = self._sent.get(peer, 0) + count
            if not upload.link.bytes_left:
                self._finish(upload)
        upload.moved_at = self._loop.now
        return count

    def _send_file(self, upload: Upload, blob: Blob, most: int) -> int:
        try:
            count = os.sendfile(upload.sock.fileno(), blob.fd, upload.offset, most)
        except OSError as error:
            if error.errno == EIO:
                self._channel.send("fault", blob.name, upload.index, os.strerror(EIO))
            raise
        if not count:
            self._channel.send("fault", blob.name, upload.index, f"the file ends at byte {upload.offset}")
            raise ConnectionResetError
        return count

    def _finish(self, upload: Upload) -> None:
        """The connection no longer needs the blob it was sending."""
        blob, upload.blob = upload.blob, None
        if blob is not None:
            self._due -= upload.link.bytes_left
            blob.sending -= 1
            self._close_unused(blob)

    def _watch(self, upload: Upload) -> None:
        room = len(upload.asked) < 2 * self._config.pipeline
        sendable = (upload.answering or (upload.asked and not upload.awaits)) and upload not in self._waiting
        events = (EPOLLIN if room else 0) | (EPOLLOUT if sendable else 0)
        self._loop.watch(upload.sock.fileno(), events, lambda events: self._guarded(upload, events))

    def _close(self, upload: Upload) -> None:
        self._finish(upload)
        self._pending.pop(upload, None)
        self._uploads.discard(upload)
        self._waiting.pop(upload, None)
        self._loop.forget(upload.sock.fileno())
        upload.sock.close()
