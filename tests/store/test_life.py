"""A blob's life: reserved, landed, complete, stored once, found by its chunks, forgotten."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

import pytest

from tests.store.support import CHUNK, content, fill
from weightcache.core.ids import blob_id, check, chunk_id
from weightcache.core.landing import ChunkMismatch
from weightcache.core.manifest import Manifest
from weightcache.errors import StoreError, UnknownBlob
from weightcache.store import Store

Opener = Callable[..., Store]


def test_space_is_reserved_before_the_first_byte(store: Store) -> None:
    made = content("model", 1_000_000)
    info = store.create(made.manifest(), "model")
    found = store.path(made.blob).stat()
    assert (info.state, info.had_bytes, found.st_size) == ("partial", 0, 1_000_000)
    assert found.st_blocks * 512 >= 1_000_000
    assert stat.S_IMODE(found.st_mode) == 0o444
    assert store.used == 1_000_000


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK * 32, CHUNK * 33 + 1, CHUNK * 64 - 1])
def test_a_landed_blob_is_complete_and_byte_exact_after_a_restart(open_store: Opener, size: int) -> None:
    made = content("model", size)
    store = open_store()
    completed = fill(store, made)
    assert completed == (size > 0)
    store.close()
    store = open_store()
    info = store.info(made.blob)
    assert info is not None
    assert (info.state, info.had_bytes, info.name) == ("complete", size, made.source)
    assert store.path(made.blob).read_bytes() == made.data
    assert list(store.had(made.blob)) == list(range(len(made.plan)))
    manifest = store.manifest(made.blob)
    assert manifest is not None
    assert manifest.ids == made.manifest(known=True).ids
    assert all(manifest.check(index) == check(made.bytes_of(index)) for index in range(len(made.plan)))


def test_a_partial_blob_resumes_where_it_was(open_store: Opener) -> None:
    made = content("model", CHUNK * 100 + 7)
    first = [*range(0, 100, 3), 100]
    store = open_store()
    fill(store, made, first)
    store.close()
    store = open_store()
    info = store.create(made.manifest(), "model")
    assert (info.state, sorted(store.had(made.blob))) == ("partial", first)
    assert info.had_bytes == sum(made.plan.span(index)[1] for index in first)
    assert fill(store, made, store.had(made.blob).missing())
    assert store.path(made.blob).read_bytes() == made.data


def test_record_completes_once_and_repeats_change_nothing(store: Store) -> None:
    made = content("model", CHUNK * 2)
    fill(store, made, [0])
    rows = [(index, chunk_id(made.bytes_of(index)), check(made.bytes_of(index))) for index in (0, 1)]
    assert not store.record(made.blob, [rows[0]])
    assert store.record(made.blob, rows)
    assert not store.record(made.blob, rows)
    assert store.used == CHUNK * 2


def test_a_chunk_known_by_another_id_is_refused_with_its_whole_batch(open_store: Opener) -> None:
    made = content("model", CHUNK * 3)
    store = open_store()
    store.create(made.manifest(known=True), "model")
    good = (0, chunk_id(made.bytes_of(0)), check(made.bytes_of(0)))
    with pytest.raises(ChunkMismatch, match="chunk 2 of model"):
        store.record(made.blob, [good, (2, chunk_id(b"forged"), check(b"forged"))])
    assert list(store.had(made.blob)) == []
    with pytest.raises(IndexError):
        store.record(made.blob, [good, (3, good[1], good[2])])
    store.close()
    assert list(open_store().had(made.blob)) == []


def test_ids_are_learned_from_peers_and_conflicts_are_told(open_store: Opener) -> None:
    made = content("model", CHUNK * 4)
    store = open_store()
    fill(store, made, [1])
    theirs = made.manifest(known=True)
    theirs.learn(1, chunk_id(b"another's"))
    assert store.merge_ids(made.blob, theirs) == [1]
    store.close()
    known = open_store().manifest(made.blob)
    assert known == _with_check(made.manifest(known=True), 1, made.bytes_of(1))


def _with_check(manifest: Manifest, index: int, data: bytes) -> Manifest:
    manifest.learn(index, chunk_id(data), check(data))
    return manifest


def test_a_manifest_cut_differently_is_refused(store: Store) -> None:
    made, other = content("model", CHUNK * 4), content("model", CHUNK * 4, chunk=CHUNK * 2)
    store.create(made.manifest(), "model")
    with pytest.raises(StoreError, match="cut differently"):
        store.create(other.manifest(), "model")


def test_what_the_store_gives_out_is_a_copy(store: Store) -> None:
    made = content("model", CHUNK * 2)
    fill(store, made, [0])
    manifest = store.manifest(made.blob)
    assert manifest is not None
    manifest.forget([0])
    store.had(made.blob).add(1)
    assert list(store.had(made.blob)) == [0]
    again = store.manifest(made.blob)
    assert again is not None
    assert again.id(0) == chunk_id(made.bytes_of(0))


def test_identical_blobs_become_one_file_when_they_settle(store: Store) -> None:
    one, two = content("a", CHUNK * 5, seed="same"), content("b", CHUNK * 5, seed="same")
    fill(store, one)
    store.settle(one.blob)
    fill(store, two)
    assert store.used == CHUNK * 10
    reader = store.open_reader(two.blob)  # somebody mapped it before it was known to be a twin
    try:
        store.settle(two.blob)
        assert os.pread(reader, len(two.data), 0) == two.data
    finally:
        os.close(reader)
    assert store.path(one.blob).stat().st_ino == store.path(two.blob).stat().st_ino
    assert store.path(two.blob).read_bytes() == two.data
    assert store.used == CHUNK * 5
    info = store.info(two.blob)
    assert info is not None
    assert (info.state, info.shared, info.durable) == ("complete", 1, True)


def test_a_blob_whose_content_is_here_under_another_name_needs_no_transfer(open_store: Opener) -> None:
    one, two = content("a", CHUNK * 5, seed="same"), content("b", CHUNK * 5, seed="same")
    store = open_store()
    fill(store, one)
    store.settle(one.blob)
    assert store.create(two.manifest(known=True), "b").state == "complete"
    store.close()
    store = open_store()
    assert store.path(one.blob).stat().st_ino == store.path(two.blob).stat().st_ino
    assert store.used == CHUNK * 5
    assert all(good for _, good in store.scrub(two.blob))
    store.evict([one.blob])
    assert store.path(two.blob).read_bytes() == two.data
    assert store.find_chunk(chunk_id(two.bytes_of(3))) == (two.blob, 3)


def test_a_partial_blob_is_completed_by_a_twin(store: Store) -> None:
    one, two = content("a", CHUNK * 5, seed="same"), content("b", CHUNK * 5, seed="same")
    fill(store, two, [0, 1])
    store.pin(two.blob)
    fill(store, one)
    store.settle(one.blob)
    info = store.create(two.manifest(known=True), "b")
    assert (info.state, info.pinned, store.used) == ("complete", True, CHUNK * 5)


def test_a_chunk_is_found_wherever_it_lies_until_it_is_lost(open_store: Opener) -> None:
    store = open_store()
    one, two = content("a", CHUNK * 40, seed="same"), content("b", CHUNK * 41, seed="same")
    fill(store, one)
    fill(store, two, range(41))
    wanted = chunk_id(one.bytes_of(35))
    assert one.bytes_of(35) == two.bytes_of(35)
    first = store.find_chunk(wanted)
    assert first is not None
    store.unhave(first[0], [35])
    second = store.find_chunk(wanted)
    assert second is not None
    assert {first, second} == {(one.blob, 35), (two.blob, 35)}
    store.evict([second[0]])
    assert store.find_chunk(wanted) is None
    assert store.find_chunk(chunk_id(b"nowhere")) is None


def test_a_lost_chunk_is_missing_from_every_blob_of_the_file_and_can_land_again(open_store: Opener) -> None:
    one, two = content("a", CHUNK * 5, seed="same"), content("b", CHUNK * 5, seed="same")
    store = open_store()
    for made in (one, two):
        fill(store, made)
        store.settle(made.blob)
    store.unhave(one.blob, [3])
    for made in (one, two):
        info = store.info(made.blob)
        assert info is not None
        assert (info.state, info.durable) == ("partial", False)
        assert list(store.had(made.blob).missing()) == [3]
    assert fill(store, one, [3])
    store.settle(one.blob)
    assert store.create(two.manifest(known=True), "b").state == "complete"
    store.close()
    store = open_store()
    assert [info.state for info in store.blobs()] == ["complete", "complete"]
    assert store.used == CHUNK * 5


@pytest.mark.parametrize("meanwhile", ["discarded", "found bad"])
def test_a_flush_does_not_vouch_for_what_changed_meanwhile(
    open_store: Opener, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    made = content("model", CHUNK * 2)
    store = open_store()
    fill(store, made)
    real = os.fsync

    def slow(fd: int) -> None:
        real(fd)
        if meanwhile == "discarded":
            store.discard(made.blob)
        else:
            store.unhave(made.blob, [0])

    monkeypatch.setattr(os, "fsync", slow)
    store.settle(made.blob)
    monkeypatch.undo()
    store.close()
    info = open_store().info(made.blob)
    if meanwhile == "discarded":
        assert info is None
    else:
        assert info is not None
        assert (info.state, info.durable) == ("partial", False)


def test_nothing_is_written_to_a_complete_blob(store: Store) -> None:
    made = content("model", CHUNK)
    fill(store, made)
    with pytest.raises(StoreError, match="complete"):
        store.open_writer(made.blob)


def test_unknown_blobs_are_told_as_such(store: Store) -> None:
    nobody = blob_id("https://origin.test/x", "etag:1", 1)
    assert store.info(nobody) is None
    assert store.manifest(nobody) is None
    for ask in (store.had, store.open_reader, store.open_writer, store.pin, store.touch, store.settle, store.discard):
        with pytest.raises(UnknownBlob):
            ask(nobody)


def test_the_node_id_is_made_once(open_store: Opener) -> None:
    store = open_store()
    first = store.node_id
    store.close()
    assert len(first) == 16
    assert open_store().node_id == first


def test_checked_is_remembered(open_store: Opener) -> None:
    made = content("model", CHUNK)
    store = open_store()
    fill(store, made)
    store.set_checked(made.blob)
    store.close()
    manifest = open_store().manifest(made.blob)
    assert manifest is not None
    assert manifest.checked
