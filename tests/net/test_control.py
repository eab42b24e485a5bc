"""Control connections over real sockets, on asyncio and on uvloop, and strangers at the port."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from weightcache.core.wire import Kind, Link, Port, Role
from weightcache.errors import AuthError, DaemonError, LoadFailed, ProtocolError, WeightcacheError
from weightcache.log import JsonLines
from weightcache.net import control, frame_stream, handshake
from weightcache.net.control import ControlConnection, ControlServer, connect
from weightcache.net.frame_stream import PeerUnreachable
from weightcache.net.handshake import Handshake, ItselfError

KEY = b"the key of this cluster"
ANNE, BERT = b"anne" * 4, b"bert" * 4
Main = Callable[[], Awaitable[None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Main], None]]:
    factory = uvloop.new_event_loop if request.param == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        yield lambda main: runner.run(asyncio.wait_for(main(), 20))  # type: ignore[arg-type]


async def echo(connection: ControlConnection, kind: str, body: Any) -> Any:
    if kind == "fail":
        raise LoadFailed("no source is left for chunk 7")
    if kind == "crash":
        raise KeyError("what")
    if kind == "huge":
        return bytes(body)
    return [kind, body, connection.peer_info]


@asynccontextmanager
async def joined(
    at_server: control.Handler = echo, at_client: control.Handler = echo, **how: Any
) -> AsyncIterator[tuple[ControlConnection, ControlConnection, ControlServer]]:
    """A client's and a server's end of one connection."""
    opened: asyncio.Future[ControlConnection] = asyncio.get_running_loop().create_future()
    server = ControlServer("127.0.0.1", 0, KEY, BERT, lambda: b"i am bert", at_server, opened.set_result, **how)
    port = await server.start()
    client = await connect("127.0.0.1", port, KEY, ANNE, lambda: b"i am anne", at_client, **how)
    yield client, await opened, server
    await client.close()
    await server.close()


def test_both_ends_call_each_other(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        async with joined() as (client, server, listener):
            assert (client.peer_id, client.peer_info, client.dialled) == (BERT, b"i am bert", True)
            assert (server.peer_id, server.peer_info, server.dialled) == (ANNE, b"i am anne", False)
            assert listener.connections == {server}
            body = {"x": [1, None, b"\xff", "é", 2.5]}
            assert await client.call("ask", body) == ["ask", body, b"i am anne"]
            assert await server.call("ask", body) == ["ask", body, b"i am bert"]
            big = os.urandom(8 << 20)
            assert await client.call("ask", big) == ["ask", big, b"i am anne"]
            await client.close()
            assert await server.closed() is None
            assert listener.connections == set()

    run(main)


def test_calls_run_concurrently_and_each_gets_its_own_answer(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        gates: dict[int, asyncio.Event] = {number: asyncio.Event() for number in range(50)}

        async def gated(connection: ControlConnection, kind: str, number: int) -> int:
            await gates[number].wait()
            if number:
                gates[number - 1].set()
            return number * number

        async with joined(gated) as (client, _, _):
            calls = [asyncio.ensure_future(client.call("square", number)) for number in range(50)]
            gates[49].set()  # they end in the reverse order
            assert await asyncio.gather(*calls) == [number * number for number in range(50)]

    run(main)


def test_errors_come_back_as_they_were_raised(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        async with joined(limit=100_000) as (client, server, _):
            with pytest.raises(LoadFailed, match="no source is left for chunk 7"):
                await client.call("fail")
            with pytest.raises(WeightcacheError, match="KeyError: 'what'"):
                await server.call("crash")
            with pytest.raises(ProtocolError, match="a frame holds at most 100000"):
                await client.call("huge", 200_000)
            with pytest.raises(ProtocolError, match="a frame holds at most 100000"):
                await client.call("ask", bytes(200_000))
            assert (await client.call("ask", 1))[1] == 1  # and the connection lives

    run(main)


def test_a_call_that_is_not_answered_ends_in_time_or_with_the_connection(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        async def silent(connection: ControlConnection, kind: str, body: Any) -> None:
            await asyncio.Event().wait()

        async with joined(silent) as (client, server, _):
            with pytest.raises(PeerUnreachable, match=r"did not answer 'ask' within 0\.05 s"):
                await client.call("ask", timeout=0.05)
            waiting = asyncio.ensure_future(client.call("ask"))
            await asyncio.sleep(0)
            await server.close()
            with pytest.raises(PeerUnreachable, match="was lost"):
                await waiting
            with pytest.raises(PeerUnreachable, match="no connection"):
                await client.call("ask")
            client.notify("nobody listens")  # and nobody is bothered

    run(main)


def test_calls_in_flight_are_bounded_at_both_ends(run: Callable[[Main], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        running = most = 0

        async def count(connection: ControlConnection, kind: str, body: Any) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1

        monkeypatch.setattr(control, "MAX_CALLS", 3)
        async with joined(count) as (client, _, _):
            await asyncio.gather(*(client.call("x") for _ in range(40)))
            assert most <= 3
            client._slots = asyncio.Semaphore(100)  # a peer that keeps no bound
            answers = await asyncio.gather(*(client.call("x") for _ in range(40)), return_exceptions=True)
            assert most <= 3
            assert any("3 calls are in flight" in str(answer) for answer in answers)

    run(main)


def test_notices_are_handled_in_order_however_many(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        got: list[int] = []
        done = asyncio.Event()

        async def note(connection: ControlConnection, kind: str, body: Any) -> None:
            await asyncio.sleep(0)
            if body[0] % 100 == 50:
                raise RuntimeError("one bad notice")
            got.append(body[0])
            if body[0] == 2999:
                done.set()

        async with joined(note) as (client, _, _):
            for number in range(3000):  # far more than may wait
                client.notify("n", [number, bytes(1000)])
            await done.wait()
            assert got == [number for number in range(3000) if number % 100 != 50]

    run(main)


def test_a_peer_that_does_not_read_is_cut_off(run: Callable[[Main], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(frame_stream, "MAX_UNREAD", 1 << 20)
        async with joined() as (client, server, _):
            server.stream.pause()
            for _ in range(100):
                client.notify("n", bytes(1 << 20))
            error = await client.closed()
            assert "does not read" in str(error)

    run(main)


def test_a_silent_peer_is_pinged_and_then_given_up(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        async with joined(keepalive=0.05) as (client, server, _):
            with pytest.raises(TimeoutError):  # nothing to say for much longer than a peer may be silent
                await asyncio.wait_for(client.closed(), 0.4)
            server.stream._transport.pause_reading()
            server.stream._timer.cancel()  # as if the peer's host had stopped
            assert "silent for 0.15 s" in str(await client.closed())

    run(main)


@pytest.mark.parametrize("theirs", [b"another", None])
def test_who_does_not_know_the_key_is_told_nothing_and_the_log_names_it_once(
    run: Callable[[Main], None], theirs: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        server = ControlServer("127.0.0.1", 0, KEY, BERT, lambda: b"", echo)
        port = await server.start()
        for _ in range(2):
            with pytest.raises(AuthError, match="cluster key"):
                await connect("127.0.0.1", port, theirs, ANNE, lambda: b"", echo)
        with pytest.raises(ItselfError):
            await connect("127.0.0.1", port, KEY, BERT, lambda: b"", echo)
        _, prober = await asyncio.open_connection("127.0.0.1", port)
        prober.close()
        assert server.connections == set()
        await server.close()

    run(main)
    (line,) = caplog.records
    told = json.loads(JsonLines().format(line))
    assert (told["level"], told["event"], told["peer"]) == ("warning", "peer refused", "127.0.0.1")
    assert "cluster key" in told["why"]


def test_who_cannot_be_talked_to_is_a_clear_error(run: Callable[[Main], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        server = ControlServer("127.0.0.1", 0, KEY, BERT, lambda: b"", echo)
        port = await server.start()
        with pytest.raises(ItselfError):
            await connect("127.0.0.1", port, KEY, BERT, lambda: b"", echo)
        with pytest.raises(ProtocolError, match="was expected"):
            await connect("127.0.0.1", port, KEY, ANNE, lambda: b"", echo, expected=b"carl" * 4)
        with pytest.raises(DaemonError, match=f"port {port} on 127.0.0.1 is in use"):
            await ControlServer("127.0.0.1", port, KEY, BERT, lambda: b"", echo).start()
        with monkeypatch.context() as patch:
            start = Handshake.start

            def start_as_another_version(self: Handshake) -> bytes:
                with monkeypatch.context() as patch:
                    patch.setattr(handshake, "PROTOCOL", 2)
                    return start(self)

            patch.setattr(Handshake, "start", start_as_another_version)
            with pytest.raises(ProtocolError, match=r"peer speaks protocol 1 .* upgrade"):
                await connect("127.0.0.1", port, KEY, ANNE, lambda: b"", echo)
        await server.close()
        with pytest.raises(PeerUnreachable, match=f"127.0.0.1 port {port}: {os.strerror(errno.ECONNREFUSED)}$"):
            await connect("127.0.0.1", port, KEY, ANNE, lambda: b"", echo)

    run(main)


def strangers() -> dict[str, bytes]:
    wrong = Handshake(Link(Role.CLIENT, Port.CONTROL), b"another key", b"x" * 16, b"").start()
    right_for_bulk = Handshake(Link(Role.CLIENT, Port.BULK), KEY, b"x" * 16, b"").start()
    return {
        "http": b"GET / HTTP/1.1\r\n\r\n",
        "zeros": bytes(9000),
        "noise": os.urandom(5000),
        "another key": wrong,
        "for the bulk port": right_for_bulk,
        "nothing": b"",
        "half a hello": wrong[:30],
    }


@pytest.mark.parametrize("first", strangers())
def test_a_stranger_gets_no_byte(run: Callable[[Main], None], first: str) -> None:
    async def main() -> None:
        server = ControlServer("127.0.0.1", 0, KEY, BERT, lambda: b"", echo, handshake=0.2)
        reader, writer = await asyncio.open_connection("127.0.0.1", await server.start())
        writer.write(strangers()[first])
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass
        writer.close()
        await server.close()

    run(main)


def test_strangers_cannot_keep_others_out(run: Callable[[Main], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(control, "MAX_PENDING", 4)
        server = ControlServer("127.0.0.1", 0, KEY, BERT, lambda: b"", echo)
        port = await server.start()
        crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(12)]
        client = await connect("127.0.0.1", port, KEY, ANNE, lambda: b"", echo)
        assert (await client.call("still", "here"))[0] == "still"
        for reader, _ in crowd[:8]:
            assert await reader.read() == b""
        for _, writer in crowd:
            writer.close()
        await client.close()
        await server.close()

    run(main)


def test_a_peer_that_breaks_the_protocol_is_left(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        for frame in ((Kind.ANSWER, 99, None), (Kind.ERROR, 0, "LoadFailed", "x")):
            async with joined() as (client, server, _):
                client.stream.send(*frame)
                assert "never made" in str(await server.closed())
        async with joined() as (client, server, _):
            client.stream._transport.write(os.urandom(100))
            assert isinstance(await server.closed(), ProtocolError)

    run(main)
