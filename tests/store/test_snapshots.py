"""Snapshots on disk: whole, byte-exact, and in the layout that huggingface_hub reads."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.store.support import CHUNK, Content, content, fill, snapshot_of
from weightcache.core.snapshot import Snapshot
from weightcache.core.source import parse_source
from weightcache.errors import FormatError, StoreError
from weightcache.store import Store

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": content("config", 700), "unet/weights.safetensors": content("unet", CHUNK * 9)}


def hub_snapshot(files: dict[str, Content] = FILES, revision: str = "main") -> Snapshot:
    return snapshot_of(f"hf://org/name@{revision}", files, folder="models--org--name", revision=COMMIT)


@pytest.fixture
def filled(store: Store) -> Store:
    for made in FILES.values():
        fill(store, made)
    return store


def same(directory: Path, files: dict[str, Content]) -> bool:
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return found == {path: made.data for path, made in files.items()}


def test_a_snapshot_is_a_directory_of_links(filled: Store) -> None:
    directory = filled.materialise(hub_snapshot())
    assert directory == filled.directory(hub_snapshot())
    assert same(directory, FILES)
    for path, made in FILES.items():
        assert (directory / path).stat().st_ino == filled.path(made.blob).stat().st_ino
    for folder in (directory, directory / "unet", filled.root, filled.path(made.blob).parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_the_hub_library_finds_it_offline(filled: Store) -> None:
    directory = filled.materialise(hub_snapshot())
    cache = filled.root / "hub"
    assert Path(snapshot_download("org/name", cache_dir=cache, local_files_only=True)) == directory
    assert Path(snapshot_download("org/name", revision=COMMIT, cache_dir=cache, local_files_only=True)) == directory
    found = hf_hub_download("org/name", "unet/weights.safetensors", cache_dir=cache, local_files_only=True)
    assert Path(found).read_bytes() == FILES["unet/weights.safetensors"].data
    scanned = scan_cache_dir(cache)
    assert scanned.warnings == []
    (repository,) = scanned.repos
    assert (repository.repo_id, repository.nb_files) == ("org/name", 2)
    assert set(repository.refs) == {"main"}


def test_revisions_with_slashes_are_refs_and_commits_are_not(filled: Store) -> None:
    filled.materialise(hub_snapshot(revision="refs%2Fpr%2F1"))
    filled.materialise(hub_snapshot(revision=COMMIT))
    refs = filled.root / "hub/models--org--name/refs"
    assert [str(path.relative_to(refs)) for path in refs.rglob("*") if path.is_file()] == ["refs/pr/1"]
    found = snapshot_download("org/name", revision="refs/pr/1", cache_dir=filled.root / "hub", local_files_only=True)
    assert same(Path(found), FILES)


def test_an_incomplete_snapshot_is_not_shown(store: Store) -> None:
    fill(store, FILES["config.json"])
    fill(store, FILES["unet/weights.safetensors"], [0, 1])
    with pytest.raises(StoreError, match="not complete"):
        store.materialise(hub_snapshot())
    assert list((store.root / "hub").iterdir()) == []


def test_it_mends_what_is_missing_or_wrong(filled: Store) -> None:
    directory = filled.materialise(hub_snapshot())
    (directory / "config.json").unlink()
    (directory / "unet/weights.safetensors").unlink()
    (directory / "unet/weights.safetensors").write_text("somebody's own")
    (directory.parents[1] / "refs/main").write_text("f" * 40)
    filled.materialise(hub_snapshot())
    assert same(directory, FILES)
    assert (directory.parents[1] / "refs/main").read_text() == COMMIT
    before = (directory / "config.json").stat().st_ctime_ns
    filled.materialise(hub_snapshot())
    assert (directory / "config.json").stat().st_ctime_ns == before


def test_eviction_takes_links_refs_and_empty_directories_and_keeps_the_record(filled: Store) -> None:
    snapshot = hub_snapshot()
    filled.put_snapshot(snapshot)
    directory = filled.materialise(snapshot)
    filled.evict([FILES["unet/weights.safetensors"].blob])
    assert same(directory, {"config.json": FILES["config.json"]})
    assert not (directory / "unet").exists()
    with pytest.raises(LocalEntryNotFoundError):  # rather than half a model
        snapshot_download("org/name", cache_dir=filled.root / "hub", local_files_only=True)
    filled.evict([FILES["config.json"].blob])
    assert list((filled.root / "hub").iterdir()) == []
    assert filled.find_snapshot(snapshot.source) == snapshot


def test_eviction_leaves_the_links_of_what_is_leased(filled: Store) -> None:
    directory = filled.materialise(hub_snapshot())
    filled.lease(FILES["config.json"].blob)
    filled.evict([made.blob for made in FILES.values()])
    assert same(directory, {"config.json": FILES["config.json"]})


def test_a_blob_found_bad_is_no_longer_shown(filled: Store) -> None:
    directory = filled.materialise(hub_snapshot())
    weights = FILES["unet/weights.safetensors"]
    filled.unhave(weights.blob, [4])
    assert same(directory, {"config.json": FILES["config.json"]})
    fill(filled, weights, [4])
    filled.materialise(hub_snapshot())
    assert same(directory, FILES)


def test_links_follow_a_blob_that_comes_to_share_a_file(store: Store) -> None:
    one, two = content("a", CHUNK, seed="same"), content("b", CHUNK, seed="same")
    for made in (one, two):
        fill(store, made)
    directory = store.materialise(hub_snapshot({"one": one, "two": two}))
    store.settle(one.blob)
    store.settle(two.blob)
    assert (directory / "two").stat().st_ino == store.path(one.blob).stat().st_ino
    assert (directory / "two").stat().st_nlink == 4
    store.evict([one.blob, two.blob])
    assert list((store.root / "hub").iterdir()) == []


def test_the_newest_snapshot_of_a_source_is_found_after_a_restart(open_store: Callable[..., Store]) -> None:
    store = open_store()
    source = "s3://bucket/model/"
    old, new, other = (
        snapshot_of(where, FILES, folder="s3--bucket--model", revision=revision, at=at)
        for where, revision, at in (
            (source, "1" * 40, 10.0),
            (source, "2" * 40, 20.0),
            ("s3://bucket/m", "3" * 40, 30.0),
        )
    )
    for snapshot in (new, old, other):
        store.put_snapshot(snapshot)
    store.close()
    store = open_store()
    assert store.find_snapshot(parse_source(source)) == new
    assert store.find_snapshot(parse_source("s3://bucket/none")) is None
    assert {snapshot.revision for snapshot in store.snapshots()} == {"1" * 40, "2" * 40, "3" * 40}
    assert not (store.root / "hub/s3--bucket--model").exists()


def test_no_path_leads_out_of_the_hub(filled: Store) -> None:
    for path in ("../x", "/etc/x", "a/../../x", ""):
        with pytest.raises(FormatError):
            filled.materialise(hub_snapshot({path: FILES["config.json"]}))
    for folder, revision in (("..", "r"), ("f", ".."), ("a/b", "r")):
        with pytest.raises((FormatError, StoreError)):
            filled.materialise(snapshot_of("s3://bucket/x", FILES, folder=folder, revision=revision))


def test_a_path_that_is_file_and_directory_at_once_is_refused(filled: Store) -> None:
    both = {"unet": FILES["config.json"], "unet/weights": FILES["unet/weights.safetensors"]}
    with pytest.raises(StoreError, match="stands in the way"):
        filled.materialise(hub_snapshot(both))
