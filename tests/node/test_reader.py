"""What a read brings lies in pieces, of any size; chunks are cut out of them and land from where they lie."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcache.core.ids import check, chunk_id
from weightcache.core.landing import ChunkMismatch, land
from weightcache.net.node_channel import NodeChannel
from weightcache.node.arrivals import TOGETHER, TOGETHER_SECONDS, Arrivals, Chunk
from weightcache.node.reader import Reader

DATA = random.Random(3).randbytes(3_000_000)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_chunks_are_cut_out_of_pieces_as_they_follow(lengths: list[int], data: st.DataObject) -> None:
    chunks = [(index, sum(lengths[:index]), length, b"") for index, length in enumerate(lengths)]
    arrivals, landed, at, now = Arrivals(chunks, 0.0), list[Chunk](), 0, 0.0
    while at < sum(lengths):
        size = data.draw(st.integers(1, sum(lengths) - at))
        now += data.draw(st.sampled_from([0.0, 2 * TOGETHER_SECONDS]))
        for chunk, pieces in arrivals.add(memoryview(DATA)[at : at + size], now):
            assert b"".join(pieces) == DATA[chunk[1] : chunk[1] + chunk[2]]
            assert chunk[1] + chunk[2] <= at + size
            landed.append(chunk)
        at += size
    assert landed == chunks


def test_what_is_whole_lands_when_it_is_enough_or_has_waited() -> None:
    def lengths(*pieces: tuple[int, float]) -> list[list[int]]:
        arrivals = Arrivals([(index, 10 * index, 10, b"") for index in range(4)], 0.0)
        return [[chunk[2] for chunk, _ in arrivals.add(memoryview(DATA)[:size], now)] for size, now in pieces]

    late = 2 * TOGETHER_SECONDS
    assert lengths((15, 0.0), (10, 0.0), (15, 0.0)) == [[], [], [10] * 4]  # all at once, and soon: together
    assert lengths((15, late), (10, late), (5, 2 * late), (10, 2 * late)) == [[10], [], [10, 10], [10]]
    large = Arrivals([(0, 0, TOGETHER, b""), (1, TOGETHER, 1, b"")], 0.0)
    assert [chunk[0] for chunk, _ in large.add(memoryview(bytes(TOGETHER)), 0.0)] == [0]


def test_a_chunk_in_pieces_lands_as_one_in_one(tmp_path: Path) -> None:
    pieces = [DATA[:1_000_001], DATA[1_000_001:1_000_002], DATA[1_000_002:]]
    with open(tmp_path / "blob", "w+b") as file:
        assert land(file.fileno(), 5, pieces, chunk_id(DATA)) == (chunk_id(DATA), check(DATA))
        assert os.pread(file.fileno(), len(DATA), 5) == DATA


def test_nothing_is_written_of_a_chunk_whose_last_piece_is_wrong(tmp_path: Path) -> None:
    with open(tmp_path / "blob", "w+b") as file:
        with pytest.raises(ChunkMismatch):
            land(file.fileno(), 0, [DATA[:2_000_000], DATA[:1_000_000]], chunk_id(DATA))
        assert not os.fstat(file.fileno()).st_size


async def test_what_is_cancelled_before_it_begins_is_closed() -> None:
    """Else Python itself says on stderr, in the middle of the log, that it was never awaited."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader = Reader(NodeChannel(theirs))

    async def read() -> None:
        raise AssertionError("it was cancelled")

    async def resolve() -> bytes:
        raise AssertionError("it was cancelled")

    reading, resolving = read(), resolve()
    reader._start(1, reading)
    reader._call(2, resolving)
    tasks = [*reader._tasks.values(), *reader._calls]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [inspect.getcoroutinestate(work) for work in (reading, resolving)] == [inspect.CORO_CLOSED] * 2
    ours.close()
    theirs.close()
