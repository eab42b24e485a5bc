"""The chunk plan, and the header it comes from."""

from __future__ import annotations

import json
import random
import struct
from itertools import pairwise

import pytest
import safetensors
from hypothesis import example, given
from hypothesis import strategies as st

from tests.core.strategies import Shaped, dtypes, file_of, files, head_of, lengths
from weightcache.core.ids import chunk_id
from weightcache.core.layout import (
    CHUNK,
    CUT,
    DTYPE_BITS,
    MAX_HEADER,
    ChunkPlan,
    check_cover,
    head_length,
    parse_header,
    plan,
    plan_from_head,
)
from weightcache.errors import FormatError

TENSOR = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def assert_covers(found: ChunkPlan, size: int) -> None:
    """Every byte lies in exactly one chunk, and no chunk is empty or too large."""
    at = 0
    for offset, length in found:
        assert offset == at
        assert 0 < length <= CHUNK
        at += length
    assert at == size == found.size


@given(files)
@example(file_of([]))
@example(file_of([0, 0]))
@example(file_of([CUT - 1] * 9))
@example(file_of([CHUNK, CHUNK + 1, 2 * CHUNK, 1]))
@example(file_of([5], padding=2 * CHUNK))
def test_tensors_decide_where_a_file_is_cut(file: Shaped) -> None:
    found = plan_from_head(file.size, file.head)
    assert_covers(found, file.size)
    starts = set(found.starts)
    assert file.data_start in starts or file.data_start == file.size
    begin = file.data_start
    for _, length in file.tensors:
        inside = sorted(start - begin for start in starts if begin <= start < begin + length)
        if length >= CUT:
            assert inside == list(range(0, length, CHUNK))
        else:
            assert inside in ([], [0])  # small ones ride whole
        begin += length
    # Nothing is cut without need: a chunk ends where a large tensor or the data begins, or because no more would fit.
    large, ends = {file.data_start, file.size}, {}
    begin = file.data_start
    for _, length in file.tensors:
        ends[begin] = begin + length
        if length >= CUT:
            large |= set(range(begin, begin + length, CHUNK))
        begin += length
    for start, following in pairwise([*found.starts, file.size]):
        assert following in large or following < file.data_start or ends[following] - start > CHUNK


@given(lengths, st.integers(0, 9), st.integers(0, 9), st.integers(0, 300))
def test_the_plan_depends_on_no_order_of_names(lengths: list[int], one: int, two: int, padding: int) -> None:
    first = file_of(lengths, shuffled=one, padding=padding)
    second = file_of(lengths, shuffled=two, padding=padding)
    assert plan_from_head(first.size, first.head) == plan_from_head(second.size, second.head)


@given(lengths, lengths, lengths, st.integers(CUT, 40 * CHUNK))
def test_a_large_tensor_is_cut_alike_wherever_it_lies(
    before: list[int], between: list[int], after: list[int], length: int
) -> None:
    def relative(front: list[int]) -> list[int]:
        file = file_of([*front, length, *after])
        begin = file.data_start + sum(front)
        return [start - begin for start in plan_from_head(file.size, file.head).starts if 0 <= start - begin < length]

    assert relative(before) == relative([*before, *between]) == relative([])


def test_the_same_tensors_at_another_offset_have_the_same_chunk_ids() -> None:
    """On real bytes: what a fine-tune shares with its base is found by id, whatever came in between."""
    noise = random.Random(7)
    denoiser, small, decoder = noise.randbytes(CHUNK + CUT), noise.randbytes(1000), noise.randbytes(CHUNK + 5)

    def ids(*tensors: bytes) -> list[bytes]:
        file = file_of([len(tensor) for tensor in tensors], padding=len(tensors))
        data = memoryview(file.head + b"".join(tensors))
        return [chunk_id(data[offset : offset + length]) for offset, length in plan_from_head(len(data), file.head)]

    base = ids(denoiser, small, decoder)
    assert len(base) == 5  # head; a chunk and the rest with the small one; a chunk and 5 bytes
    tuned = ids(small, decoder, noise.randbytes(CUT), denoiser, small)
    assert set(base) - set(tuned) == {base[0]}


def test_a_tensor_that_is_cut_and_those_that_ride_behind_it() -> None:
    file = file_of([CHUNK + CUT // 2, 100, CUT - 1, CUT])
    start = file.data_start
    found = list(plan_from_head(file.size, file.head))
    assert found == [
        (0, start),
        (start, CHUNK),
        (start + CHUNK, CUT // 2 + 100 + CUT - 1),
        (start + CHUNK + CUT // 2 + 100 + CUT - 1, CUT),
    ]


@given(st.integers(0, 10 * CHUNK), st.none() | st.binary(max_size=64))
@example(0, None)
@example(CHUNK, None)
def test_what_is_no_safetensors_is_cut_at_regular_offsets(size: int, head: bytes | None) -> None:
    found = plan_from_head(size, head)
    assert_covers(found, size)
    assert list(found.starts) == list(range(0, size, CHUNK))


def broken(file: Shaped, **changes: object) -> bytes:
    """The head of ``file`` with the first tensor's entry changed."""
    fields = json.loads(file.head[8:])
    fields["t0"] |= changes
    return head_of(fields)


WRONG_OFFSETS: list[object] = [[0], [0, 2, 2], "ab", {"0": 1, "1": 2}, None]
WRONG_OFFSETS += [[0, end] for end in (-1, 2.0, True, "2", 1 << 64, [2])]
WRONG_SHAPES: list[object] = [[-1], [2.0], [True], ["2"], [1 << 64], 2, "2", {}]


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 8 + b"{}",
        struct.pack("<Q", MAX_HEADER + 1) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
        head_of([]),
        head_of({"a": 5}),
        head_of({"a": "dtype"}),
        head_of({"a": {"dtype": "U8", "shape": [2]}}),
        head_of({"__metadata__": {"a": 1}, "t": TENSOR}),
        head_of({"__metadata__": [], "t": TENSOR}),
        head_of({"a\ud800": TENSOR}),
        head_of({"__metadata__": {"a": "\udfff"}, "t": TENSOR}),
        head_of({"t": TENSOR | {"more": float("nan")}}),
        *(head_of({"t": TENSOR | {"data_offsets": wrong}}) for wrong in WRONG_OFFSETS),
        *(head_of({"t": TENSOR | {"shape": wrong}}) for wrong in WRONG_SHAPES),
        head_of({"t": TENSOR | {"dtype": 8}}),
        b"%b" % struct.pack("<Q", 100_001) + b'{"a":' + b"[" * 99_996,
        b"%b" % struct.pack("<Q", 10_006) + b'{"a":' + b"9" * 10_000 + b"}",
        struct.pack("<Q", 23) + b'{"a":{"a":1,"a":2}    }',
    ],
)
def test_a_hostile_head_is_refused_and_the_file_still_has_a_plan(head: bytes) -> None:
    with pytest.raises(FormatError):
        parse_header(head)
    assert plan_from_head(3 * CHUNK + 1, head) == plan(3 * CHUNK + 1, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"a": TENSOR, "b": TENSOR},  # overlap
        {"a": TENSOR, "b": TENSOR | {"data_offsets": [1, 3]}},
        {"a": TENSOR, "b": TENSOR | {"data_offsets": [3, 5]}},  # gap
        {"a": TENSOR | {"data_offsets": [1, 3]}},
        {"a": TENSOR | {"data_offsets": [2, 0]}},  # backwards
        {"a": TENSOR | {"data_offsets": [0, (1 << 63) - 1], "shape": [(1 << 63) - 1]}},
        {},
    ],
)
def test_tensors_that_do_not_tile_the_file_cut_nothing(fields: dict[str, object]) -> None:
    head = head_of(fields)
    size = len(head) + 2 * CHUNK
    assert plan_from_head(size, head) == plan(size, None)
    with pytest.raises(FormatError):
        check_cover(parse_header(head), size)


def test_a_shape_without_end_is_refused_quickly() -> None:
    head = head_of({"t": {"dtype": "U8", "shape": [(1 << 63) - 1] * 200_000, "data_offsets": [0, 0]}})
    with pytest.raises(FormatError, match="overflow"):
        check_cover(parse_header(head), len(head))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": dtypes | json_values,
        "shape": st.lists(st.integers(-1, 300), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 1 << 65), min_size=2, max_size=2) | json_values,
    },
)


@given(
    st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=4),
    st.integers(0, 1 << 40),
)
def test_no_head_raises_anything_else_and_every_file_is_covered(fields: dict[str, object], beyond: int) -> None:
    head = head_of(fields)
    try:
        check_cover(parse_header(head), len(head) + beyond)
    except FormatError:
        pass
    beyond %= 64 * CHUNK
    assert_covers(plan_from_head(len(head) + beyond, head), len(head) + beyond)


@given(st.binary(max_size=40), st.integers(0, 1 << 50))
def test_the_length_of_a_head_is_believed_only_if_it_can_be_true(prefix: bytes, size: int) -> None:
    found = head_length(prefix, size)
    assert found is None or 10 <= found <= min(size, MAX_HEADER + 8)


def test_the_length_of_a_real_head() -> None:
    file = file_of([5, 6])
    assert head_length(file.head[:9], file.size) == len(file.head)
    assert head_length(file.head[:8], file.size) is None
    assert head_length(file.head[:9], len(file.head) - 1) is None


def verdicts(data: bytes) -> tuple[bool, bool]:
    """Whether we accept a file, and whether the real library does."""
    try:
        check_cover(parse_header(data), len(data))
        ours = True
    except FormatError:
        ours = False
    try:
        safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        theirs = True
    except safetensors.SafetensorError:
        theirs = False
    return ours, theirs


@st.composite
def small_files(draw: st.DrawFn) -> bytes:
    """A safetensors file of a few small tensors of any dtype, often with something wrong in one of them."""
    fields: dict[str, object] = {}
    at = 0
    for number in range(draw(st.integers(0, 4))):
        dtype, shape = draw(dtypes), draw(st.lists(st.integers(0, 5), max_size=3))
        bits = DTYPE_BITS[dtype]
        for extent in shape:
            bits *= extent
        end = at + bits // 8
        fields[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    if draw(st.booleans()) and fields:
        entry = fields[draw(st.sampled_from(sorted(fields)))]
        assert isinstance(entry, dict)
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        numbers = st.integers(-2, 40) | st.sampled_from([1 << 32, (1 << 63) - 1, 1 << 64])
        wrong: dict[str, st.SearchStrategy[object]] = {
            "dtype": dtypes | st.just("Q8"),
            "shape": st.lists(numbers, max_size=4),
            "data_offsets": st.lists(numbers, min_size=1, max_size=3),
        }
        entry[key] = draw(wrong[key])
    if draw(st.booleans()):
        values = st.text(max_size=3) | st.integers()
        metadata: st.SearchStrategy[object] = st.none() | st.dictionaries(st.text(max_size=3), values)
        fields["__metadata__"] = draw(metadata)
    size = max(0, at + draw(st.sampled_from([0, 0, 0, 1, -1])))
    return head_of(fields, draw(st.integers(0, 8))) + bytes(size)


@given(small_files())
def test_what_safetensors_accepts_is_accepted_and_nothing_else(data: bytes) -> None:
    ours, theirs = verdicts(data)
    assert ours == theirs


@given(small_files(), st.data())
def test_a_damaged_header_is_accepted_only_where_safetensors_does(data: bytes, draw: st.DataObject) -> None:
    (length,) = struct.unpack_from("<Q", data)
    at = draw.draw(st.integers(8, 7 + length))
    damaged = (
        data[:at]
        + draw.draw(st.sampled_from([b"{", b"}", b'"', b",", b"9", b"0", b" ", b"\\", b"\xff"]))
        + data[at + 1 :]
    )
    ours, theirs = verdicts(damaged)
    assert theirs or not ours
