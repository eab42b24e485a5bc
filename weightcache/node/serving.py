"""The node's side of the ``send`` process: which blobs it may serve, and when it must let go of one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from weightcache.config import Address
from weightcache.core.ids import short
from weightcache.errors import DaemonError, WeightcacheError
from weightcache.log import fields
from weightcache.net.table import write_table
from weightcache.node.processes import BulkProcess
from weightcache.store import Store

log = logging.getLogger(__name__)

START_SECONDS = 10.0
DROP_SECONDS = 2.0
RESTART_SECONDS = 1.0


class Serving:
    """Serves this host's chunks to peers, from a process of its own."""

    def __init__(self, store: Store, settings: dict[str, Any]) -> None:
        self._store = store
        self._settings = settings
        self.process = BulkProcess("send", settings, self._heard, self._died)
        self._listening: asyncio.Future[int] | None = None
        self._known: set[bytes] = set()  # blobs the process holds a descriptor of
        self._dropping: dict[bytes, asyncio.Future[None]] = {}
        self._news: dict[bytes, list[tuple[int, bytes]]] = {}
        self._restart: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.sent: dict[str, int] = {}  # bytes, by peer id in hex
        self.connections = 0

    async def listen(self, address: Address) -> int:
        """Start serving; returns the port. Raises DaemonError when the address is taken."""
        self._settings |= {"host": address.host, "port": address.port}
        self._listening = self._loop.create_future()
        self.process.start()
        try:
            port = await asyncio.wait_for(self._listening, START_SECONDS)
        except TimeoutError:
            raise DaemonError(f"the send process did not listen on {address} within {START_SECONDS:.0f} s") from None
        self._settings["port"] = port  # started again, it is found at the same address
        return port

    async def close(self) -> None:
        if self._restart is not None:
            self._restart.cancel()
        await self.process.stop()

    def had(self, blob: bytes, chunk: int, name: bytes) -> None:
        """A chunk may be served from now on."""
        if blob in self._known:
            if not self._news:
                self._loop.call_soon(self._tell)
            self._news.setdefault(blob, []).append((chunk, name))

    def _tell(self) -> None:
        news, self._news = self._news, {}
        for blob, chunks in news.items():
            self.process.send("had", blob, chunks)

    async def drop(self, blob: bytes) -> None:
        """Have the process close its descriptor of a blob, which would keep the blob from being evicted."""
        if blob not in self._known:
            return
        self._known.discard(blob)
        self._news.pop(blob, None)
        dropped = self._dropping.setdefault(blob, self._loop.create_future())
        self.process.send("drop", blob)
        await asyncio.wait([dropped], timeout=DROP_SECONDS)

    async def drop_partial(self) -> None:
        """Drop every blob of which something was found missing: the process would go on serving it."""
        known = [info for blob in self._known if (info := self._store.info(blob)) is not None]
        await asyncio.gather(*(self.drop(info.blob) for info in known if info.state == "partial"))

    def _heard(self, message: list[Any], fds: Sequence[int]) -> None:
        match message:
            case ["want", blob]:
                self._offer(blob)
            case ["dropped", blob]:
                if (future := self._dropping.pop(blob, None)) is not None and not future.done():
                    future.set_result(None)
            case ["sent", counts]:
                for peer, size in counts.items():
                    self.sent[peer.hex()] = self.sent.get(peer.hex(), 0) + size
            case ["connections", count]:
                self.connections = count
            case ["fault", blob, chunk, why]:
                log.error("disk fault", extra=fields(blob=short(blob), chunk=chunk, why=why))
            case ["listening", port]:
                if self._listening is not None and not self._listening.done():
                    self._listening.set_result(port)
            case ["failed", why]:
                error = DaemonError(f"bulk data has the port after that of listen: {why}")
                if self._listening is not None and not self._listening.done():
                    self._listening.set_exception(error)
                else:
                    log.error("not serving", extra=fields(why=str(error)))

    def _offer(self, blob: bytes) -> None:
        """Give the process a blob that a peer asks for, if there is any of it."""
        info = self._store.info(blob)
        offered = info is not None and not info.suspect and not info.private
        manifest = self._store.manifest(blob) if offered else None
        if manifest is None:
            self.process.send("none", blob)
            return
        try:
            reader = self._store.open_reader(blob)
        except WeightcacheError:  # evicted just now
            self.process.send("none", blob)
            return
        self._store.touch(blob)
        self._known.add(blob)
        self.process.send("blob", blob, fds=[reader, write_table(manifest, self._store.had(blob))])

    def _died(self, reason: str) -> None:
        self._known.clear()
        for future in self._dropping.values():
            if not future.done():
                future.set_result(None)
        self._dropping.clear()
        if self._listening is not None and not self._listening.done():
            self._listening.set_exception(DaemonError(reason))
            return
        self._restart = self._loop.call_later(RESTART_SECONDS, self.process.start)
