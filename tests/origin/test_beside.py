"""What is published beside an object: found, put once, never part of a tree."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.origin.conftest import model
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.s3 import S3Server
from weightcache.core.published import MAX_PUBLISHED_BYTES, SUFFIX
from weightcache.core.snapshot import FileEntry
from weightcache.core.source import parse_source
from weightcache.errors import OriginUnavailable, SourceDenied, SourceError
from weightcache.origin import Origins

Make = Callable[..., Origins]


async def resolved(ours: Origins, source: str) -> FileEntry:
    (entry,) = (await ours.resolve(parse_source(source))).files
    return entry


async def put_and_found(ours: Origins, entry: FileEntry) -> None:
    assert await ours.publish(entry, b"one", force=False) == "published"
    assert await ours.beside(entry) == b"one"
    assert await ours.publish(entry, b"one", force=False) == "same"
    with pytest.raises(SourceError, match="--force"):
        await ours.publish(entry, b"two", force=False)
    assert await ours.beside(entry) == b"one"
    assert await ours.publish(entry, b"two", force=True) == "replaced"
    assert await ours.beside(entry) == b"two"


async def test_in_a_bucket(s3: S3Server, origins: Make) -> None:
    s3.put("beside", "tree/model.safetensors", model())
    ours = origins()
    entry = await resolved(ours, "s3://beside/tree/model.safetensors")
    await put_and_found(ours, entry)
    snapshot = await ours.resolve(parse_source("s3://beside/tree/"))
    assert [entry.path for entry in snapshot.files] == ["model.safetensors"]


async def test_of_two_that_put_at_once_one_is_first(s3: S3Server, origins: Make) -> None:
    """The store itself refuses the second: nobody's is written over."""
    from weightcache.config import OriginConfig
    from weightcache.origin.objects import ObjectOrigin

    s3.put("beside", "race.safetensors", model())
    entry = await resolved(origins(), "s3://beside/race.safetensors")
    store = ObjectOrigin(OriginConfig())
    assert await store.publish(entry, b"one", replace=False)
    assert not await store.publish(entry, b"two", replace=False)
    assert await store.beside(entry, 100) == b"one"


async def test_credentials_that_may_only_read_are_told_apart(s3: S3Server, origins: Make) -> None:
    s3.put("beside", "denied.safetensors", model())
    ours = origins()
    entry = await resolved(ours, "s3://beside/denied.safetensors")
    s3.proxy.answer(SUFFIX, 403, times=2)
    with pytest.raises(SourceDenied, match=r"may not write.*--to fleet or --to FILE"):
        await ours.publish(entry, b"one", force=False)
    assert await ours.beside(entry) is None


async def test_that_there_is_none_is_remembered(s3: S3Server, origins: Make) -> None:
    s3.put("beside", "none.safetensors", model())
    ours = origins()
    entry = await resolved(ours, "s3://beside/none.safetensors")
    s3.proxy.reset_counts()
    assert [await ours.beside(entry) for _ in range(5)] == [None] * 5
    assert s3.proxy.requests == 1
    assert await ours.publish(entry, b"one", force=False) == "published"
    assert await ours.beside(entry) == b"one"


async def test_a_store_that_fails_is_asked_once(s3: S3Server, origins: Make) -> None:
    s3.put("beside", "fails.safetensors", model())
    ours = origins()
    entry = await resolved(ours, "s3://beside/fails.safetensors")
    s3.proxy.answer(SUFFIX, 500, times=1)
    with pytest.raises(OriginUnavailable):
        await ours.beside(entry)
    assert await ours.beside(entry) is None


async def test_nobody_looks_where_that_is_switched_off(s3: S3Server, origins: Make) -> None:
    s3.put("beside", "off.safetensors", model())
    s3.put("beside", f"off.safetensors{SUFFIX}", b"one")
    ours = origins(manifests=False)
    entry = await resolved(ours, "s3://beside/off.safetensors")
    s3.proxy.reset_counts()
    assert await ours.beside(entry) is None
    assert s3.proxy.requests == 0


async def test_on_this_hosts_disk(tmp_path: Path, origins: Make) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/model.safetensors").write_bytes(model())
    ours = origins(file_roots=(tmp_path,))
    entry = await resolved(ours, f"file://{tmp_path}/tree/model.safetensors")
    await put_and_found(ours, entry)
    assert sorted(path.name for path in (tmp_path / "tree").iterdir()) == [
        "model.safetensors",
        f"model.safetensors{SUFFIX}",
    ]
    snapshot = await ours.resolve(parse_source(f"file://{tmp_path}/tree"))
    assert [entry.path for entry in snapshot.files] == ["model.safetensors"]


async def test_nothing_is_put_outside_the_roots(tmp_path: Path, origins: Make) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in/model.bin").write_bytes(model())
    os.symlink(tmp_path / "out" / "target", tmp_path / f"in/model.bin{SUFFIX}")
    ours = origins(file_roots=(tmp_path / "in",))
    entry = await resolved(ours, f"file://{tmp_path}/in/model.bin")
    with pytest.raises(SourceError):
        await ours.publish(entry, b"one", force=False)
    assert not list((tmp_path / "out").iterdir())


async def test_on_a_web_server(nginx: NginxServer, served: Path, origins: Make) -> None:
    (served / "beside.bin").write_bytes(model())
    ours = origins()
    entry = await resolved(ours, nginx.url("beside.bin"))
    with pytest.raises(SourceError, match=r"--to fleet, or with --to FILE .* beside\.bin\.weightcache"):
        await ours.publish(entry, b"one", force=False)
    (served / f"beside.bin{SUFFIX}").write_bytes(b"one")
    assert await origins().beside(entry) == b"one"
    with (served / f"beside.bin{SUFFIX}").open("wb") as file:
        file.truncate(MAX_PUBLISHED_BYTES + 1)
    with pytest.raises(SourceError, match="more than"):
        await origins().beside(entry)


async def test_in_a_repository(hub: HubServer, tmp_path: Path, origins: Make) -> None:
    """Only where its listing shows one: the resolver is not asked in vain."""
    (tmp_path / "model.safetensors").write_bytes(model())
    (tmp_path / "other.safetensors").write_bytes(model(seed=2))
    (tmp_path / f"model.safetensors{SUFFIX}").write_bytes(b"one")
    hub.publish("org/name", tmp_path)
    ours = origins()
    files = {entry.path: entry for entry in (await ours.resolve(parse_source("hf://org/name"))).files}
    assert sorted(files) == ["model.safetensors", "other.safetensors"]
    assert await ours.beside(files["model.safetensors"]) == b"one"
    assert await ours.beside(files["other.safetensors"]) is None
    with pytest.raises(SourceError, match="another commit"):
        await ours.publish(files["other.safetensors"], b"one", force=False)
