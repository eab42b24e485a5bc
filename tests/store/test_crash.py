"""Processes killed, systems crashed, indexes damaged: nothing recorded is lost to the first, nothing bad is had."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import weightcache.store.store as store_module
from tests.store.support import CHUNK, content, fill, snapshot_of
from tests.store.test_scrub import flip
from weightcache.core.ids import chunk_id
from weightcache.errors import StoreError
from weightcache.store import Store

Opener = Callable[..., Store]
Worker = Callable[..., "subprocess.Popen[str]"]

# Lands the missing chunks of a blob one by one and says which it has recorded.
RECORDS = """
import os, sys
from pathlib import Path
from tests.store.support import CHUNK, content
from weightcache.core.landing import land
from weightcache.store import Store
made = content("model", CHUNK * 2000)
store = Store.open(Path(sys.argv[1]))
store.create(made.manifest(), "model")
fd = store.open_writer(made.blob)
print("ready", flush=True)
for index in list(store.had(made.blob).missing()):
    landed = land(fd, index * CHUNK, [made.bytes_of(index)], b"")
    store.record(made.blob, [(index, *landed)])
    print(index, flush=True)
"""


def test_a_killed_process_loses_nothing_it_recorded(root: Path, open_store: Opener, worker: Worker) -> None:
    made = content("model", CHUNK * 2000)
    told: set[int] = set()
    for survived in (1, 100, 400):
        process = worker(RECORDS, root)
        assert process.stdout is not None
        for _ in range(survived):
            told.add(int(process.stdout.readline()))
        process.kill()
        told |= {int(line) for line in process.stdout.read().splitlines()}
        store = open_store()
        had = set(store.had(made.blob))
        assert told <= had
        assert len(had - told) <= 1  # recorded, and killed before it could say so
        assert all(good for _, good in store.scrub(made.blob, deep=True))
        assert store.info(made.blob).had_bytes == len(had) * CHUNK  # type: ignore[union-attr]
        told = had
        store.close()
    store = open_store()
    assert fill(store, made, store.had(made.blob).missing())
    assert store.path(made.blob).read_bytes() == made.data


def test_a_system_crash_leaves_what_was_not_durable_in_doubt(
    open_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable, complete, partial = (content(name, CHUNK * 70) for name in ("durable", "complete", "partial"))
    store = open_store()
    fill(store, durable)
    store.settle(durable.blob)
    fill(store, complete)
    fill(store, partial, range(40))
    shown = snapshot_of(
        "s3://bucket/x/", {"durable": durable, "complete": complete}, folder="s3--bucket--x", revision="r"
    )
    directory = store.materialise(shown)
    store.close()
    for made, index in ((complete, 5), (partial, 0), (partial, 33)):
        flip(store, made, index * CHUNK)  # what the disk never got

    for _ in range(2):  # nor does opening it a second time make it good
        monkeypatch.setattr(store_module, "boot_id", lambda: "another boot")
        store = open_store()
        assert store.info(durable.blob).state == "complete"  # type: ignore[union-attr]
        for made in (complete, partial):
            info = store.info(made.blob)
            assert info is not None
            assert (info.suspect, info.state, info.had_bytes) == (True, "partial", 0)
            assert list(store.had(made.blob)) == []
            assert store.find_chunk(chunk_id(made.bytes_of(1))) is None
            with pytest.raises(StoreError, match="recheck"):
                store.record(made.blob, [])
            with pytest.raises(StoreError, match="recheck"):
                store.open_writer(made.blob)
        with pytest.raises(StoreError, match="not complete"):
            store.materialise(shown)
        assert [path.name for path in directory.iterdir()] == ["durable"]
        store.close()

    store = open_store()
    assert store.recheck(durable.blob) == 0
    assert store.recheck(complete.blob) == 1
    assert store.recheck(partial.blob) == 2
    assert list(store.had(complete.blob).missing()) == [5]
    assert list(store.had(partial.blob)) == sorted(set(range(40)) - {0, 33})
    assert fill(store, complete, [5])
    assert fill(store, partial, store.had(partial.blob).missing())
    for made in (complete, partial):
        assert store.path(made.blob).read_bytes() == made.data
    store.materialise(shown)
    store.close()
    assert not any(info.suspect for info in open_store().blobs())


def test_a_restart_within_a_boot_casts_no_doubt(open_store: Opener) -> None:
    made = content("model", CHUNK * 3)
    store = open_store()
    fill(store, made, [0, 2])
    store.close()
    info = open_store().info(made.blob)
    assert info is not None
    assert (info.suspect, info.had_bytes) == (False, CHUNK * 2)


def test_an_old_record_that_a_crash_brings_back_does_not_vouch_for_a_new_file(
    root: Path, open_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index was last synced when the blob was durable; then it was evicted and created anew, and nothing had."""
    made = content("model", CHUNK * 3)
    store = open_store()
    fill(store, made)
    store.settle(made.blob)
    store.close()
    shutil.copy(root / "index/data.mdb", root / "synced")
    store = open_store()
    store.evict([made.blob])
    store.create(made.manifest(), "model")
    store.close()
    os.replace(root / "synced", root / "index/data.mdb")
    monkeypatch.setattr(store_module, "boot_id", lambda: "another boot")
    store = open_store()
    assert list(store.had(made.blob)) == []
    assert store.recheck(made.blob) == 3


def test_a_damaged_index_never_makes_a_bad_chunk_had(
    root: Path, open_store: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    """Every page is garbled in turn: the store starts empty with a warning, or is as it was."""
    made = content("model", CHUNK * 200)
    store = open_store()
    fill(store, made, range(150))
    directory = store.materialise(snapshot_of("s3://bucket/x/", {}, folder="s3--bucket--x", revision="r"))
    store.close()
    sound = (root / "index/data.mdb").read_bytes()
    noise = random.Random(1)
    restarts = 0
    for offset in range(0, len(sound), 1024):
        damaged = bytearray(sound)
        damaged[offset : offset + 256] = noise.randbytes(256)
        (root / "index/data.mdb").write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            store = open_store()
        if store.info(made.blob) is None:
            restarts += 1
            assert "the cache starts empty" in caplog.text
            assert list((root / "blobs").iterdir()) == []
            assert not directory.exists()
            fill(store, made, range(150))
        else:
            assert list(store.had(made.blob)) == list(range(150))
            assert all(good for _, good in store.scrub(made.blob, deep=True))
        store.close()
        for aside in root.glob("index.corrupt-*"):
            shutil.rmtree(aside)
    assert restarts > 10


@pytest.mark.parametrize("kept", [0, 1, 4096, 10_000, 0.5])
def test_an_index_cut_short_is_moved_aside(root: Path, open_store: Opener, kept: float) -> None:
    store = open_store()
    fill(store, content("model", CHUNK * 200))
    store.close()
    index = root / "index/data.mdb"
    os.truncate(index, int(kept * index.stat().st_size) if isinstance(kept, float) else kept)
    store = open_store()
    assert store.blobs() == []
    assert (root / "index.corrupt-1/data.mdb").exists()
    assert fill(store, content("model", CHUNK * 200))


def test_blobs_of_another_chunk_plan_go_and_the_store_works_on(
    root: Path, open_store: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    made = content("model", CHUNK * 40)
    store = open_store()
    fill(store, made)
    node = store.node_id
    with store._index._write() as txn:
        txn.delete(b"plan", db=store._index._meta)  # as the first version left it
    store.close()
    store = open_store()
    assert (store.blobs(), store.node_id) == ([], node)
    assert [path for path in (root / "blobs").rglob("*") if path.is_file()] == []
    assert "1 blobs have chunk plan 1" in caplog.text
    assert fill(store, made)
    store.close()
    caplog.clear()
    assert [info.blob for info in open_store().blobs()] == [made.blob]
    assert not caplog.text


def test_a_store_of_another_format_is_refused_and_left_alone(root: Path, open_store: Opener) -> None:
    store = open_store()
    fill(store, content("model", CHUNK))
    with store._index._write() as txn:
        txn.put(b"format", b"99", db=store._index._meta)
    store.close()
    for _ in range(2):
        with pytest.raises(StoreError, match="format 99"):
            open_store()
    assert len(list((root / "blobs").rglob("*"))) == 2


def test_files_without_a_record_go_and_records_without_a_file_too(root: Path, open_store: Opener) -> None:
    kept, lost, cut = (content(name, CHUNK * 40) for name in ("kept", "lost", "cut"))
    store = open_store()
    for made in (kept, lost, cut):
        fill(store, made)
    files = {made: store.path(made.blob) for made in (kept, lost, cut)}
    store.close()
    files[lost].unlink()
    os.truncate(files[cut], CHUNK)
    orphan = root / "blobs/ab" / ("ab" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"of nobody")
    bystander = root / "blobs/README"
    bystander.write_text("not a blob")
    store = open_store()
    assert [info.blob for info in store.blobs()] == [kept.blob]
    assert not orphan.exists()
    assert not files[cut].exists()
    assert bystander.exists()
    assert store.find_chunk(chunk_id(lost.bytes_of(0))) is None
    assert fill(store, lost)


def test_a_death_in_the_middle_of_a_removal_is_finished_at_open(root: Path, open_store: Opener) -> None:
    made = content("model", CHUNK * 5000)
    store = open_store()
    fill(store, made)
    store._index.drop_blob(made.blob)  # as far as a killed process came
    store._index.sweep(1)
    store.close()
    store = open_store()
    assert store.blobs() == []
    assert store._index.places(chunk_id(made.bytes_of(4999))) == []
    assert not store.path(made.blob).exists()
