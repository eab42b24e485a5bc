"""The channel between node and bulk process: real sockets, real descriptors, both faces."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from weightcache.core.bitmap import ChunkSet
from weightcache.core.layout import CHUNK, plan
from weightcache.core.manifest import Manifest
from weightcache.errors import FormatError, ProtocolError
from weightcache.net.channel import MAX_FDS, MAX_MESSAGE, Channel, close_all, pair
from weightcache.net.node_channel import ChannelClosed, NodeChannel
from weightcache.net.table import read_table, write_table


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, two = (Channel(sock) for sock in pair())
    yield one, two
    one.close()
    two.close()


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_messages_and_descriptors_cross(ends: tuple[Channel, Channel], tmp_path: Path) -> None:
    one, two = ends
    (tmp_path / "file").write_bytes(b"contents")
    before = open_fds()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    one.send("blob", b"\x00\xff", 7, None, ["é"], {b"k": 1}, fds=(fd,))
    assert open_fds() == before  # ours is closed, theirs is on its way
    message = two.receive()
    assert message is not None
    assert message.fields == ["blob", b"\x00\xff", 7, None, ["é"], {b"k": 1}]
    (theirs,) = message.fds
    assert os.read(theirs, 100) == b"contents"
    assert not os.get_inheritable(theirs)
    close_all(message.fds)
    assert two.receive() is None
    assert not two.ended


def test_what_does_not_fit_waits_in_order(ends: tuple[Channel, Channel]) -> None:
    one, two = ends
    sent = 0
    while one.backlog < 20:
        one.send("n", sent, bytes(MAX_MESSAGE - 100))
        sent += 1
    got: list[int] = []
    while one.backlog or len(got) < sent:
        one.flush()
        while (message := two.receive()) is not None:
            got.append(message.fields[1])
    assert got == list(range(sent))


def test_bounds_are_kept_and_nothing_leaks(ends: tuple[Channel, Channel]) -> None:
    one, two = ends
    before = open_fds()
    with pytest.raises(ProtocolError, match="at most"):
        one.send("x", bytes(MAX_MESSAGE), fds=(os.dup(0),))
    assert open_fds() == before
    many = [os.dup(0) for _ in range(MAX_FDS + 60)]
    one.send("x", fds=many)
    with pytest.raises(ProtocolError, match="descriptors"):
        two.receive()
    assert open_fds() == before


def test_descriptors_that_were_never_sent_or_received_are_closed() -> None:
    before = open_fds()
    one, two = (Channel(sock) for sock in pair())
    while not one.backlog:
        one.send("x", bytes(1 << 16), fds=(os.dup(0),))
    one.send("y", fds=(os.dup(0),))
    one.close()
    two.close()
    assert open_fds() == before


def test_the_end_is_noticed_after_the_last_message(ends: tuple[Channel, Channel]) -> None:
    one, two = ends
    one.send("last")
    one.close()
    message = two.receive()
    assert message is not None
    assert message.fields == ["last"]
    assert two.receive() is None
    assert two.ended
    before = open_fds()
    two.send("too late", fds=(os.dup(0),))
    assert open_fds() == before


@pytest.fixture(params=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if request.param == "uvloop" else None) as runner:
        yield runner


async def joined() -> tuple[NodeChannel, Channel]:
    ours, theirs = pair()
    return NodeChannel(ours), Channel(theirs)


def test_the_node_awaits(runner: asyncio.Runner, tmp_path: Path) -> None:
    async def main() -> None:
        before = open_fds()
        node, process = await joined()
        waiting = asyncio.ensure_future(node.receive())
        process.send("hello", 1)
        message = await asyncio.wait_for(waiting, 5)
        assert message is not None
        assert message.fields == ["hello", 1]
        await node.send("blob", fds=(os.open(tmp_path, os.O_RDONLY),))
        answer = process.receive()
        assert answer is not None
        close_all(answer.fds)
        for number in range(1000):  # more than the node keeps unread
            process.send("n", number)
        process.flush()
        for number in range(1000):
            process.flush()
            message = await asyncio.wait_for(node.receive(), 5)
            assert message is not None
            assert message.fields == ["n", number]
        process.close()
        assert await asyncio.wait_for(node.receive(), 5) is None
        assert await asyncio.wait_for(node.receive(), 5) is None
        with pytest.raises(ChannelClosed):
            await node.send("x", fds=(os.dup(0),))
        node.close()
        assert open_fds() == before

    runner.run(main())


def test_the_node_waits_for_a_process_that_does_not_read(runner: asyncio.Runner) -> None:
    async def main() -> None:
        node, process = await joined()
        sent = 0

        async def fill() -> None:
            nonlocal sent
            while sent < 2000:
                await node.send("n", sent, bytes(60000))
                sent += 1

        filling = asyncio.ensure_future(fill())
        before = -1
        while before < sent:  # until it makes no more progress
            before = sent
            await asyncio.wait([filling], timeout=0.05)
        assert sent < 1000  # it waits
        got = []
        while len(got) < 2000:
            while (message := process.receive()) is not None:
                got.append(message.fields[1])
            await asyncio.sleep(0)
        assert got == list(range(2000))
        await filling
        node.close()
        process.close()

    runner.run(main())


def test_closing_wakes_who_waits(runner: asyncio.Runner) -> None:
    async def main() -> None:
        node, process = await joined()
        process.send("unread", fds=(os.dup(0),))
        waiting = [asyncio.ensure_future(node.receive()) for _ in range(2)]
        message = await asyncio.wait_for(waiting[0], 5)
        assert message is not None
        close_all(message.fds)
        node.close()
        assert await asyncio.wait_for(waiting[1], 5) is None
        process.receive()
        assert process.ended
        process.close()

    runner.run(main())


@pytest.mark.parametrize("chunks", [0, 1, 9, 20000])
def test_a_table_of_any_size_passes_as_a_memory_file(chunks: int) -> None:
    manifest = Manifest(b"b" * 32, plan(chunks * CHUNK, None), os.urandom(32 * chunks), os.urandom(16 * chunks))
    had = ChunkSet(chunks, range(0, chunks, 3))
    fd = write_table(manifest, had)
    try:
        assert read_table(fd) == (manifest, had)
        os.ftruncate(fd, os.fstat(fd).st_size + 1)
        with pytest.raises(FormatError):
            read_table(fd)
        os.ftruncate(fd, 4)
        with pytest.raises(FormatError):
            read_table(fd)
    finally:
        os.close(fd)


def test_the_two_sockets_are_close_on_exec() -> None:
    one, two = pair()
    assert isinstance(one, socket.socket)
    assert not one.get_inheritable()
    assert not two.get_inheritable()
    one.close()
    two.close()
