"""What crosses the wire and the disk: ids, manifests, snapshots, sets of chunks. Hostile bytes are refused, cheaply."""

from __future__ import annotations

import tracemalloc

import msgpack
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from tests.core.strategies import files, sources
from weightcache.core.bitmap import ChunkSet
from weightcache.core.ids import CHECK_BYTES, ID_BYTES, PLAN_VERSION, blob_id, check, chunk_id
from weightcache.core.layout import CHUNK, ChunkPlan, plan, plan_from_head
from weightcache.core.manifest import Manifest, decode_manifest, decode_plan, encode_manifest, encode_plan
from weightcache.core.snapshot import (
    MAX_SIZE,
    FileEntry,
    Snapshot,
    check_path,
    decode_snapshot,
    encode_snapshot,
    is_blob_id,
    tree_revision,
)
from weightcache.core.source import MAX_SOURCE, Source, parse_source
from weightcache.errors import FormatError


def test_chunk_ids_are_what_every_blake3_gives() -> None:
    assert chunk_id(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert chunk_id(memoryview(b"xabc")[1:]) == blake3(b"abc").digest()
    assert len(check(b"abc")) == CHECK_BYTES
    assert check(b"abc") != check(b"abd")


versions = st.builds("{}:{}".format, st.sampled_from(["etag", "weak", "modified"]), st.text(max_size=9))


@given(sources, sources, versions, versions, st.integers(0, MAX_SIZE), st.integers(0, MAX_SIZE))
def test_a_blob_is_named_by_source_version_and_size(
    one: Source, two: Source, version: str, other: str, size: int, length: int
) -> None:
    names = {
        (str(source), v, s): blob_id(str(source), v, s)
        for source in (one, two)
        for v in (version, other)
        for s in (size, length)
    }
    assert len(set(names.values())) == len(names)
    assert all(is_blob_id(name) for name in names.values())
    content = "sha256:" + "0" * 64
    assert blob_id(str(one), content, size) == blob_id(str(two), content, size)


plans = st.one_of(
    st.builds(lambda file: plan_from_head(file.size, file.head), files),
    st.builds(lambda size: plan(size, None), st.integers(0, 200 * CHUNK)),
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    found = Manifest(draw(st.binary(min_size=ID_BYTES, max_size=ID_BYTES)), draw(plans), checked=draw(st.booleans()))
    for index in draw(st.sets(st.integers(0, len(found) - 1))) if len(found) else ():
        found.learn(index, draw(st.binary(min_size=ID_BYTES, max_size=ID_BYTES)), b"c" * CHECK_BYTES)
    return found


@given(plans)
def test_a_plan_comes_back_the_same(found: ChunkPlan) -> None:
    assert decode_plan(encode_plan(found)) == found


@given(manifests())
def test_a_manifest_comes_back_the_same(manifest: Manifest) -> None:
    found = decode_manifest(encode_manifest(manifest))
    assert (found.blob, found.plan, found.ids, found.checks) == (
        manifest.blob,
        manifest.plan,
        manifest.ids,
        manifest.checks,
    )
    assert found.checked == manifest.checked
    assert found == manifest


def test_a_manifest_completes_itself_and_forgets_lies() -> None:
    manifest = Manifest(b"b" * 32, plan(3 * CHUNK, None))
    assert (manifest.id(0), manifest.complete) == (None, False)
    for index in range(3):
        manifest.learn(index, bytes([index + 1]) * 32)
    assert (manifest.id(0), manifest.complete) == (b"\x01" * 32, True)
    again = Manifest(b"c" * 32, plan(3 * CHUNK, None), bytes(manifest.ids))
    assert again.content() == manifest.content()
    assert again.shared(manifest) == 3 * CHUNK
    again.forget([1])
    assert again.id(1) is None
    assert again.shared(manifest) == 2 * CHUNK
    shorter = Manifest(b"c" * 32, plan(3 * CHUNK - 1, None), bytes(manifest.ids))
    assert shorter.content() != manifest.content()


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    paths = draw(st.sets(sources.map(lambda source: source.path.strip("/")).filter(bool), max_size=5))
    source = draw(sources.filter(lambda source: len(str(source)) <= MAX_SOURCE))
    entries = tuple(
        FileEntry(
            path,
            source,
            draw(versions),
            draw(st.integers(0, MAX_SIZE)),
            draw(st.sampled_from(["", "md5:0"])),
            draw(st.booleans()),
        )
        for path in sorted(paths)
    )
    when = draw(st.floats(0, 1e12))
    return Snapshot(source, "folder", tree_revision(entries), entries, when, draw(st.booleans()), draw(st.booleans()))


@given(snapshots())
def test_a_snapshot_comes_back_the_same(snapshot: Snapshot) -> None:
    assert decode_snapshot(encode_snapshot(snapshot)) == snapshot


@pytest.mark.parametrize(
    "path", ["", "/", "a/", "/a", "a//b", ".", "..", "a/../b", "./a", "a\0b", "a\nb", "\ud800", "a/" * 600, "é" * 600]
)
def test_a_path_that_could_leave_its_snapshot_is_refused(path: str) -> None:
    with pytest.raises(FormatError):
        check_path(path)


ENTRY: list[object] = ["a", "s3://bucket/a", "etag:1", 5, "", True]
FIELDS: list[object] = [1, "s3://bucket/", "folder", "r", [ENTRY], 1.0, False, False]


def changed(original: list[object], index: int, value: object) -> list[object]:
    return [*original[:index], value, *original[index + 1 :]]


@pytest.mark.parametrize(
    "fields",
    [
        *(changed(FIELDS, 4, [changed(ENTRY, 0, path)]) for path in ("../a", "/etc/passwd", "a/./b", 5)),
        *(
            changed(FIELDS, 4, [changed(ENTRY, 1, source)])
            for source in ("/etc/passwd", "s3://", b"s3://bucket/a", None)
        ),
        *(changed(FIELDS, 4, [changed(ENTRY, 2, version)]) for version in ("", "v" * 1025, 5)),
        *(changed(FIELDS, 4, [changed(ENTRY, 3, size)]) for size in (-1, MAX_SIZE + 1, 5.0, True, "5")),
        changed(FIELDS, 4, [changed(ENTRY, 4, "d" * 257)]),
        changed(FIELDS, 4, [ENTRY, ENTRY]),
        changed(FIELDS, 4, [ENTRY[:5]]),
        changed(FIELDS, 4, {"a": 1}),
        *(changed(FIELDS, 2, folder) for folder in ("a/b", "..", "", 5)),
        *(changed(FIELDS, 3, revision) for revision in ("a/b", "..", "")),
        *(changed(FIELDS, 5, when) for when in (float("nan"), float("inf"), "1", True, None)),
        changed(FIELDS, 0, 2),
        FIELDS[:7],
        [],
    ],
)
def test_a_forged_snapshot_is_refused(fields: list[object]) -> None:
    assert decode_snapshot(msgpack.packb(FIELDS)).files[0].source == parse_source("s3://bucket/a")
    with pytest.raises(FormatError):
        decode_snapshot(msgpack.packb(fields))


MANIFEST: list[object] = [1, PLAN_VERSION, b"b" * 32, encode_plan(plan(CHUNK + 1, None)), bytes(64), bytes(32), False]


@pytest.mark.parametrize(
    "fields",
    [
        changed(MANIFEST, 0, 2),
        changed(MANIFEST, 1, PLAN_VERSION + 1),
        changed(MANIFEST, 2, b"b" * 31),
        changed(MANIFEST, 2, "b" * 32),
        changed(MANIFEST, 4, bytes(63)),
        changed(MANIFEST, 4, bytes(96)),
        changed(MANIFEST, 5, bytes(31)),
        *(
            changed(MANIFEST, 3, cut)
            for cut in (
                b"",
                b"\0" * 7,
                b"\0" * 9,
                (5).to_bytes(8, "little"),
                (5).to_bytes(8, "little") + (4).to_bytes(4, "little"),
                (CHUNK + 1).to_bytes(8, "little") + (CHUNK + 1).to_bytes(4, "little"),
                (5).to_bytes(8, "little") + (5).to_bytes(4, "little") + bytes(4),
                b"\xff" * 8 + (CHUNK).to_bytes(4, "little"),
            )
        ),
        MANIFEST[:6],
    ],
)
def test_a_forged_manifest_is_refused(fields: list[object]) -> None:
    assert decode_manifest(msgpack.packb(MANIFEST)).size == CHUNK + 1
    with pytest.raises(FormatError):
        decode_manifest(msgpack.packb(fields))


WHOLE = (encode_manifest(Manifest(b"b" * 32, plan(3 * CHUNK, None))), msgpack.packb(FIELDS))


@given(st.sampled_from(WHOLE), st.data())
def test_damaged_or_random_bytes_raise_nothing_else(whole: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(whole)))
    inserted = data.draw(st.binary(max_size=16))
    kept = data.draw(st.integers(0, 16))
    for damaged in (whole[:at] + inserted + whole[at + kept :], inserted):
        for decode in (decode_manifest, decode_snapshot, decode_plan):
            try:
                decode(damaged)
            except FormatError:
                pass


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\xff\xff\xff\xff" * 100,  # an array of 4 billion
        b"\xdf\xff\xff\xff\xff" * 100,
        b"\xc6\xff\xff\xff\xff" * 100,
        b"\xdd\x00\x01\x86\xa0" * 100_000,  # arrays in arrays, each of the most that are accepted
        b"\x91" * 1_000_000,
        b"\x81\xa1a" * 300_000,
        b"\x98\x01" + b"\xdd\x00\x01\x86\xa0" + b"\xc0" * 100_000,
    ],
)
def test_a_few_bytes_cannot_make_a_decoder_take_much_memory(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        for decode in (decode_manifest, decode_snapshot, decode_plan):
            with pytest.raises(FormatError):
                decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()


@given(st.integers(0, 70), st.lists(st.tuples(st.booleans(), st.integers(0, 80))))
def test_a_chunk_set_is_a_set(size: int, steps: list[tuple[bool, int]]) -> None:
    found, model = ChunkSet(size), set[int]()
    for adds, index in steps:
        if not adds:
            found.discard(index)
            model.discard(index)
        elif index < size:
            found.add(index)
            model.add(index)
        else:
            with pytest.raises(IndexError):
                found.add(index)
    assert list(found) == sorted(model)
    assert list(found.missing()) == sorted(set(range(size)) - model)
    assert len(found) == len(model)
    assert found.is_full == (len(model) == size)
    assert all((index in found) == (index in model) for index in range(-3, 90))
    assert found == ChunkSet(size, model) == ChunkSet.decode(found.encode(), size)
    copied = found.copy()
    copied.discard(min(model, default=0))
    assert list(found) == sorted(model)
    assert list(ChunkSet(size, full=True)) == list(range(size))


@given(st.binary(max_size=10), st.integers(0, 70))
def test_stray_bits_and_wrong_lengths_are_refused(data: bytes, size: int) -> None:
    try:
        found = ChunkSet.decode(data, size)
    except FormatError:
        assert len(data) != (size + 7) // 8 or int.from_bytes(data, "little") >> size
    else:
        assert found.encode() == data
        assert all(index < size for index in found)
