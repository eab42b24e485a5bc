"""Peers, holders and what was learned, on a real Redis server: late, killed, emptied, hostile, or none at all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from tests.servers.redis import RedisServer
from weightcache.address import parse_redis
from weightcache.directory import Member, Registry, View
from weightcache.directory import redis as rules
from weightcache.directory.base import MAX_TAUGHT
from weightcache.directory.redis import RedisDirectory
from weightcache.directory.steady import SteadyDirectory

KEY = b"a cluster's own secret"
PASSWORD = "p@ss:w/rd"
BLOB = b"b" * 32
TTL = 1.0


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


class Host:
    """A directory, and what it was told. ``until`` waits for what shall be true."""

    def __init__(self, url: str, number: int, datacenter: str = "here", key: bytes | None = KEY, port: int = 7000):
        self.directory = RedisDirectory(parse_redis(url), datacenter, key, TTL)
        self.me = Member("127.0.0.1", port + number if port else 0, bytes([number]) * 16, datacenter)
        self.views: list[View] = []

    async def __aenter__(self) -> Host:
        await self.directory.start(self.me, self.views.append)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.directory.close()
        await self.directory.close()  # twice does no harm

    async def sees(self, *others: Host) -> None:
        await until(lambda: self.directory.view() == {other.me for other in others})

    async def finds(self, *others: Host) -> None:
        """Exactly these hold BLOB."""
        await until(lambda: self._holders({other.me for other in others}))

    async def _holders(self, expected: set[Member]) -> bool:
        return set(await self.directory.holders(BLOB, 8)) == expected


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            now = condition()
            if now if isinstance(now, bool) else await now:
                return
            await asyncio.sleep(0.01)


# -- who is alive


async def test_hosts_of_one_cluster_find_each_other_and_nobody_else(server: RedisServer) -> None:
    one, two = Host(server.url, 1), Host(server.url, 2, "there")
    shy, stranger = Host(server.url, 3, port=0), Host(server.url, 4, key=b"another")
    async with one, two, shy, stranger:
        await one.sees(two)
        await two.sees(one)
        await shy.sees(one, two)
        await stranger.sees()
        everything = b"".join(server.call("KEYS", "*") + server.call("GET", key) for key in server.keys("*peer*"))
        assert KEY not in everything
        assert KEY.hex().encode() not in everything
    assert not server.keys("*peer*")  # who leaves says so


async def test_who_leaves_is_gone_at_once_and_who_dies_soon(server: RedisServer) -> None:
    async with Host(server.url, 1) as one:
        async with Host(server.url, 2) as two:
            await one.sees(two)
        await one.sees()
        dying = Host(server.url, 3)
        await dying.directory.start(dying.me, dying.views.append)
        await one.sees(dying)
        assert dying.directory._keeper is not None
        dying.directory._keeper.cancel()  # it says nothing more
        await one.sees()
        await dying.directory._link.close()


async def test_a_look_without_news_brings_a_few_bytes_and_no_host_sees_more_than_its_neighbours(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "NEIGHBOURS", 3)
    async with contextlib.AsyncExitStack() as stack:
        far = [await stack.enter_async_context(Host(server.url, number, "a far one")) for number in range(1, 4)]
        near = [await stack.enter_async_context(Host(server.url, number)) for number in range(4, 7)]
        for host in near:
            others = {other.me for other in near if other is not host}
            await until(lambda host=host, others=others: host.directory.view() > others)  # type: ignore[misc]
            assert len(host.directory.view()) == 3
            digest, views = host.directory._digest, len(host.views)
            await host.directory._look()
            assert (host.directory._digest, len(host.views)) == (digest, views)
        await until(lambda: all(len(host.directory.view()) == 3 for host in far))


async def test_a_server_that_is_killed_costs_news_and_all_is_told_anew(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with Host(server.url, 1) as one, Host(server.url, 2) as two:
        one.directory.announce([BLOB], complete=True)
        await one.sees(two)
        await two.sees(one)
        await two.finds(one)
        server.kill()
        await until(lambda: bool(one.directory.trouble) and bool(two.directory.trouble))
        assert one.directory.view() == {two.me}
        assert await two.directory.holders(BLOB, 8) == []
        assert not await two.directory.teach("manifest:x", b"data")
        views = len(one.views)
        server.start()
        await two.finds(one)
        await one.sees(two)
        assert one.directory.trouble == ""
        assert len(one.views) - views <= 2
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2  # once a host


async def test_a_server_that_comes_back_empty_unnoticed_is_told_anew(server: RedisServer) -> None:
    async with Host(server.url, 1) as one, Host(server.url, 2) as two:
        one.directory.announce([BLOB], complete=False)
        await two.finds(one)
        assert server.call("FLUSHALL") == b"+OK\r\n"
        await two.finds(one)
        await one.sees(two)


async def test_a_server_that_is_emptied_does_not_make_a_host_believe_to_be_alone(server: RedisServer) -> None:
    async with contextlib.AsyncExitStack() as stack:
        hosts = [await stack.enter_async_context(Host(server.url, number)) for number in range(1, 6)]
        looks: list[View] = []
        steady = SteadyDirectory(RedisDirectory(parse_redis(server.url), "here", KEY, TTL))
        await steady.start(Member("127.0.0.1", 7999, b"s" * 16), looks.append)
        everybody = {host.me for host in hosts}
        await until(lambda: steady.view() == everybody)
        for host in hosts[1:]:
            assert host.directory._keeper is not None
            host.directory._keeper.cancel()  # else they would be back too soon to be missed
        assert server.call("FLUSHALL") == b"+OK\r\n"
        await until(lambda: steady.inner.view() <= {hosts[0].me})
        assert steady.view() == everybody
        await steady.close()


# -- who holds what


async def test_holders_are_complete_or_partial_living_and_never_oneself(server: RedisServer) -> None:
    async with Host(server.url, 1) as one, Host(server.url, 2) as two, Host(server.url, 3, "there") as three:
        assert isinstance(one.directory, Registry)
        one.directory.announce([BLOB, b"c" * 32], complete=True)
        two.directory.announce([BLOB], complete=False)
        three.directory.announce([BLOB], complete=True)
        async with Host(server.url, 4) as four:
            four.directory.announce([BLOB], complete=True)
            await two.finds(one, three, four)
            await one.finds(two, three, four)
            assert (await two.directory.holders(BLOB, 1))[0] in (one.me, four.me)  # of the own datacenter, and complete
        await one.finds(two, three)  # the dead have nothing
        two.directory.announce([BLOB], complete=True)
        assert len(await one.directory.holders(BLOB, 8)) == 2
        three.directory.withdraw([BLOB, b"never had" * 4])
        await one.finds(two)


async def test_many_blobs_are_told_in_few_messages(server: RedisServer) -> None:
    blobs = [bytes([number % 256, number // 256]) * 16 for number in range(2 * rules.BATCH)]
    async with Host(server.url, 1) as one, Host(server.url, 2) as two:
        await one.sees(two)
        before = _scripts(server)
        one.directory.announce(blobs, complete=True)
        one.directory.announce(blobs, complete=True)
        await until(lambda: not one.directory._news)
        assert _scripts(server) - before <= 2 + 8  # and some looks of either
        assert [member async for member in _holders(two, blobs)] == [one.me] * len(blobs)


def _scripts(server: RedisServer) -> int:
    line = next(line for line in server.call("INFO", "commandstats").splitlines() if b"cmdstat_evalsha" in line)
    return int(line.split(b"calls=")[1].split(b",")[0])


async def _holders(host: Host, blobs: list[bytes]) -> AsyncIterator[Member]:
    for blob in blobs:
        for member in await host.directory.holders(blob, 4):
            yield member


# -- what was learned


async def test_what_one_teaches_all_of_the_cluster_learn(server: RedisServer) -> None:
    data = os.urandom(3 << 20)
    async with Host(server.url, 1) as one, Host(server.url, 2) as two, Host(server.url, 3, key=b"another") as stranger:
        assert await one.directory.teach("manifest:x", data)
        assert await two.directory.learned("manifest:x") == data
        assert await two.directory.learned("manifest:y") is None
        (key,) = server.keys("*manifest:x")
        stranger.directory._prefix = one.directory._prefix  # it may know that much
        assert await stranger.directory.learned("manifest:x") is None
        value = server.call("GETRANGE", key, "0", "40").split(b"\r\n", 1)[1][:41]
        assert server.call("SETRANGE", key, "40", bytes([value[40] ^ 1])).startswith(b":")
        assert await two.directory.learned("manifest:x") is None  # one bit is another
        other = key.replace("manifest:x", "manifest:z")
        server.call("COPY", key, other)
        assert await two.directory.learned("manifest:z") is None  # nor does it go by another name
        assert not await one.directory.teach("manifest:x", bytes(MAX_TAUGHT + 1))
        assert server.call("EXPIRE", key, "100") == b":1\r\n"
        assert await one.directory.teach("manifest:x", b"again")
        assert await two.directory.learned("manifest:x") == b"again"
        assert int(server.call("TTL", key)[1:]) > 1000


# -- hostile, wrong, or no servers


async def test_what_redis_says_is_bounded_and_checked(server: RedisServer) -> None:
    async with Host(server.url, 1) as one, Host(server.url, 2) as two:
        await one.sees(two)
        prefix = one.directory._prefix
        lies: list[bytes] = [
            b"",
            b"\0\0\0\0",
            b"\xff\xfe",
            b"x" * 1000,
            b"dc\0" + b"a" * 32 + b"\0127.0.0.1\x0099999\x001",
            b"dc\0" + b"b" * 32 + b"\00010.0.0.1;rm -rf\x007000\x001",
            b"dc\0" + b"c" * 32 + b"\x000.0.0.0\x007000\x001",
            b"dc\0" + b"d" * 30 + b"\0127.0.0.1\x007000\x001",
            b"dc\0" + b"e" * 32 + b"\0127.0.0.1\x00-1\x001",
        ]
        for number, lie in enumerate(lies):
            server.call("SET", f"{prefix}peer:{number:032x}", lie)
            server.call("ZADD", f"{prefix}ring", "0", f"here\0{number:032x}")
            server.call("ZADD", f"{prefix}all:{BLOB.hex()}", "99999999999", f"{number:032x}")
        server.call("ZADD", f"{prefix}ring", "0", b"\xff" * 3000)
        server.call("SADD", f"{prefix}peer:{99:032x}", "a set")
        server.call("ZADD", f"{prefix}ring", "0", f"here\0{99:032x}")
        await one.directory._look()
        assert one.directory.view() == {two.me}
        assert await one.directory.holders(BLOB, 8) == []
        server.call("LPUSH", f"{prefix}manifest:x", "a list")
        assert await one.directory.learned("manifest:x") is None
        server.call("SETRANGE", f"{prefix}manifest:y", str(MAX_TAUGHT + 64), "x")
        assert await one.directory.learned("manifest:y") is None
        async with Host(server.url, 3, key=None) as local:  # it has no key, and so dials nothing but loopback
            outside = f"here\0{7:032x}\x0010.0.0.1\x007000\x001"
            server.call("SET", f"{local.directory._prefix}peer:{7:032x}", outside)
            server.call("ZADD", f"{local.directory._prefix}ring", "0", f"here\0{7:032x}")
            await local.directory._look()
            assert local.directory.view() == set()


async def test_a_ring_that_is_none_is_a_line_in_the_status(server: RedisServer) -> None:
    async with Host(server.url, 1) as one:
        prefix = one.directory._prefix
        server.call("DEL", f"{prefix}ring")
        server.call("SET", f"{prefix}ring", "nonsense")
        await until(lambda: "WRONGTYPE" in one.directory.trouble)
        server.call("DEL", f"{prefix}ring")
        await until(lambda: not one.directory.trouble)


@contextlib.asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[int]:
    """The port of a server that says ``answers`` and then nothing more."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while heard := await reader.read(65536):
                for answer in answers:
                    writer.write(answer.replace(b"HEARD", heard))
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield listening.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ((), "no answer within"),
        ((b"HTTP/1.1 400 Bad Request\r\n\r\nHEARD",), "no Redis"),
        ((b"$99999999999\r\n",), "no Redis"),
        ((b"$-7\r\n",), "no Redis"),
        ((b"*1\r\n" * 5000,), "no Redis"),
        ((b"*999999999\r\n" + b":1\r\n" * 100,), "no answer within"),
        ((b"$5\r\nhello\r\n",), "refused"),
        ((b":" + b"9" * 9999 + b"\r\n",), "no Redis"),
        ((b"-ERR unknown command with args HEARD\x1b[2J\r\n",), "see its address, user and password"),
        ((b"-WRONGPASS HEARD\r\n",), "the user or password is refused"),
    ],
    ids=str,
)
async def test_what_is_no_redis_is_named_without_the_password(
    answers: tuple[bytes, ...], why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("weightcache.directory.redis_link.SECONDS", 0.3)
    async with answering(*answers) as port:
        url = f"redis://someone:p%40ss%3Aw%2Frd@127.0.0.1:{port}/0"
        async with Host(url, 1) as host:  # it starts all the same
            await until(lambda: bool(host.directory.trouble))
            _is_clear(host.directory.trouble, f"redis 127.0.0.1:{port}: ", why)
        assert len(caplog.records) == 1
        assert PASSWORD not in caplog.text + str(caplog.records[0].__dict__)
    assert PASSWORD not in repr(parse_redis(url)) + parse_redis(url).public


def _is_clear(trouble: str, begins: str, why: str) -> None:
    assert trouble.startswith(begins)
    assert why in trouble
    assert trouble.isprintable()
    assert len(trouble) < 400
    assert PASSWORD not in trouble


async def test_a_password_that_is_wrong_missing_or_right() -> None:
    with RedisServer(password="secret") as server:
        wrong, none = server.url.replace("secret", "guess"), server.url.replace(":secret@", "")
        for url in (wrong, none):
            async with Host(url, 1) as host:
                await until(lambda host=host: "the user or password is refused" in host.directory.trouble)  # type: ignore[misc]
                assert "guess" not in host.directory.trouble
        async with Host(server.url, 1) as one, Host(server.url, 2) as two:
            await one.sees(two)


async def test_a_server_that_is_not_there_yet(server: RedisServer) -> None:
    server.kill()
    async with Host(server.url, 1) as one:
        _is_clear(one.directory.trouble, f"redis 127.0.0.1:{server.port}: ", "is it running")
        one.directory.announce([BLOB], complete=True)
        server.start()
        async with Host(server.url, 2) as two:
            await two.finds(one)
            await one.sees(two)
