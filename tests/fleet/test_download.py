"""``snapshot_download`` beside that of huggingface_hub, against a stand-in for the hub: the same files and errors."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from tests.fleet.daemons import Daemon, cli
from tests.fleet.weights import same_files, tensors
from tests.servers.hub import HubServer
from weightcache.errors import SourceError, SourceNotFound
from weightcache.runtime import snapshot_download

BIG = 9 << 20


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    (root / "unet").mkdir()
    (root / "config.json").write_text('{"a": 1}')
    (root / "unet" / "config.json").write_text('{"b": 2}')
    (root / "unet" / "model.safetensors").write_bytes(tensors(1, BIG))
    (root / "unet" / "model.bin").write_bytes(os.urandom(1 << 20))
    return root


@pytest.fixture
def host(hub: HubServer, tmp_path: Path, works_for: Callable[[Daemon], None]) -> Iterator[Daemon]:
    """A daemon before the hub, and the environment in which it is found. ``fresh`` is short: nothing is from memory."""
    with Daemon(tmp_path / "a", "--fresh=0", env={"HF_ENDPOINT": hub.endpoint}) as host:
        works_for(host)
        yield host


def files(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    found = (path for path in root.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_its_signature_is_that_of_the_hubs() -> None:
    def shape(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(snapshot_download) == shape(huggingface_hub.snapshot_download)


def test_the_directory_is_the_repository(host: Daemon, hub: HubServer, repository: Path) -> None:
    commit = hub.publish("org/name", repository)
    found = snapshot_download("org/name", max_workers=3, token="x", library_name="y", tqdm_class=None)
    assert isinstance(found, str)
    assert same_files(Path(found), repository) > BIG
    assert Path(found) == host.store / "hub" / "models--org--name" / "snapshots" / commit
    assert snapshot_download("org/name", cache_dir=host.store / "hub", revision=commit) == found
    hub.close()  # what is known serves
    assert snapshot_download("org/name") == found
    assert snapshot_download("org/name", local_files_only=True) == found


@pytest.mark.parametrize(
    "patterns",
    [
        {"allow_patterns": "*.json"},
        {"allow_patterns": ["unet/"], "ignore_patterns": ["*.bin"]},
        {"ignore_patterns": ["*.safetensors", "*.bin"]},
        {"allow_patterns": []},
    ],
)
def test_patterns_say_what_is_pulled(
    host: Daemon, hub: HubServer, repository: Path, tmp_path: Path, patterns: dict[str, Any]
) -> None:
    hub.publish("org/name", repository)
    found = snapshot_download("org/name", **patterns)
    pulled = hub.cdn_bytes
    where = {"endpoint": hub.endpoint, "local_dir": tmp_path / "theirs"}
    expected = files(huggingface_hub.snapshot_download("org/name", **where, **patterns))
    assert files(str(found)) == expected
    weights = sum(len(data) for name, data in expected.items() if not name.endswith(".json"))
    assert pulled == weights
    if expected:
        assert snapshot_download("org/name", local_files_only=True, **patterns) == found
    if len(expected) < 4:
        with pytest.raises(errors.LocalEntryNotFoundError, match="not complete"):
            snapshot_download("org/name", local_files_only=True)
        refs = host.store / "hub" / "models--org--name" / "refs"  # a part is not to be taken for the whole
        assert not list(refs.glob("*"))
    assert same_files(Path(str(snapshot_download("org/name"))), repository) > BIG


def test_the_command_line_takes_patterns_too(host: Daemon, hub: HubServer, repository: Path) -> None:
    hub.publish("org/name", repository)
    done = cli(
        "pull", "hf://org/name", "--allow", "unet/*", "--ignore", "*.bin", "--ignore=*.json", env=host.worker_env
    )
    assert done.returncode == 0, done.stderr
    assert hub.cdn_bytes == (repository / "unet" / "model.safetensors").stat().st_size
    nothing = cli("pull", "hf://org/name", "--allow", "*.gguf", env=host.worker_env)
    assert nothing.returncode == SourceNotFound.exit_code
    assert "no file is left by the patterns (allow *.gguf); it has: config.json, unet/config.json" in nothing.stderr


def test_a_local_directory_gets_links_and_copies(
    host: Daemon, hub: HubServer, repository: Path, tmp_path: Path
) -> None:
    hub.publish("org/name", repository)
    target = tmp_path / "here"
    assert snapshot_download("org/name", local_dir=target) == str(target)
    same_files(target, repository)
    big, small = target / "unet" / "model.safetensors", target / "config.json"
    assert big.stat().st_nlink > 1
    assert small.stat().st_nlink == 1
    small.write_text("mine")  # a copy is one's own
    assert same_files(Path(str(snapshot_download("org/name"))), repository) > BIG
    before = (target / "unet" / "config.json").stat().st_ino, big.stat().st_ino
    assert snapshot_download("org/name", local_dir=target, local_files_only=True) == str(target)
    same_files(target, repository)
    assert ((target / "unet" / "config.json").stat().st_ino, big.stat().st_ino) == before


def test_a_dry_run_says_what_would_come(host: Daemon, hub: HubServer, repository: Path) -> None:
    commit = hub.publish("org/name", repository)
    snapshot_download("org/name", allow_patterns="*.json")
    planned = snapshot_download("org/name", dry_run=True)
    assert not isinstance(planned, str)
    rows = {info.filename: (info.file_size, info.is_cached, info.will_download, info.commit_hash) for info in planned}
    expected = {name: len(data) for name, data in files(repository).items()}
    assert rows == {n: (s, n.endswith("json"), not n.endswith("json"), commit) for n, s in expected.items()}
    assert hub.cdn_bytes == 0
    with pytest.raises(errors.DryRunError):
        snapshot_download("org/name", dry_run=True, local_files_only=True)


def test_a_branch_that_moved_is_followed(host: Daemon, hub: HubServer, repository: Path, tmp_path: Path) -> None:
    hub.publish("org/name", repository, branch="v1")
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text("new")
    before = snapshot_download("org/name", revision="v1")
    hub.publish("org/name", changed, branch="v1")
    after = snapshot_download("org/name", revision="v1", force_download=True)
    assert files(str(after)) == {"config.json": b"new"}
    assert before != after


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("org/none", {}, errors.RepositoryNotFoundError),
        ("org/name", {"revision": "v9"}, errors.RevisionNotFoundError),
        ("org/private", {}, errors.RepositoryNotFoundError),
        ("org/name", {"local_files_only": True}, errors.LocalEntryNotFoundError),
        ("a/b/c", {}, errors.HFValidationError),
        ("org/name", {"repo_type": "tree"}, ValueError),
    ],
)
def test_errors_are_those_of_the_hubs_own(
    host: Daemon,
    hub: HubServer,
    repository: Path,
    name: str,
    options: dict[str, Any],
    kind: type[Exception],
    tmp_path: Path,
) -> None:
    hub.publish("org/name", repository)
    hub.publish("org/private", repository, token="secret")
    for download, where in (
        (snapshot_download, {}),
        (huggingface_hub.snapshot_download, {"endpoint": hub.endpoint, "cache_dir": tmp_path / "theirs"}),
    ):
        with pytest.raises(kind):
            download(name, **options, **where)


def test_a_hub_that_is_gone_and_was_never_asked_is_no_entry(host: Daemon, hub: HubServer) -> None:
    hub.fail_with = 503
    with pytest.raises(errors.LocalEntryNotFoundError):
        snapshot_download("org/name")


def test_what_it_cannot_honour_it_refuses(tmp_path: Path) -> None:
    for options in ({"cache_dir": tmp_path}, {"headers": {"X": "1"}}, {"endpoint": "http://elsewhere"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            snapshot_download("org/name", **options)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="only models"):
        snapshot_download("org/name", repo_type="dataset")
    with pytest.raises(SourceError, match="names one revision"):
        snapshot_download("hf://org/name@v1", revision="v2")
