"""The node's side of the ``send`` processes: who serves which connection, and when they must let go of a blob.

The node itself accepts the connections of peers and hands them to its senders in turn, so that a peer that receives in
several processes is served by as many (the kernel's own choice, SO_REUSEPORT, is a hash of the ports: of four
connections to four processes it leaves one process idle as a rule). The next sender is started when the one before it
gets a connection. No sender's death closes the port.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial
from itertools import cycle, pairwise
from typing import Any

from weightcache.config import Address
from weightcache.core.ids import short
from weightcache.errors import DaemonError, WeightcacheError
from weightcache.log import fields
from weightcache.net.sockets import listen
from weightcache.net.table import write_table
from weightcache.node.processes import BulkProcess
from weightcache.store import Store

log = logging.getLogger(__name__)

DROP_SECONDS = 2.0
ACCEPT_SECONDS = 1.0  # until the next try, when no descriptors are left
UNTAKEN = 64  # connections on their way to a sender; more of them are closed
LEAST_SHARE = 1_000_000_000  # bytes/s of a bandwidth cap that is worth a sender


class _Sender:
    """One process, and what it has of the node's. What it is told while it does not run is lost."""

    def __init__(
        self,
        config: dict[str, Any],
        heard: Callable[[_Sender, list[Any], tuple[int, ...]], None],
        died: Callable[[_Sender, str], None],
    ) -> None:
        self.process = BulkProcess("send", config, partial(heard, self), partial(died, self))
        self.known: set[bytes] = set()  # blobs of which it holds a descriptor
        self.dropping: dict[bytes, asyncio.Future[None]] = {}
        self.untaken = 0  # connections it was handed, and has not seen yet
        self.connections = 0

    def hand(self, sock: socket.socket) -> None:
        """Have it serve a peer's connection, which now belongs to it."""
        if self.untaken < UNTAKEN:
            self.untaken += 1
            self.process.send("connection", fds=[sock.detach()])
        sock.close()

    def reset(self) -> None:
        """It has ended, and holds nothing any more."""
        self.known.clear()
        self.untaken = self.connections = 0
        for dropped in self.dropping.values():
            if not dropped.done():
                dropped.set_result(None)
        self.dropping.clear()


class Serving:
    """Serves this host's chunks to peers, from at most ``count`` processes of its own.

    ``bandwidth``: bytes a second to all peers together (None: no cap). Each process has its share of it, and there are
    no more of them than have a share worth while.
    """

    def __init__(self, store: Store, settings: dict[str, Any], count: int, bandwidth: int | None) -> None:
        self._store = store
        if bandwidth is not None:
            count = max(1, min(count, bandwidth // LEAST_SHARE))
            settings = settings | {"bandwidth": bandwidth // count}
        self._senders = [_Sender(settings, self._heard, self._died) for _ in range(count)]
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._news: dict[bytes, list[tuple[int, bytes]]] = {}
        self._loop = asyncio.get_running_loop()
        self.sent: dict[bytes, int] = {}  # bytes, by peer

    @property
    def processes(self) -> list[BulkProcess]:
        return [sender.process for sender in self._senders]

    @property
    def connections(self) -> int:
        """Of peers that have proved the key."""
        return sum(sender.connections for sender in self._senders)

    def listen(self, address: Address) -> int:
        """Start serving; returns the port. Raises DaemonError when the address is taken."""
        try:
            self._listener = listen(address.host, address.port)
        except DaemonError as error:
            raise DaemonError(f"bulk data has the port after that of listen: {error}") from None
        self._senders[0].process.start()
        self._accepting = asyncio.ensure_future(self._accept(self._listener))
        return int(self._listener.getsockname()[1])

    async def _accept(self, listener: socket.socket) -> None:
        for sender, following in pairwise(cycle(self._senders)):
            try:
                sock, _ = await self._loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(ACCEPT_SECONDS)
                continue
            sender.hand(sock)
            following.process.start()

    async def close(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        await asyncio.gather(*(sender.process.stop() for sender in self._senders))

    def had(self, blob: bytes, chunk: int, name: bytes) -> None:
        """A chunk may be served from now on."""
        if any(blob in sender.known for sender in self._senders):
            if not self._news:
                self._loop.call_soon(self._tell)
            self._news.setdefault(blob, []).append((chunk, name))

    def _tell(self) -> None:
        news, self._news = self._news, {}
        for blob, chunks in news.items():
            for sender in self._senders:
                if blob in sender.known:
                    sender.process.send("had", blob, chunks)

    async def drop(self, blob: bytes) -> None:
        """Have the processes close their descriptors of a blob, which would keep the blob from being evicted."""
        self._news.pop(blob, None)
        dropping = []
        for sender in self._senders:
            if blob in sender.known:
                sender.known.discard(blob)
                dropping.append(sender.dropping.setdefault(blob, self._loop.create_future()))
                sender.process.send("drop", blob)
        if dropping:
            await asyncio.wait(dropping, timeout=DROP_SECONDS)

    async def drop_partial(self) -> None:
        """Drop every blob of which something was found missing: the processes would go on serving it."""
        known = {blob for sender in self._senders for blob in sender.known}
        found = [info for blob in sorted(known) if (info := self._store.info(blob)) is not None]
        await asyncio.gather(*(self.drop(info.blob) for info in found if info.state == "partial"))

    def _heard(self, sender: _Sender, message: list[Any], fds: tuple[int, ...]) -> None:
        match message:
            case ["taken"]:
                sender.untaken -= 1
            case ["want", blob]:
                self._offer(sender, blob)
            case ["dropped", blob]:
                if (future := sender.dropping.pop(blob, None)) is not None and not future.done():
                    future.set_result(None)
            case ["sent", counts]:
                for peer, size in counts.items():
                    self.sent[peer] = self.sent.get(peer, 0) + size
            case ["connections", count]:
                sender.connections = count
            case ["fault", blob, chunk, why]:
                log.error("disk fault", extra=fields(blob=short(blob), chunk=chunk, why=why))

    def _offer(self, sender: _Sender, blob: bytes) -> None:
        """Give a process a blob that a peer asks it for, if there is any of it."""
        info = self._store.info(blob)
        offered = info is not None and not info.suspect and not info.private
        manifest = self._store.manifest(blob) if offered else None
        if manifest is None:
            sender.process.send("none", blob)
            return
        try:
            reader = self._store.open_reader(blob)
        except WeightcacheError:  # evicted just now
            sender.process.send("none", blob)
            return
        self._store.touch(blob)
        sender.known.add(blob)
        sender.process.send("blob", blob, fds=[reader, write_table(manifest, self._store.had(blob))])

    def _died(self, sender: _Sender, reason: str) -> None:
        sender.reset()
        sender.process.start()
