"""Control connections between daemons: calls with answers, notices, and who is at the other end.

Both ends are equal once connected. Calls run concurrently, each in a task of its own; notices are handled one after
the other, in the order in which they were sent. ``handler(connection, kind, body)`` serves both: what it returns (or
the error it raises) goes back to a caller, and a notice has nobody to tell.

Bounds: calls in flight (a peer's excess is refused as an error, so that nobody waits in a circle), notices waiting
(then the connection is not read), bytes of a frame.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from weightcache.core.ids import short
from weightcache.core.wire import CONTROL_LIMIT, Frame, Kind, Link, Port, Role
from weightcache.errors import ProtocolError, WeightcacheError, from_wire, to_wire
from weightcache.log import fields
from weightcache.net.frame_stream import FrameStream, PeerUnreachable, Unproven
from weightcache.net.handshake import DEADLINE, Handshake, ItselfError
from weightcache.net.sockets import listen, reason

MAX_CALLS = 256  # in flight on one connection, each way
MAX_NOTICES = 256  # waiting for the handler
MAX_CONNECTIONS = 4096
MAX_PENDING = 64  # connections that have not proved the key
CALL_SECONDS = 30.0
MAX_TOLD = 1024  # addresses of which the log says that they were refused
KEEPALIVE = 5.0  # seconds of silence before a ping; dead after three times that
_CLOSE_SECONDS = 1.0  # for a peer to take what was sent before the connection is cut
_MAX_MESSAGE = 2000  # characters of an error that is sent

Introduce = Callable[[], bytes]  # what this host says of itself when a connection opens (at most MAX_INFO bytes)
Handler = Callable[["ControlConnection", str, Any], Awaitable[Any]]

_log = logging.getLogger(__name__)


class ControlConnection:
    """A connection to another daemon. ``dialled``: this end opened it."""

    def __init__(
        self,
        role: Role,
        key: bytes | None,
        node_id: bytes,
        introduce: Introduce,
        handler: Handler,
        *,
        expected: bytes | None = None,
        limit: int = CONTROL_LIMIT,
        handshake: float = DEADLINE,
        keepalive: float = KEEPALIVE,
        on_open: Callable[[ControlConnection], None] = lambda connection: None,
        on_refused: Callable[[ControlConnection, WeightcacheError], None] = lambda connection, error: None,
        unproven: Unproven | None = None,
    ) -> None:
        link = Link(role, Port.CONTROL, limit)
        self._handshake = Handshake(link, key, node_id, introduce(), expected=expected)
        self.stream = FrameStream(
            link, self._handshake, self, unproven or Unproven(1), deadline=handshake, tick=keepalive
        )
        self.dialled = role is Role.CLIENT
        self._handler = handler
        self._announce = on_open
        self._refused = on_refused
        self._closed: asyncio.Future[WeightcacheError | None] = asyncio.get_running_loop().create_future()
        self._on_close: list[Callable[[], None]] = []
        self._last = 0  # number of the latest call
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._slots = asyncio.Semaphore(MAX_CALLS)
        self._serving: set[asyncio.Task[None]] = set()
        self._notices: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._noticing: asyncio.Task[None] | None = None

    @property
    def peer_id(self) -> bytes:
        """The peer's node id (16 bytes), proved."""
        return self._handshake.peer_id

    @property
    def peer_info(self) -> bytes:
        """What the peer said of itself when the connection opened."""
        return self._handshake.peer_info

    @property
    def remote_host(self) -> str:
        """The IP address at the other end."""
        return self.stream.remote_host

    async def call(self, kind: str, body: Any = None, timeout: float = CALL_SECONDS) -> Any:
        """Ask the peer. Raises the error it answers, or PeerUnreachable when none comes within ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout), self._slots:
                await self.stream.drain()
                self._check_open()
                self._last += 1
                number = self._last
                answer = self._calls[number] = asyncio.get_running_loop().create_future()
                try:
                    self.stream.send(Kind.CALL, number, kind, body)
                    return await answer
                finally:
                    del self._calls[number]
        except TimeoutError:
            raise PeerUnreachable(f"node {short(self.peer_id)} did not answer {kind!r} within {timeout:g} s") from None

    def notify(self, kind: str, body: Any = None) -> None:
        """Tell the peer; notices are handled in order. Never waits, and is dropped once the connection is closed."""
        self.stream.send(Kind.NOTIFY, kind, body)

    async def closed(self) -> WeightcacheError | None:
        """Wait until the connection is closed; why, unless one end closed it in good order."""
        return await asyncio.shield(self._closed)

    def when_closed(self, callback: Callable[[], None]) -> None:
        """Call back as soon as the connection is closed."""
        self._on_close.append(callback)

    async def close(self) -> None:
        """Close, after the peer has taken what was sent before."""
        self.stream.close()
        if not (await asyncio.wait([self._closed], timeout=_CLOSE_SECONDS))[0]:
            self.stream.close(now=True)
            await self.closed()

    def _check_open(self) -> None:
        if self._closed.done():
            reason = self._closed.result()
            raise PeerUnreachable(f"no connection to node {short(self.peer_id)}: {reason or 'it was closed'}")

    # The stream's side

    def on_open(self) -> None:
        self._noticing = asyncio.ensure_future(self._handle_notices())
        self._announce(self)

    def on_frame(self, frame: Frame) -> None:
        match frame.kind, frame.fields:
            case Kind.CALL, [number, kind, body]:
                if len(self._serving) >= MAX_CALLS:
                    self.stream.send(Kind.ERROR, number, *to_wire(PeerUnreachable(f"{MAX_CALLS} calls are in flight")))
                    return
                task = asyncio.ensure_future(self._serve(number, kind, body))
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)
            case Kind.NOTIFY, [kind, body]:
                self._notices.put_nowait((kind, body))
                if self._notices.qsize() >= MAX_NOTICES:
                    self.stream.pause()
            case Kind.ANSWER, [number, body]:
                answer = self._answer(number)
                if answer is not None:
                    answer.set_result(body)
            case Kind.ERROR, [number, name, message]:
                answer = self._answer(number)
                if answer is not None:
                    answer.set_exception(from_wire(name, message[:_MAX_MESSAGE]))

    def on_lost(self, error: WeightcacheError | None) -> None:
        self._closed.set_result(error)
        if error is not None and not self._handshake.done:
            self._refused(self, error)
        for callback in self._on_close:
            callback()
        for task in (*self._serving, self._noticing):
            if task is not None:
                task.cancel()
        for answer in self._calls.values():
            if not answer.done():
                why = error or "it was closed"
                answer.set_exception(PeerUnreachable(f"the connection to node {short(self.peer_id)} was lost: {why}"))

    def _answer(self, number: int) -> asyncio.Future[Any] | None:
        """The call that is answered; None if nobody waits for it any more."""
        if not 0 < number <= self._last:
            raise ProtocolError(f"an answer to call {number}, which was never made")
        answer = self._calls.get(number)
        return answer if answer is not None and not answer.done() else None

    async def _serve(self, number: int, kind: str, body: Any) -> None:
        try:
            self.stream.send(Kind.ANSWER, number, await self._handler(self, kind, body))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's
            name, message = to_wire(error)
            self.stream.send(Kind.ERROR, number, name, message[:_MAX_MESSAGE])
        await self.stream.drain()

    async def _handle_notices(self) -> None:
        while True:
            kind, body = await self._notices.get()
            try:
                await self._handler(self, kind, body)
            except Exception as error:  # noqa: BLE001 - nobody waits for it
                _log.warning("notice %r of node %s failed: %s", kind[:40], short(self.peer_id), to_wire(error)[1])
            if self._notices.qsize() <= MAX_NOTICES // 2:
                self.stream.resume()


async def connect(
    host: str,
    port: int,
    key: bytes | None,
    node_id: bytes,
    introduce: Introduce,
    handler: Handler,
    on_open: Callable[[ControlConnection], None] = lambda connection: None,
    *,
    expected: bytes | None = None,
    limit: int = CONTROL_LIMIT,
    handshake: float = DEADLINE,
    keepalive: float = KEEPALIVE,
) -> ControlConnection:
    """Connect to another daemon, and know each other. ``handshake``: seconds to connect, and as many to prove the key.

    ``on_open(connection)`` is called before ``handler`` hears anything of the peer; the caller gets it later.
    Raises PeerUnreachable, ItselfError, AuthError, or ProtocolError (another version, another node than ``expected``).
    """
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[ControlConnection] = loop.create_future()

    def on_opened(connection: ControlConnection) -> None:
        on_open(connection)
        opened.set_result(connection)

    connection = ControlConnection(
        Role.CLIENT, key, node_id, introduce, handler,
        expected=expected, limit=limit, handshake=handshake, keepalive=keepalive, on_open=on_opened,
    )  # fmt: skip
    try:
        async with asyncio.timeout(handshake):
            await loop.create_connection(lambda: connection.stream, host, port)
    except TimeoutError:
        raise PeerUnreachable(f"{host} port {port}: no connection within {handshake:g} s") from None
    except OSError as error:
        raise PeerUnreachable(f"{host} port {port}: {reason(error)}") from None
    closed = asyncio.ensure_future(connection.closed())
    try:
        await asyncio.wait((opened, closed), return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        connection.stream.close(now=True)
        raise
    finally:
        closed.cancel()
    if not opened.done():
        raise closed.result() or PeerUnreachable(f"{host} port {port}: the connection was closed")
    return connection


class ControlServer:
    """Accepts other daemons. ``on_open(connection)``: one has proved the key, and can be called."""

    def __init__(
        self,
        host: str,
        port: int,
        key: bytes | None,
        node_id: bytes,
        introduce: Introduce,
        handler: Handler,
        on_open: Callable[[ControlConnection], None] = lambda connection: None,
        *,
        limit: int = CONTROL_LIMIT,
        handshake: float = DEADLINE,
        keepalive: float = KEEPALIVE,
    ) -> None:
        self._host = host
        self._port = port
        self._on_open = on_open
        self._unproven = Unproven(MAX_PENDING)
        self._connection = functools.partial(
            ControlConnection, Role.SERVER, key, node_id, introduce, handler,
            limit=limit, handshake=handshake, keepalive=keepalive, on_open=self._opened,
            on_refused=self._refuse, unproven=self._unproven,
        )  # fmt: skip
        self._sock: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self.connections: set[ControlConnection] = set()
        self._refused: set[str] = set()  # addresses that were told of

    def bind(self) -> int:
        """Take the address; returns the port. Who connects waits for ``start``. Raises DaemonError when it cannot be
        had."""
        self._sock = listen(self._host, self._port)
        return int(self._sock.getsockname()[1])

    async def start(self) -> int:
        """Accept who connects; returns the port. Raises DaemonError when the address cannot be had."""
        if self._sock is None:
            self.bind()
        assert self._sock is not None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: self._connection().stream, sock=self._sock)
        return int(self._sock.getsockname()[1])

    async def close(self) -> None:
        """Stop listening, and close every connection."""
        if self._server is not None:
            self._server.close()
        elif self._sock is not None:
            self._sock.close()
        self._unproven.close()
        await asyncio.gather(*(connection.close() for connection in self.connections))

    def _refuse(self, connection: ControlConnection, error: WeightcacheError) -> None:
        """Say so, once of an address: who is refused comes again and again."""
        host = connection.remote_host
        if not isinstance(error, ItselfError) and host not in self._refused and len(self._refused) < MAX_TOLD:
            self._refused.add(host)
            _log.warning("peer refused", extra=fields(peer=host, why=str(error)))

    def _opened(self, connection: ControlConnection) -> None:
        if len(self.connections) >= MAX_CONNECTIONS:
            connection.stream.close(now=True)
            return
        self.connections.add(connection)
        connection.when_closed(lambda: self.connections.discard(connection))
        self._on_open(connection)
