"""``http://`` straight into a buffer: blocking connections, each in a thread while it is waited for.

aiohttp hands a body over in many small copies, which costs more than receiving it. Here the kernel's copy is the only
one. Connections are kept for the next request while their answers were read to the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http.client import HTTPConnection, HTTPResponse
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from multidict import CIMultiDict

from weightcache.origin.base import PATIENCE

if TYPE_CHECKING:
    from yarl import URL

IDLE = 8  # connections kept to one server
AT_ONCE = 256 << 10  # bytes waited for before the clock is looked at
Result = TypeVar("Result")


class PlainReply:
    """An answer whose head has come (a ``web.Reply``)."""

    def __init__(self, client: PlainClient, connection: HTTPConnection, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = CIMultiDict(response.headers.items())
        self.content_length = response.length
        self._client = client
        self._connection = connection
        self._response = response

    @property
    def reusable(self) -> bool:
        return self._response.isclosed() and not self._response.will_close

    async def take(self, buffer: memoryview) -> int:
        """As ``web.Reply`` says. When it is cancelled, a thread may write into ``buffer`` for a moment still."""

        def read() -> int:
            at, until = 0, monotonic() + PATIENCE
            while at < len(buffer) and (count := self._response.readinto(buffer[at : at + AT_ONCE])):
                at += count
                if monotonic() > until:
                    break
            if self._response.length == 0:
                self._response.close()  # else only a read past the end would tell that this was it
            return at

        return await self._client.run(self._connection, read)


class PlainClient:
    """GETs of up to ``streams`` at a time; ``timeout``: seconds without a byte after which one fails."""

    def __init__(self, timeout: float, streams: int) -> None:
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(streams, "http")
        self._idle: dict[tuple[str, int], list[HTTPConnection]] = {}

    @asynccontextmanager
    async def get(self, url: URL, headers: dict[str, str]) -> AsyncIterator[PlainReply]:
        """Ask. Raises OSError and http.client's HTTPException."""
        place = (url.host or "", url.port or 80)
        idle = self._idle.setdefault(place, [])
        connection = next((one for one in iter(lambda: idle.pop() if idle else None, None) if _usable(one)), None)
        connection = connection or HTTPConnection(*place, timeout=self._timeout)
        reply = None

        def ask() -> HTTPResponse:
            connection.request("GET", url.raw_path_qs, headers=headers)
            return connection.getresponse()

        try:
            reply = PlainReply(self, connection, await self.run(connection, ask))
            yield reply
        finally:
            if reply is not None and reply.reusable and len(idle) < IDLE:
                idle.append(connection)
            else:
                connection.close()

    async def run(self, connection: HTTPConnection, work: Callable[[], Result]) -> Result:
        """Do in a thread what waits for a connection, which ends if this is cancelled."""
        future = self._threads.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            future.add_done_callback(lambda _: connection.close())
            raise

    def close(self) -> None:
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()
        self._threads.shutdown(wait=False)


def _usable(connection: HTTPConnection) -> bool:
    """Whether an idle connection is as it was left; the server's end of it, or anything it says unasked, ends it."""
    if connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]:
        return True
    connection.close()
    return False
