"""A TCP proxy before a real HTTP server: counts what leaves it, exactly, and breaks it on demand.

It reads requests only as far as it must: a head (for path and Range) and the length of the body. Answers pass through
untouched; whatever follows an answer's head is counted as body, for the request that is being answered. HTTP/1.1
clients wait for an answer before they ask again on a connection, so there is always exactly one such request.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType

from tests.servers.loop import LoopThread


@dataclass
class Exchange:
    """One request and the bytes of body that were sent to answer it."""

    method: str
    path: str
    query: str  # a signature, perhaps
    range: str
    sent: int = 0

    @property
    def begin(self) -> int:
        """The offset of the first byte it asks for."""
        found = re.search(r"bytes=(\d+)-", self.range)
        return int(found[1]) if found else 0


@dataclass(eq=False)
class Fault:
    """What happens to the next ``times`` requests whose path matches ``path`` (a regular expression)."""

    path: str
    kind: str  # "status" | "reset" | "stall"
    times: int
    status: int = 0
    retry_after: int | None = None
    after: int = 0  # bytes of body that still pass
    begin: int = 0  # what asks for bytes before this offset is left alone
    struck: threading.Event = field(default_factory=threading.Event)  # set when it has happened
    released: asyncio.Event = field(default_factory=asyncio.Event)


class FaultProxy:
    """Listens on ``port`` and forwards to ``target`` on 127.0.0.1."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.exchanges: list[Exchange] = []
        self._faults: list[Fault] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._thread = LoopThread("fault-proxy")
        self._server: asyncio.Server | None = None
        self.port = 0
        self.accept()

    # -- what was sent

    @property
    def egress(self) -> int:
        """Bytes of body sent since the last ``reset_counts``."""
        return sum(exchange.sent for exchange in list(self.exchanges))

    @property
    def requests(self) -> int:
        return len(self.exchanges)

    def reset_counts(self) -> None:
        self.exchanges = []

    # -- what is to go wrong

    def answer(self, path: str, status: int, times: int = 1, retry_after: int | None = None) -> Fault:
        """Answer with ``status`` instead of asking the server."""
        return self._add(Fault(path, "status", times, status=status, retry_after=retry_after))

    def reset(self, path: str, after: int = 0, times: int = 1) -> Fault:
        """Reset the connection once ``after`` bytes of body have passed."""
        return self._add(Fault(path, "reset", times, after=after))

    def stall(self, path: str, after: int = 0, times: int = 1, begin: int = 0) -> Fault:
        """Say nothing more once ``after`` bytes of body have passed, until ``release``."""
        return self._add(Fault(path, "stall", times, after=after, begin=begin))

    def release(self, fault: Fault) -> None:
        self._thread.call(fault.released.set)

    def refuse(self) -> None:
        """Refuse connections and reset those there are."""
        self._thread.run(self._shut())

    def accept(self) -> None:
        """Accept connections (again, on the same port)."""
        if self._server is None:
            self._thread.run(self._listen())

    def heal(self) -> None:
        """Drop all faults, release what stalls, accept connections."""
        for fault in self._faults:
            self.release(fault)
        self._faults = []
        self.accept()

    def _add(self, fault: Fault) -> Fault:
        self._faults = [*self._faults, fault]
        return fault

    # -- its own thread

    def close(self) -> None:
        self.refuse()
        self._thread.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 20, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with _hung_up():
                await self._connection(reader, writer)
        except asyncio.CancelledError:
            _abort(writer)
        finally:
            self._connections.discard(task)
            writer.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target, limit=1 << 20)
        answering = _Answering(server_reader, writer)
        answers: asyncio.Task[None] | None = None
        try:
            while head := await _read_head(reader):
                exchange = _parse(head)
                self.exchanges.append(exchange)
                fault = self._fault(exchange)
                answering.begin(exchange, fault)
                if fault and fault.kind == "status":
                    fault.struck.set()
                    wait = "" if fault.retry_after is None else f"Retry-After: {fault.retry_after}\r\n"
                    writer.write(f"HTTP/1.1 {fault.status} Fault\r\nContent-Length: 0\r\n{wait}\r\n".encode())
                    await writer.drain()
                    left = _body_length(head)
                    while left and (data := await reader.read(min(left, 1 << 18))):
                        left -= len(data)
                    continue
                answers = answers or asyncio.create_task(answering.pump())
                server_writer.write(head)
                left = _body_length(head)
                while left and (data := await reader.read(min(left, 1 << 18))):
                    left -= len(data)
                    server_writer.write(data)
                    await server_writer.drain()
        finally:
            if answers:
                answers.cancel()
                await asyncio.gather(answers, return_exceptions=True)
            server_writer.close()

    def _fault(self, exchange: Exchange) -> Fault | None:
        for fault in self._faults:
            if fault.times and re.search(fault.path, exchange.path) and exchange.begin >= fault.begin:
                fault.times -= 1
                return fault
        return None


class _Answering:
    """The way back on one connection: passes bytes on, counts them, and strikes where the fault says so."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._exchange: Exchange | None = None
        self._fault: Fault | None = None
        self._head: bytearray | None = None  # of the answer, while it is incomplete

    def begin(self, exchange: Exchange, fault: Fault | None) -> None:
        self._exchange, self._fault, self._head = exchange, fault, bytearray()

    async def pump(self) -> None:
        with _hung_up():
            while data := await self._reader.read(1 << 18):
                await self._pass(data)
        self._writer.close()  # the server has ended it: so do we

    async def _pass(self, data: bytes) -> None:
        exchange, fault = self._exchange, self._fault
        assert exchange is not None
        body = data
        if self._head is not None:
            self._head += data
            head, end, body = bytes(self._head).partition(b"\r\n\r\n")
            if not end:
                return
            self._head = None
            self._writer.write(head + end)
        if fault and exchange.sent + len(body) >= fault.after:
            passing = body[: fault.after - exchange.sent]
            self._send(exchange, passing)
            await self._writer.drain()
            body = body[len(passing) :]
            self._fault = None
            fault.struck.set()
            if fault.kind == "reset":
                _abort(self._writer)
                raise ConnectionResetError
            await fault.released.wait()
        self._send(exchange, body)
        await self._writer.drain()

    def _send(self, exchange: Exchange, body: bytes) -> None:
        exchange.sent += len(body)  # first: whoever has received it all must find it counted
        self._writer.write(body)


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def _parse(head: bytes) -> Exchange:
    method, target, _ = head.decode("latin-1").split(" ", 2)
    path, _, query = target.partition("?")
    found = re.search(rb"(?im)^range: *([^\r]*)", head)
    return Exchange(method, path, query, found[1].decode() if found else "")


def _body_length(head: bytes) -> int:
    found = re.search(rb"(?im)^content-length: *(\d+)", head)
    return int(found[1]) if found else 0


def _abort(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def _hung_up() -> Iterator[None]:
    with contextlib.suppress(ConnectionError, BrokenPipeError):
        yield
