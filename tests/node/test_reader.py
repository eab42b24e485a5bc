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
from weightcache.node.reader import Reader, _cut

DATA = random.Random(3).randbytes(3_000_000)


@given(st.lists(st.integers(0, 40), max_size=8), st.lists(st.integers(1, 30), max_size=8))
def test_chunks_are_cut_out_of_pieces_as_they_follow(pieces: list[int], chunks: list[int]) -> None:
    ends = [sum(pieces[: number + 1]) for number in range(len(pieces))]
    held = [memoryview(DATA)[end - size : end] for size, end in zip(pieces, ends, strict=True)]
    whole, begin = DATA[: sum(pieces)], 0
    for length in chunks:
        assert b"".join(_cut(held, begin, length)) == whole[begin : begin + length]
        begin += length


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
