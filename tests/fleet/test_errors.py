"""What goes wrong on a user's side: one line that names the thing and the way out, a code, and nothing is lost."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import safetensors.torch
from safetensors import SafetensorError

from tests.fleet.bad_peer import read
from tests.fleet.daemons import Daemon, Json, cli
from tests.fleet.weights import tensors
from tests.servers.hub import HubServer
from tests.servers.loop import wait_until
from tests.servers.s3 import S3Server
from weightcache.tools.local import free_pair

MIB = 1 << 20
_numbers = count()
PRIVATE = "hf://org/gated/model.safetensors"


@dataclass
class World:
    """A daemon that works and has a file, one whose credentials are wrong, and what else errors are about."""

    root: Path
    host: Daemon
    denied: Daemon
    taken: int  # a port that somebody listens on; the one before it is free

    @property
    def names(self) -> dict[str, object]:
        """What commands and messages are about."""
        host = self.host
        assert host.process is not None
        known = {"root": self.root, "shelf": self.root / "shelf", "taken": self.taken, "before": self.taken - 1}
        return known | {"store": host.store, "socket": host.socket, "pid": host.process.pid}


@pytest.fixture(scope="module")
def world(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("errors")
    shelf = root / "shelf"
    shelf.mkdir()
    (shelf / "unreadable.safetensors").write_bytes(tensors(1, MIB))
    (shelf / "unreadable.safetensors").chmod(0)
    _prepare_settings(root)
    s3_server.put("fleet", "errors/file.safetensors", tensors(12, MIB))
    with ExitStack() as stack:
        hub = stack.enter_context(HubServer())
        model = root / "gated"
        model.mkdir()
        (model / "model.safetensors").write_bytes(tensors(1, MIB))
        hub.publish("org/gated", model, token="hf_token")
        env = s3_server.env() | {"HF_ENDPOINT": hub.endpoint}
        options = (f"--file-root={shelf}", "--origin-attempts=2")
        host = stack.enter_context(Weak(root / "host", *options, env=env))
        denied = stack.enter_context(Daemon(root / "denied", env=s3_server.env(secret="wrong")))
        taken = free_pair() + 1
        stack.enter_context(socket.create_server(("127.0.0.1", taken)))
        host.pull("s3://fleet/errors/file.safetensors")
        yield World(root, host, denied, taken)


class Weak(Daemon):
    """A daemon of root's that may read no more than any user might: the permissions of files bind it."""

    def command(self) -> list[str]:
        return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *super().command()]


def _prepare_settings(root: Path) -> None:
    (root / "unknown.toml").write_text('[origin]\nstream = 8\nallow = ["s3://fleet/errors/"]\n')
    (root / "broken.toml").write_text("store = \n")
    (root / "open.key").write_text(secrets.token_hex(32))
    (root / "open.key").chmod(0o644)
    (root / "short.key").touch(mode=0o600)
    (root / "short.key").write_text("too short")


@dataclass(frozen=True)
class Case:
    """A command, and what is said when it fails. ``options`` in terms of the world."""

    name: str
    code: int
    words: tuple[str, ...]
    options: Callable[[World], list[str]]
    env: dict[str, str] | None = None


def pull(source: str, host: str = "host") -> Callable[[World], list[str]]:
    def options(world: World) -> list[str]:
        return ["pull", source.format(**world.names), *where(getattr(world, host))]

    return options


def where(daemon: Daemon) -> list[str]:
    return [f"--store={daemon.store}", f"--socket={daemon.socket}"]


def daemon(*options: str) -> Callable[[World], list[str]]:
    def filled(world: World) -> list[str]:
        store = f"{world.root}/fresh{next(_numbers)}"
        return ["daemon", f"--store={store}", *(option.format(**world.names) for option in options)]

    return filled


CASES = [
    Case("unknown scheme", 2, ("ftp://host/file", "unknown scheme", "s3://"), pull("ftp://host/file")),
    Case("no source", 2, ("model.safetensors", "unknown scheme"), pull("model.safetensors")),
    Case("missing bucket", 4, ("s3://nowhere", "no such bucket"), pull("s3://nowhere/file")),
    Case("missing key", 4, ("s3://fleet/errors/missing", "neither"), pull("s3://fleet/errors/missing")),
    Case(
        "wrong credentials", 5, ("s3://fleet/errors/file.safetensors", "403", "AWS_SECRET_ACCESS_KEY"),
        pull("s3://fleet/errors/file.safetensors", "denied"),
    ),
    Case("gated repository", 5, ("hf://org/gated", "HF_TOKEN", "accept"), pull(PRIVATE)),
    Case(
        "unreadable file", 5, ("unreadable.safetensors", "permission denied", "let the daemon's user"),
        pull("file://{shelf}/unreadable.safetensors"),
    ),
    Case("missing file", 4, ("no such file",), pull("file://{shelf}/missing.safetensors")),
    Case("file elsewhere", 5, ("/etc/hostname", "origin.file_roots"), pull("file:///etc/hostname")),
    Case(
        "nothing to show the path of", 4, ("s3://fleet/errors/missing", "weightcache pull"),
        lambda world: ["path", "s3://fleet/errors/missing", *where(world.host)],
    ),
    Case(
        "no daemon", 10, ("no daemon answers", "weightcache daemon"),
        lambda world: ["status", f"--store={world.root}/fresh"],
    ),
    Case(
        "control port in use", 10, ("port {taken}", "in use", "choose another"),
        daemon("--listen=127.0.0.1:{taken}"),
    ),
    Case(
        "bulk port in use", 10, ("in use", "after that of listen", "choose another"),
        daemon("--listen=127.0.0.1:{before}"),
    ),
    Case(
        "metrics port in use", 10, ("metrics", "127.0.0.1:{taken}", "choose another"),
        daemon("--metrics=127.0.0.1:{taken}"),
    ),
    Case(
        "store in use", 8, ("{store}", "in use by process {pid}", "choose another"),
        daemon("--store={store}"),
    ),
    Case("socket in use", 10, ("{socket}", "another daemon"), daemon("--socket={socket}")),
    Case("socket path too long", 2, ("107", "shorter"), daemon(f"--socket=/tmp/{'x' * 120}")),
    Case("bad capacity", 2, ("capacity", "12 parsecs", "200GB"), daemon("--capacity=12 parsecs")),
    Case(
        "unknown key in the file", 2, ("unknown.toml", "'origin.stream'", "origin.streams"),
        daemon("--config={root}/unknown.toml"),
    ),
    Case("no TOML", 2, ("broken.toml", "not TOML"), daemon("--config={root}/broken.toml")),
    Case(
        "unknown variable", 2, ("WEIGHTCACHE_STROE", "WEIGHTCACHE_STORE"), daemon(),
        {"WEIGHTCACHE_STROE": "/tmp"},
    ),
    Case("unknown option", 2, ("--stroe", "--help"), daemon("--stroe=/tmp")),
    Case(
        "a key that others can read", 2, ("open.key", "chmod 600"),
        daemon("--cluster-key-file={root}/open.key"),
    ),
    Case(
        "a key that is too short", 2, ("short.key", "openssl rand"),
        daemon("--cluster-key-file={root}/short.key"),
    ),
    Case(
        "no key", 2, ("missing.key", "No such file"), daemon("--cluster-key-file={root}/missing.key"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_an_error_is_one_line_that_helps(world: World, case: Case) -> None:
    done = cli(*case.options(world), env=case.env, timeout=30)
    words = [word.format(**world.names) for word in case.words]
    said = [line for line in done.stderr.splitlines() if not line.startswith("{")]  # a daemon's log is JSON
    assert [line.startswith("weightcache: error: ") for line in said] == [True], done.stderr
    assert [word for word in words if word not in said[0]] == [], said
    assert done.stdout == ""
    assert done.returncode == case.code


def test_errors_lose_nothing(world: World) -> None:
    """After all of the above: what was here still is, and loads without its origin."""
    report = world.host.pull("s3://fleet/errors/file.safetensors")
    assert read(report) == tensors(12, MIB)
    assert report["bytes_by_source"]["origin"] == 0


# -- room


@contextmanager
def small_disk(at: Path, size: int) -> Iterator[Path]:
    at.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "weightcache-test", at], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def failed_pull(host: Daemon, source: str) -> tuple[str, Json]:
    """What the command line says of a load that fails, to people and to programs. It exits with StoreError's code."""
    shown, told = cli("pull", source, *where(host)), cli("pull", source, "--json", *where(host))
    assert shown.returncode == told.returncode == 8, shown.stderr
    (line,) = shown.stderr.splitlines()
    return line, json.loads(told.stdout)


def test_a_full_disk_is_told_before_the_first_byte(s3: S3Server, tmp_path: Path) -> None:
    small, large = tensors(8, MIB, seed=1), tensors(40, MIB, seed=2)
    s3.put("fleet", "errors/small.safetensors", small)
    s3.put("fleet", "errors/large.safetensors", large)
    with small_disk(tmp_path / "disk", 48 * MIB) as disk, Daemon(disk, env=s3.env()) as host, host.client() as client:
        assert read(client.pull("s3://fleet/errors/small.safetensors")) == small
        client.pin(["s3://fleet/errors/small.safetensors"])
        s3.proxy.reset_counts()
        line, told = failed_pull(host, "s3://fleet/errors/large.safetensors")
        assert "no room for large.safetensors" in line
        assert str(host.store) in line
        assert "free disk space" in line
        assert "1 pinned" in line
        assert told["error"] == "StoreFull"
        assert told["source"] == "s3://fleet/errors/large.safetensors"
        assert s3.proxy.egress < MIB  # its header
        report = client.pull("s3://fleet/errors/small.safetensors")
        assert read(report) == small
        assert report["bytes_by_source"]["local"] == len(small)
        assert len(client.ls()["blobs"]) == 1


def test_a_capacity_that_is_too_small(s3: S3Server, tmp_path: Path) -> None:
    s3.put("fleet", "errors/file.safetensors", tensors(12, MIB))
    with Daemon(tmp_path / "host", "--capacity=5MB", env=s3.env()) as host:
        line, told = failed_pull(host, "s3://fleet/errors/file.safetensors")
        assert "under a capacity of 5,000,000" in line
        assert "raise the capacity" in line
        assert told["error"] == "StoreFull"
        with host.client() as client:
            assert client.ls()["blobs"] == []


# -- peers


def test_a_wrong_cluster_key_is_told_and_the_origin_serves(s3: S3Server, tmp_path: Path) -> None:
    data = tensors(3, MIB, seed=3)
    s3.put("fleet", "errors/keyed.safetensors", data)
    options = []
    for name in ("one", "two"):
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text(secrets.token_hex(32))
        options.append(f"--cluster-key-file={tmp_path / name}")
    first = Daemon(tmp_path / "first", options[0], env=s3.env())
    second = Daemon(tmp_path / "second", options[1], env=s3.env(), peers=(first,))
    with first, second, second.client() as client:
        first.pull("s3://fleet/errors/keyed.safetensors")
        (row,) = wait_until(client.peers, 10, "the peer to be refused")
        assert row["address"] == first.address
        assert row["state"] == "unreachable"
        assert "its cluster key is another" in row["why"]
        report = client.pull("s3://fleet/errors/keyed.safetensors")
        assert read(report) == data
        assert report["bytes_by_source"] == {"local": 0, "peer": {}, "origin": len(data)}
        shown = cli("peers", *where(second))
        assert "its cluster key is another" in shown.stdout


# -- files that are not what they seem


BROKEN = {
    "text": b"this is no safetensors file, but somebody named it so",
    "empty": b"",
    "truncated": tensors(3, MIB)[: 2 * MIB],
    "trailing": tensors(1, MIB) + b"more",
    "no header": (1 << 60).to_bytes(8, "little") + bytes(100),
    "bad json": (100).to_bytes(8, "little") + b"{" + bytes(200),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_file_that_is_not_safetensors_fails_as_safetensors_itself_does(
    world: World, s3: S3Server, tmp_path: Path, works_for: Callable[[Daemon], None], broken: str
) -> None:
    """Byte-exact all the same: it is the reader who minds, and says just what he would say of the original."""
    from weightcache.runtime import load_file

    original = tmp_path / "broken.safetensors"
    original.write_bytes(BROKEN[broken])
    with pytest.raises(SafetensorError) as expected:
        safetensors.torch.load_file(original)
    name = f"{broken.replace(' ', '-')}.safetensors"
    s3.put("fleet", f"errors/{name}", original)
    works_for(world.host)
    with pytest.raises(SafetensorError) as failure:
        load_file(f"s3://fleet/errors/{name}")
    assert str(failure.value) == str(expected.value)
    assert read(world.host.pull(f"s3://fleet/errors/{name}")) == BROKEN[broken]


def test_root_is_not_needed(world: World) -> None:
    """The premise of the unreadable file: this daemon cannot read what its user may not."""
    assert world.host.process is not None
    status = Path(f"/proc/{world.host.process.pid}/status").read_text()
    (effective,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff"))
    assert not effective & 0b110 or os.geteuid()
