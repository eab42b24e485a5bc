"""A TCP proxy that counts: what passes from the server to clients is what left the origin."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

_PIECE = 1 << 18


class Meter:
    """``sent``: bytes the server sent, HTTP heads included. ``requests``: heads of requests, which have no bodies."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0
        self.sent = 0
        self.requests = 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Forward from ``port`` to the target, both of 127.0.0.1, for as long as the block runs."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                there, back = await asyncio.open_connection("127.0.0.1", self._target)
                try:
                    await self._both(self._ask(reader, back), self._answer(there, writer))
                finally:
                    back.close()
        finally:
            self._connections.discard(task)
            writer.close()

    async def _both(self, *ways: object) -> None:
        """Until either end hangs up."""
        tasks = [asyncio.ensure_future(way) for way in ways]  # type: ignore[call-overload]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tail = b""
        while piece := await reader.read(_PIECE):
            seen = tail + piece
            self.requests += seen.count(b"\r\n\r\n")
            tail = b"" if seen.endswith(b"\r\n\r\n") else seen[-3:]
            writer.write(piece)
            await writer.drain()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(_PIECE):
            self.sent += len(piece)
            writer.write(piece)
            await writer.drain()
