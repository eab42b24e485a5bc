"""What is published: the same bytes whoever does it, and nothing else is believed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcache.core.ids import chunk_id
from weightcache.core.layout import CHUNK, plan
from weightcache.core.manifest import Manifest
from weightcache.core.published import (
    SUFFIX,
    beside,
    check_head,
    decode_published,
    encode_published,
    is_worth,
    without_published,
)
from weightcache.core.snapshot import FileEntry
from weightcache.core.source import parse_source
from weightcache.errors import FormatError

SIZE = 20 << 20
ENTRY = FileEntry("model.bin", parse_source("s3://bucket/model.bin"), "etag:1", SIZE)


def whole() -> Manifest:
    cut = plan(SIZE, None)
    ids = b"".join(chunk_id(bytes([index])) for index in range(len(cut)))
    return Manifest(ENTRY.blob, cut, ids, b"\1" * 16 * len(cut), checked=True)


def test_what_a_host_knows_besides_the_ids_is_not_published() -> None:
    data = encode_published(ENTRY, whole())
    assert data == encode_published(ENTRY, Manifest(ENTRY.blob, whole().plan, bytes(whole().ids)))
    found = decode_published(data, ENTRY)
    assert (found.ids, list(found.plan), found.checked) == (whole().ids, list(whole().plan), False)


@given(st.binary(max_size=400), st.integers(0, 2000), st.integers(0, 2000))
def test_damage_is_a_format_error_or_harmless(noise: bytes, begin: int, length: int) -> None:
    data = encode_published(ENTRY, whole())
    spoilt = data[:begin] + noise + data[begin + length :]
    try:
        found = decode_published(spoilt, ENTRY)
    except FormatError:
        return
    assert found.blob == ENTRY.blob
    assert found.complete


@pytest.mark.parametrize(
    "other",
    [
        replace(ENTRY, version="etag:2"),
        replace(ENTRY, size=SIZE + 1),
        replace(ENTRY, source=parse_source("s3://b-b/x")),
    ],
)
def test_another_version_or_object_is_refused(other: FileEntry) -> None:
    with pytest.raises(FormatError):
        decode_published(encode_published(ENTRY, whole()), other)


def test_a_copy_with_the_same_digest_is_the_same_object() -> None:
    here = replace(ENTRY, version="sha256:" + "0" * 64)
    manifest = Manifest(here.blob, whole().plan, bytes(whole().ids))
    there = replace(here, source=parse_source("hf://org/name@main/model.bin"))
    assert decode_published(encode_published(here, manifest), there).ids == manifest.ids


def test_a_head_that_is_another_one_is_noticed() -> None:
    manifest = whole()
    head = bytes(CHUNK)
    with pytest.raises(FormatError, match="header"):
        check_head(manifest, manifest.plan, head)
    manifest.learn(0, chunk_id(head))
    check_head(manifest, manifest.plan, head)
    with pytest.raises(FormatError, match="chunks"):
        check_head(manifest, plan(SIZE // 2, None), head)


def test_a_tree_is_without_what_was_published_beside_its_files() -> None:
    def entry(path: str) -> FileEntry:
        return replace(ENTRY, path=path, source=parse_source(f"s3://bucket/{path}"))

    paths = ["a.bin", f"a.bin{SUFFIX}", f"b.bin{SUFFIX}", f"a.bin{SUFFIX}{SUFFIX}", SUFFIX]
    assert [entry.path for entry in without_published(map(entry, paths))] == ["a.bin", f"b.bin{SUFFIX}", SUFFIX]
    assert beside(ENTRY.source) == parse_source(f"s3://bucket/model.bin{SUFFIX}")


@pytest.mark.parametrize(
    ("entry", "worth"), [(ENTRY, True), (replace(ENTRY, size=1000), False), (replace(ENTRY, version="once:1"), False)]
)
def test_only_large_files_that_have_versions_are_worth_it(entry: FileEntry, worth: bool) -> None:
    assert is_worth(entry) is worth
