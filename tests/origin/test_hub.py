from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.servers.hub import HubServer
from weightcache.core.source import parse_source
from weightcache.errors import OriginUnavailable, SourceChanged, SourceDenied, SourceError, SourceNotFound
from weightcache.origin import Origins
from weightcache.origin.base import read_whole

Make = Callable[..., Origins]
WEIGHTS = random.Random(9).randbytes(1_500_000)
CONFIG = b'{"model_type": "tiny"}'


@pytest.fixture
def files(tmp_path: Path) -> Path:
    files = tmp_path / "repository"
    (files / "unet").mkdir(parents=True)
    (files / "config.json").write_bytes(CONFIG)
    (files / "unet" / "model.safetensors").write_bytes(WEIGHTS)
    return files


async def test_a_repository_is_its_files_at_a_commit(hub: HubServer, files: Path, origins: Make) -> None:
    commit = hub.publish("org/name", files)
    ours = origins()
    snapshot = await ours.resolve(parse_source("hf://org/name"))
    assert (snapshot.folder, snapshot.revision, snapshot.immutable) == ("models--org--name", commit, False)
    assert [entry.path for entry in snapshot.files] == ["config.json", "unet/model.safetensors"]
    config, weights = snapshot.files
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert weights.version == weights.digest == f"sha256:{sha256}"
    git = hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()
    assert (config.version, config.digest) == (f"etag:{git}", "")
    assert str(weights.source) == f"hf://org/name@{commit}/unet/model.safetensors"
    assert await read_whole(ours, weights, 1000, 1_400_000) == WEIGHTS[1000:1_400_000]
    assert await read_whole(ours, config, 2, 9) == CONFIG[2:9]
    assert b"".join([bytes(piece) async for piece in ours.stream(weights)]) == WEIGHTS
    pinned = await ours.resolve(parse_source(f"hf://org/name@{commit}"))
    assert pinned.immutable
    assert pinned.files == snapshot.files


async def test_a_file_and_a_directory_keep_their_place_in_the_repository(
    hub: HubServer, files: Path, origins: Make
) -> None:
    commit = hub.publish("org/name", files, branch="refs/pr/1")
    ours = origins()
    one = await ours.resolve(parse_source("hf://org/name@refs%2Fpr%2F1/unet/model.safetensors"))
    assert (one.single, one.folder, one.revision) == (True, "models--org--name", commit)
    assert [entry.path for entry in one.files] == ["unet/model.safetensors"]
    for spelling in ("unet", "unet/"):
        below = await ours.resolve(parse_source(f"hf://org/name@refs%2Fpr%2F1/{spelling}"))
        assert (below.single, [entry.path for entry in below.files]) == (False, ["unet/model.safetensors"])
    with pytest.raises(SourceNotFound, match="no such file"):
        await ours.resolve(parse_source("hf://org/name@refs%2Fpr%2F1/une"))


async def test_the_resolver_is_asked_once_a_file_and_the_cdn_never_sees_the_token(
    hub: HubServer, files: Path, origins: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/private", files, token="hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ours = origins()
    (entry,) = (await ours.resolve(parse_source("hf://org/private/unet/model.safetensors"))).files
    parts = await asyncio.gather(*(read_whole(ours, entry, at, at + 100_000) for at in range(0, 1_500_000, 100_000)))
    assert b"".join(parts) == WEIGHTS
    assert hub.counts == {"info": 1, "resolve": 1, "cdn": 15}
    assert hub.cdn_bytes == len(WEIGHTS)
    assert hub.cdn_logins == []


async def test_an_expired_address_is_renewed_once_for_all(hub: HubServer, files: Path, origins: Make) -> None:
    hub.publish("org/name", files)
    ours = origins()
    (entry,) = (await ours.resolve(parse_source("hf://org/name/unet/model.safetensors"))).files
    await read_whole(ours, entry, 0, 10)
    hub.expire()
    parts = await asyncio.gather(*(read_whole(ours, entry, at, at + 500_000) for at in range(0, 1_500_000, 500_000)))
    assert b"".join(parts) == WEIGHTS
    assert hub.counts["resolve"] == 2


async def test_without_the_token_a_private_repository_names_it(
    hub: HubServer, files: Path, origins: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/private", files, token="hf_secret")
    with pytest.raises(SourceDenied, match="HF_TOKEN"):
        await origins().resolve(parse_source("hf://org/private"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SourceDenied, match=r"GatedRepo.*HF_TOKEN") as denied:
        await origins().resolve(parse_source("hf://org/private"))
    assert "hf_wrong" not in str(denied.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ours = origins()
    (entry,) = (await ours.resolve(parse_source("hf://org/private/config.json"))).files
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    with pytest.raises(SourceDenied, match="HF_TOKEN"):
        await read_whole(ours, entry, 0, 5)


async def test_what_is_not_there_is_named(
    hub: HubServer, files: Path, origins: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/name", files)
    ours = origins()
    with pytest.raises(SourceDenied, match="no such repository, or a private one"):
        await ours.resolve(parse_source("hf://org/missing"))
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    with pytest.raises(SourceNotFound, match="hf://org/missing"):
        await ours.resolve(parse_source("hf://org/missing"))
    with pytest.raises(SourceNotFound, match="RevisionNotFound"):
        await ours.resolve(parse_source("hf://org/name@v9"))


async def test_a_renamed_repository_is_followed(hub: HubServer, files: Path, origins: Make) -> None:
    hub.publish("org/old", files)
    hub.rename("org/old", "org/new")
    ours = origins()
    (entry,) = (await ours.resolve(parse_source("hf://org/old/unet/model.safetensors"))).files
    assert await read_whole(ours, entry, 0, entry.size) == WEIGHTS


async def test_what_the_resolver_states_is_held_against_the_entry(hub: HubServer, files: Path, origins: Make) -> None:
    hub.publish("org/name", files)
    ours = origins()
    config, weights = (await ours.resolve(parse_source("hf://org/name"))).files
    other = replace(weights, version="sha256:" + "0" * 64)
    longer = replace(weights, size=weights.size + 1)
    for entry in (other, longer, replace(config, version="etag:" + "0" * 40), replace(config, size=5)):
        with pytest.raises(SourceChanged):
            await read_whole(ours, entry, 0, 5)


async def test_a_hub_that_fails_is_retryable(hub: HubServer, files: Path, origins: Make) -> None:
    hub.publish("org/name", files)
    ours = origins()
    config, weights = (await ours.resolve(parse_source("hf://org/name"))).files
    for status in (500, 429):
        hub.fail_with = status
        with pytest.raises(OriginUnavailable):
            await ours.resolve(parse_source("hf://org/name"))
        for entry in (config, weights):
            with pytest.raises(OriginUnavailable):
                await read_whole(ours, entry, 0, 5)
    hub.fail_with = 418
    with pytest.raises(SourceError, match="418"):
        await read_whole(ours, config, 0, 5)
    hub.fail_with = 0
    hub.close()
    with pytest.raises(OriginUnavailable):
        await origins().resolve(parse_source("hf://org/name"))
