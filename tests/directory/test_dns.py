"""The addresses of a name, with the host's own resolver, and through changes and failures of one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from weightcache.directory.base import Member, View
from weightcache.directory.dns import DnsDirectory, resolve

ME = Member("10.0.0.1", 7000)


class NameServer:
    """A resolver whose records the test changes; None: it fails."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Iterable[str] | None = addresses
        self.asked = asyncio.Event()

    async def __call__(self, name: str) -> Iterable[str]:
        self.asked.set()
        if self.addresses is None:
            raise OSError(f"{name}: server failure")
        return self.addresses


async def test_the_hosts_own_resolver_knows_localhost() -> None:
    assert "127.0.0.1" in await resolve("localhost")
    told: list[View] = []
    directory = DnsDirectory("localhost", 7000)
    await directory.start(ME, told.append)
    assert Member("127.0.0.1", 7000) in directory.view()
    assert told == [directory.view()]
    await directory.close()
    for name in ("nothing.invalid", "a..b", "x" * 70):
        with pytest.raises(OSError, match="no"):
            await resolve(name)


async def test_changes_are_told_and_oneself_is_left_out() -> None:
    server, told = NameServer("10.0.0.1", "10.0.0.2"), asyncio.Queue[View]()
    directory = DnsDirectory("fleet", 7000, interval=0.01, resolve=server)
    await directory.start(ME, told.put_nowait)
    assert await told.get() == {Member("10.0.0.2", 7000)}
    server.addresses = ("10.0.0.3", "10.0.0.2")
    assert await asyncio.wait_for(told.get(), 5) == {Member("10.0.0.2", 7000), Member("10.0.0.3", 7000)}
    await directory.close()


async def test_a_failed_lookup_keeps_the_view_and_a_later_one_is_believed() -> None:
    server, told = NameServer("10.0.0.2"), asyncio.Queue[View]()
    directory = DnsDirectory("fleet", 7000, interval=0.01, resolve=server)
    await directory.start(ME, told.put_nowait)
    before = await told.get()
    server.addresses = None
    for _ in range(3):
        server.asked.clear()
        await asyncio.wait_for(server.asked.wait(), 5)
    assert directory.view() == before
    assert told.empty()
    server.addresses = ()
    assert await asyncio.wait_for(told.get(), 5) == frozenset()
    await directory.close()


async def test_a_name_that_fails_from_the_start_delays_nobody_and_close_stops_the_asking() -> None:
    server = NameServer()
    server.addresses = None
    directory = DnsDirectory("fleet", 7000, interval=0.01, resolve=server)
    await asyncio.wait_for(directory.start(ME, lambda view: None), 5)
    assert directory.view() == frozenset()
    await directory.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "dns fleet"]


async def test_a_resolver_that_hangs_holds_the_start_up_no_longer_than_one_interval() -> None:
    async def hang(name: str) -> Iterable[str]:
        await asyncio.Event().wait()
        raise AssertionError

    directory = DnsDirectory("fleet", 7000, interval=0.05, resolve=hang)
    await asyncio.wait_for(directory.start(ME, lambda view: None), 5)
    await directory.close()
