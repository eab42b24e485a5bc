"""``snapshot_download`` beside that of huggingface_hub, against a stand-in for the hub: the same files and errors."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from itertools import count
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
_numbers = count()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Files that no other test has brought: not even their twins are here."""
    root, number = tmp_path / "repository", next(_numbers)
    (root / "unet").mkdir(parents=True)
    (root / "config.json").write_text(f'{{"a": {number}}}')
    (root / "unet" / "config.json").write_text(f'{{"b": {number}}}')
    (root / "unet" / "model.safetensors").write_bytes(tensors(1, BIG, seed=number))
    (root / "unet" / "model.bin").write_bytes(os.urandom(1 << 20))
    return root


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Daemon]]:
    """A hub, and a daemon before it. ``fresh`` is short: nothing is from memory."""
    with HubServer() as hub:
        options = ("--fresh=0", "--origin-attempts=2")
        with Daemon(tmp_path_factory.mktemp("download"), *options, env={"HF_ENDPOINT": hub.endpoint}) as host:
            yield hub, host


@pytest.fixture
def hub(pair: tuple[HubServer, Daemon], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    hub, _ = pair
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.cdn_bytes = 0
    yield hub
    hub.fail_with = 0


@pytest.fixture
def host(pair: tuple[HubServer, Daemon], works_for: Callable[[Daemon], None]) -> Daemon:
    """This process is a worker of it."""
    _, host = pair
    works_for(host)
    return host


@pytest.fixture
def name() -> str:
    """Of a repository that nobody has asked for yet."""
    return f"org/name{next(_numbers)}"


def files(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    found = (path for path in root.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_its_signature_is_that_of_the_hubs() -> None:
    def shape(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(snapshot_download) == shape(huggingface_hub.snapshot_download)


def test_the_directory_is_the_repository(host: Daemon, hub: HubServer, name: str, repository: Path) -> None:
    commit = hub.publish(name, repository)
    found = snapshot_download(name, max_workers=3, token="x", library_name="y", tqdm_class=None)
    assert isinstance(found, str)
    assert same_files(Path(found), repository) > BIG
    assert Path(found) == host.store / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    assert snapshot_download(name, cache_dir=host.store / "hub", revision=commit) == found
    hub.fail_with = 503  # what is known serves
    assert snapshot_download(name) == found
    assert snapshot_download(name, local_files_only=True) == found


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
    host: Daemon, hub: HubServer, name: str, repository: Path, tmp_path: Path, patterns: dict[str, Any]
) -> None:
    hub.publish(name, repository)
    found = snapshot_download(name, **patterns)
    pulled = hub.cdn_bytes
    where = {"endpoint": hub.endpoint, "local_dir": tmp_path / "theirs"}
    expected = files(huggingface_hub.snapshot_download(name, **where, **patterns))
    assert files(str(found)) == expected
    weights = sum(len(data) for name, data in expected.items() if not name.endswith(".json"))
    assert pulled == weights
    if expected:
        assert snapshot_download(name, local_files_only=True, **patterns) == found
    if len(expected) < 4:
        with pytest.raises(errors.LocalEntryNotFoundError, match="not complete"):
            snapshot_download(name, local_files_only=True)
        refs = (
            host.store / "hub" / f"models--{name.replace('/', '--')}" / "refs"
        )  # a part is not to be taken for the whole
        assert not list(refs.glob("*"))
    assert same_files(Path(str(snapshot_download(name))), repository) > BIG


def test_the_command_line_takes_patterns_too(host: Daemon, hub: HubServer, name: str, repository: Path) -> None:
    hub.publish(name, repository)
    done = cli("pull", f"hf://{name}", "--allow", "unet/*", "--ignore", "*.bin", "--ignore=*.json", env=host.worker_env)
    assert done.returncode == 0, done.stderr
    assert hub.cdn_bytes == (repository / "unet" / "model.safetensors").stat().st_size
    nothing = cli("pull", f"hf://{name}", "--allow", "*.gguf", env=host.worker_env)
    assert nothing.returncode == SourceNotFound.exit_code
    assert "no file is left by the patterns (allow *.gguf); it has: config.json, unet/config.json" in nothing.stderr


def test_a_local_directory_gets_links_and_copies(
    host: Daemon, hub: HubServer, name: str, repository: Path, tmp_path: Path
) -> None:
    hub.publish(name, repository)
    target = tmp_path / "here"
    assert snapshot_download(name, local_dir=target) == str(target)
    same_files(target, repository)
    big, small = target / "unet" / "model.safetensors", target / "config.json"
    assert big.stat().st_nlink > 1
    assert small.stat().st_nlink == 1
    small.write_text("mine")  # a copy is one's own
    assert same_files(Path(str(snapshot_download(name))), repository) > BIG
    before = (target / "unet" / "config.json").stat().st_ino, big.stat().st_ino
    assert snapshot_download(name, local_dir=target, local_files_only=True) == str(target)
    same_files(target, repository)
    assert ((target / "unet" / "config.json").stat().st_ino, big.stat().st_ino) == before


def test_a_dry_run_says_what_would_come(host: Daemon, hub: HubServer, name: str, repository: Path) -> None:
    commit = hub.publish(name, repository)
    snapshot_download(name, allow_patterns="*.json")
    planned = snapshot_download(name, dry_run=True)
    assert not isinstance(planned, str)
    rows = {info.filename: (info.file_size, info.is_cached, info.will_download, info.commit_hash) for info in planned}
    expected = {name: len(data) for name, data in files(repository).items()}
    assert rows == {n: (s, n.endswith("json"), not n.endswith("json"), commit) for n, s in expected.items()}
    assert hub.cdn_bytes == 0
    with pytest.raises(errors.DryRunError):
        snapshot_download(name, dry_run=True, local_files_only=True)


def test_a_branch_that_moved_is_followed(
    host: Daemon, hub: HubServer, name: str, repository: Path, tmp_path: Path
) -> None:
    hub.publish(name, repository, branch="v1")
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text("new")
    before = snapshot_download(name, revision="v1")
    hub.publish(name, changed, branch="v1")
    after = snapshot_download(name, revision="v1", force_download=True)
    assert files(str(after)) == {"config.json": b"new"}
    assert before != after


@pytest.mark.parametrize(
    ("asked", "options", "kind"),
    [
        ("org/none", {}, errors.RepositoryNotFoundError),
        ("{name}", {"revision": "v9"}, errors.RevisionNotFoundError),
        ("org/private", {}, errors.RepositoryNotFoundError),
        ("{name}", {"local_files_only": True}, errors.LocalEntryNotFoundError),
        ("a/b/c", {}, errors.HFValidationError),
        ("{name}", {"repo_type": "tree"}, ValueError),
    ],
)
def test_errors_are_those_of_the_hubs_own(
    host: Daemon,
    hub: HubServer,
    repository: Path,
    name: str,
    asked: str,
    options: dict[str, Any],
    kind: type[Exception],
    tmp_path: Path,
) -> None:
    hub.publish(name, repository)
    hub.publish("org/private", repository, token="secret")
    for download, where in (
        (snapshot_download, {}),
        (huggingface_hub.snapshot_download, {"endpoint": hub.endpoint, "cache_dir": tmp_path / "theirs"}),
    ):
        with pytest.raises(kind):
            download(asked.format(name=name), **options, **where)


def test_a_hub_that_is_gone_and_was_never_asked_is_no_entry(host: Daemon, hub: HubServer, name: str) -> None:
    hub.fail_with = 503
    with pytest.raises(errors.LocalEntryNotFoundError):
        snapshot_download(name)


def test_what_it_cannot_honour_it_refuses(tmp_path: Path) -> None:
    for options in ({"cache_dir": tmp_path}, {"headers": {"X": "1"}}, {"endpoint": "http://elsewhere"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            snapshot_download("org/name", **options)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="only models"):
        snapshot_download("org/name", repo_type="dataset")
    with pytest.raises(SourceError, match="names one revision"):
        snapshot_download("hf://org/name@v1", revision="v2")
