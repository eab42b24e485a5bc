"""The node's side of its senders: real ones, and peers written by hand."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.net.bulk import KEY, SENDER, Talker, eventually, read_to_end
from tests.store.support import Content, content, fill
from weightcache.address import Address
from weightcache.core.pace import BURST
from weightcache.core.wire import Kind
from weightcache.node import serving
from weightcache.node.serving import Serving
from weightcache.store import Store

MIB = 1 << 20
LOCAL = "127.0.0.1"


@pytest.fixture(scope="module")
def made() -> Content:
    return content("served", 24 * MIB, chunk=MIB)


@asynccontextmanager
async def served(
    made: Content, folder: Path, count: int, bandwidth: int | None = None
) -> AsyncIterator[tuple[Serving, int]]:
    """A node's senders, that may serve what ``made`` is; and their port."""
    store = Store.open(folder / "store")
    fill(store, made)
    serving = Serving(store, {"key": KEY, "node_id": SENDER}, count, bandwidth)
    try:
        yield serving, serving.listen(Address(LOCAL, 0))
    finally:
        await serving.close()
        store.close()


def fetch(port: int, made: Content, chunks: Iterable[int]) -> bytes:
    """Some chunks, as a peer gets them over one connection."""
    found = b""
    with Talker.dial(port) as peer:
        for index in chunks:
            peer.send(Kind.GET, index, made.blob, index)
            assert peer.frame().kind is Kind.DATA
            found += peer.raw()
    return found


async def test_a_cap_is_shared_by_the_senders_that_it_is_worth(
    made: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = 20_000_000
    monkeypatch.setattr(serving, "LEAST_SHARE", rate // 2)
    async with served(made, tmp_path, 4, rate) as (senders, port):
        await asyncio.gather(*(asyncio.to_thread(fetch, port, made, [0]) for _ in range(2)))  # both are up
        assert len([process for process in senders.processes if process.running]) == 2
        began = time.monotonic()
        both = await asyncio.gather(*(asyncio.to_thread(fetch, port, made, range(first, 24, 2)) for first in (0, 1)))
        assert time.monotonic() - began >= len(made.data) / rate - 2 * BURST
        assert [part for pair in zip(*map(parts, both), strict=True) for part in pair] == parts(made.data)


def parts(data: bytes) -> list[bytes]:
    return [data[at : at + MIB] for at in range(0, len(data), MIB)]


async def test_a_sender_that_hangs_holds_up_nobody_else(
    made: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "UNTAKEN", 3)
    async with served(made, tmp_path, 2) as (senders, port):
        for index in range(2):
            assert await asyncio.to_thread(fetch, port, made, [index]) == parts(made.data)[index]
        first = senders.processes[0].pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        crowd = []
        for index in range(5):  # they take turns
            crowd.append(await asyncio.to_thread(socket.create_connection, (LOCAL, port)))
            assert await asyncio.to_thread(fetch, port, made, [index]) == parts(made.data)[index]
        assert [await asyncio.to_thread(read_to_end, sock) for sock in crowd[3:]] == [b"", b""]  # not kept for it
        os.kill(first, signal.SIGCONT)
        for sock in crowd:
            sock.close()


async def test_a_sender_that_dies_is_replaced_and_the_port_stays_open(made: Content, tmp_path: Path) -> None:
    async with served(made, tmp_path, 1) as (senders, port):
        assert await asyncio.to_thread(fetch, port, made, [0]) == parts(made.data)[0]
        (process,) = senders.processes
        before = process.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        (await asyncio.to_thread(socket.create_connection, (LOCAL, port))).close()  # it is not refused
        await asyncio.to_thread(eventually, lambda: process.pid not in (before, None), "no sender is started")
        assert await asyncio.to_thread(fetch, port, made, [1]) == parts(made.data)[1]
