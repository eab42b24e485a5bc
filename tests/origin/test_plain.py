"""Plain HTTP in threads: connections are used again, and a read that is given up holds nothing up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers.loop import wait_until
from tests.servers.nginx import NginxServer
from tests.servers.proxy import FaultProxy
from weightcache.core.source import parse_source
from weightcache.origin import Origins
from weightcache.origin.base import read_whole

Make = Callable[..., Origins]
BODY = random.Random(5).randbytes(3_000_001)


@pytest.fixture(autouse=True)
def body(served: Path) -> None:
    (served / "plain.bin").write_bytes(BODY)


def connections(port: int) -> int:
    """Connections to a port of this host that are established, seen from the client's end."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[2].endswith(f":{port:04X}") and line[3] == "01" for line in lines)


async def test_reads_one_after_the_other_share_a_connection(nginx: NginxServer, origins: Make) -> None:
    ours = origins()
    (entry,) = (await ours.resolve(parse_source(nginx.url("plain.bin")))).files
    for begin in range(0, 3_000_000, 500_000):
        assert await read_whole(ours, entry, begin, begin + 500_000) == BODY[begin : begin + 500_000]
    assert connections(nginx.port) == 1
    await asyncio.gather(*(read_whole(ours, entry, 0, 1000) for _ in range(4)))
    assert 1 <= connections(nginx.port) <= 4


async def test_an_idle_connection_that_the_server_has_closed_is_replaced(nginx: NginxServer, origins: Make) -> None:
    ours = origins()
    with FaultProxy(nginx.port) as proxy:
        (entry,) = (await ours.resolve(parse_source(f"http://127.0.0.1:{proxy.port}/plain/plain.bin"))).files
        assert await read_whole(ours, entry, 5, 10) == BODY[5:10]
        proxy.refuse()
        proxy.accept()
        assert await read_whole(ours, entry, 10, 20) == BODY[10:20]


async def test_a_read_that_is_given_up_frees_its_thread_at_once(nginx: NginxServer, origins: Make) -> None:
    ours = origins(streams=1, timeout=60.0)
    with FaultProxy(nginx.port) as proxy:
        (entry,) = (await ours.resolve(parse_source(f"http://127.0.0.1:{proxy.port}/plain/plain.bin"))).files
        proxy.stall("plain.bin", after=100_000)
        buffer = memoryview(bytearray(len(BODY)))

        async def room(size: int) -> memoryview:
            return buffer

        reading = asyncio.ensure_future(ours.read(entry, 0, len(BODY), room, lambda piece: None))
        async with asyncio.timeout(10):
            await asyncio.to_thread(wait_until, lambda: buffer[99_000] == BODY[99_000], what="the middle of the body")
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            proxy.heal()
            assert await read_whole(ours, entry, 0, len(BODY)) == BODY
