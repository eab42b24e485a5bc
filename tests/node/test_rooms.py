"""Memory for reads: used again when all of it has landed, never before; and there is always enough for one to go on."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from weightcache.core.layout import CHUNK
from weightcache.node.arrivals import Arrivals, Whole
from weightcache.node.rooms import Pieces, Rooms

LENGTHS = st.lists(st.integers(1, CHUNK), min_size=1, max_size=7)


def address(view: memoryview) -> int:
    return id(view.obj)


async def test_a_piece_is_used_again_once_all_its_bytes_have_landed() -> None:
    pieces = Pieces(1)
    with Rooms(pieces) as rooms:
        first = await rooms.room(10 * CHUNK)
        assert len(first) == CHUNK
        rooms.landed([first[:10], memoryview(b"from elsewhere")])
        second = await rooms.room(100)
        assert len(second) == 100
        assert address(second) != address(first)
        rooms.landed([first[10:]])
        assert address(await rooms.room(100)) == address(first)


async def test_what_a_failed_read_had_is_not_used_again_and_leaves_room_for_others() -> None:
    pieces = Pieces(1)
    for _ in range(5):
        with Rooms(pieces) as rooms:
            failed = [await rooms.room(CHUNK) for _ in range(3)]
    with Rooms(pieces) as rooms:
        async with asyncio.timeout(10):
            assert not {address(await rooms.room(CHUNK)) for _ in range(3)} & set(map(address, failed))


async def test_a_read_waits_while_others_have_all_there_is() -> None:
    pieces = Pieces(1)
    with Rooms(pieces) as greedy, Rooms(pieces) as other:
        had = [await greedy.room(CHUNK) for _ in range(3)]
        waiting = asyncio.ensure_future(other.room(CHUNK))
        await asyncio.sleep(0)
        assert not waiting.done()
        greedy.landed(had[:1])
        async with asyncio.timeout(10):
            assert address(await waiting) == address(had[0])


@given(st.lists(LENGTHS, min_size=1, max_size=4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_reads_of_any_chunks_all_end(plans: list[list[int]], most: int) -> None:
    """Each read takes room as it needs it, and its chunks land some time after they have come."""
    free = asyncio.Semaphore(most)  # as the planner has it

    async def read(pieces: Pieces, lengths: list[int]) -> int:
        ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
        chunks = [(n, end - length, length, b"") for n, (end, length) in enumerate(zip(ends, lengths, strict=True))]
        arrivals, landings, left, landed = Arrivals(chunks, 0.0), [], ends[-1], [0]
        async with free:
            with Rooms(pieces) as rooms:

                async def land(whole: Whole) -> None:
                    await asyncio.sleep(0)
                    for (_, _, length, _), parts in whole:
                        assert sum(map(len, parts)) == length
                        landed[0] += length
                        rooms.landed(parts)

                while left:
                    room = await rooms.room(left)
                    left -= len(room)
                    await asyncio.sleep(0)
                    if whole := arrivals.add(room, 0.0):  # no time passes: only what is large enough lands early
                        landings.append(asyncio.ensure_future(land(whole)))
                await asyncio.gather(*landings)
        return landed[0]

    async def run() -> None:
        pieces = Pieces(most)
        async with asyncio.timeout(30):
            found = await asyncio.gather(*(read(pieces, lengths) for lengths in plans))
        assert found == [sum(lengths) for lengths in plans]

    asyncio.run(run())
