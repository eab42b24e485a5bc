"""Care for what lies on the disk: verified, repaired, rechecked, compared with what the origin states, stored once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.daemons import Daemon, Json, cli
from tests.fleet.weights import tensors
from tests.servers.hub import HubServer
from tests.servers.loop import wait_until
from tests.servers.s3 import S3Server
from weightcache.core.ids import check, chunk_id
from weightcache.core.layout import CHUNK
from weightcache.errors import BlobCorrupt, UnknownBlob
from weightcache.store import Store
from weightcache.store import store as store_module

COUNT = 3  # tensors of a file, each of them a chunk


@pytest.fixture(scope="module")
def pair(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Daemon]]:
    root, env = tmp_path_factory.mktemp("care"), s3_server.env()
    with Daemon(root / "a", env=env) as a, Daemon(root / "b", peers=(a,), env=env) as b:
        b.meets(a)
        yield a, b


def put(s3: S3Server, name: str, seed: int = 0) -> tuple[str, bytes]:
    data = tensors(COUNT, CHUNK, seed)
    s3.put("care", name, data)
    return f"s3://care/{name}", data


def write(path: Path, offset: int, data: bytes) -> None:
    """What a failing disk, or somebody with a hex editor, does to a blob."""
    os.chmod(path, 0o644)
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, data, offset)
    os.close(fd)
    os.chmod(path, 0o444)


def flip(path: Path, offset: int) -> None:
    with path.open("rb") as file:
        file.seek(offset)
        (byte,) = file.read(1)
    write(path, offset, bytes([byte ^ 1]))


def run(host: Daemon, *arguments: str) -> Json:
    """What a command says, and its exit code."""
    done = cli(*arguments, "--json", env=host.worker_env)
    assert done.stderr == ""
    return {"code": done.returncode, "said": json.loads(done.stdout)}


def blob(host: Daemon, source: str) -> Json:
    """The one blob of a source, as ls shows it."""
    listing = run(host, "ls")["said"]
    (name,) = [entry["files"][0]["blob"] for entry in listing["snapshots"] if entry["source"] == source]
    return next(row for row in listing["blobs"] if row["blob"] == name)


def real_path(host: Daemon, name: str) -> Path:
    """Where a blob lies, whatever directories show it."""
    return host.store / "blobs" / name[:2] / name


def cut_off(host: Daemon, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bring ``source``, then stop as a power cut would, before the disk has all of it: its second chunk is bad."""
    host.pull(source)
    path = real_path(host, blob(host, source)["blob"])
    host.kill()
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "boot_id", lambda: "the boot before")
        Store.open(host.store).close()
    flip(path, CHUNK)


def test_verify_finds_a_flipped_bit_and_repairs_it(s3: S3Server, pair: tuple[Daemon, Daemon]) -> None:
    a, b = pair
    source, data = put(s3, "flipped.safetensors")
    path = Path(a.pull(source)["path"])
    copy = Path(b.pull(source)["path"])
    wait_until(lambda: blob(b, source)["durable"], 10, "b to be done with it")
    s3.proxy.reset_counts()
    flip(copy, 2 * CHUNK)
    found = run(b, "verify", source, "--no-repair")
    assert (found["code"], found["said"][0]["bad"]) == (8, [2])
    assert not copy.exists()  # no directory shows what is bad
    with b.client() as client, pytest.raises(UnknownBlob, match="1 of 1 files not complete"):
        client.path(source)
    flip(path, CHUNK)
    found = run(a, "verify", source)  # b has that chunk, though not all of the file
    assert (found["code"], found["said"][0]["bad"]) == (0, [1])
    assert found["said"][0]["repaired"] == {"local": 0, "peer": {b.address: CHUNK}, "origin": 0}
    report = b.pull(source)
    assert report["bytes_by_source"] == {"local": len(data) - CHUNK, "peer": {a.address: CHUNK}, "origin": 0}
    assert path.read_bytes() == copy.read_bytes() == data
    assert s3.proxy.egress == 0
    assert run(a, "verify", "--deep")["said"][0]["bad"] == []


def test_alone_it_repairs_from_the_origin(s3: S3Server, tmp_path: Path) -> None:
    source, data = put(s3, "alone.safetensors", 1)
    with Daemon(tmp_path / "a") as host:
        path = Path(host.pull(source)["path"])
        wait_until(lambda: blob(host, source)["durable"], 10, "it to be done with it")
        s3.proxy.reset_counts()
        flip(path, 3 * CHUNK)
        found = run(host, "verify")
        assert (found["code"], found["said"][0]["bad"]) == (0, [3])
        assert found["said"][0]["repaired"] == {"local": 0, "peer": {}, "origin": CHUNK}
        assert s3.proxy.egress == CHUNK
        assert path.read_bytes() == data


def test_after_an_unclean_boot_it_is_read_again_before_use(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = put(s3, "boot.safetensors", 2)
    host = Daemon(tmp_path / "a")
    with host:
        cut_off(host, source, monkeypatch)
        host.start()
        s3.proxy.reset_counts()
        shown = blob(host, source)
        assert (shown["suspect"], shown["had_bytes"]) == (True, 0)
        with host.client() as client, pytest.raises(UnknownBlob):
            client.path(source)
        report = host.pull(source)
        assert report["bytes_by_source"] == {"local": len(data) - CHUNK, "peer": {}, "origin": CHUNK}
        assert Path(report["path"]).read_bytes() == data
        assert s3.proxy.egress == CHUNK
        assert not blob(host, source)["suspect"]


def test_verify_repairs_what_is_suspect(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = put(s3, "suspect.safetensors", 3)
    host = Daemon(tmp_path / "a")
    with host:
        cut_off(host, source, monkeypatch)
        host.start()
        found = run(host, "verify")
        assert (found["code"], found["said"][0]["bad"]) == (0, [1])
        assert found["said"][0]["repaired"]["origin"] == CHUNK
        with host.client() as client:
            assert client.path(source).read_bytes() == data


def test_pinned_blobs_stay(s3: S3Server, pair: tuple[Daemon, Daemon]) -> None:
    a, b = pair
    source, data = put(s3, "pinned.safetensors", 4)
    a.pull(source)
    b.pull(source)
    pinned = run(a, "pin", source)
    assert (pinned["code"], pinned["said"][0]["pinned"], pinned["said"][0]["size"]) == (0, True, len(data))
    assert blob(a, source)["pinned"]
    wait_until(lambda: not blob(a, source)["leases"], 10, "a to be done with it")
    refused = run(a, "evict", source)
    assert (refused["code"], refused["said"]["freed"], refused["said"]["kept"][0]["why"]) == (8, 0, "pinned")
    name = blob(a, source)["blob"][:12]
    assert not run(a, "unpin", name)["said"][0]["pinned"]
    assert run(a, "evict", name) == {"code": 0, "said": {"freed": len(data), "kept": []}}  # b still had it from a
    assert run(a, "pin", source)["said"]["error"] == "UnknownBlob"
    assert run(a, "evict", "s3://care/never")["code"] == 4


def test_identical_files_are_stored_once(s3: S3Server, tmp_path: Path) -> None:
    (first, data), (second, _) = put(s3, "one.safetensors", 5), put(s3, "two.safetensors", 5)
    with Daemon(tmp_path / "a") as host, Daemon(tmp_path / "b", peers=(host,)) as other:
        paths = [Path(host.pull(source)["path"]) for source in (first, second)]
        wait_until(lambda: len({path.stat().st_ino for path in paths}) == 1, 10, "one file to be left")
        assert [path.read_bytes() == data for path in paths] == [True, True]
        with host.client() as client:
            assert client.status()["bytes"]["used"] == len(data)
        other.meets(host)
        path = Path(other.pull(first)["path"])
        wait_until(lambda: blob(other, first)["durable"], 10, "the other host to be done with it")
        s3.proxy.reset_counts()
        report = other.pull(second)  # by the ids that its peer tells, the very file is here
        assert report["bytes_by_source"] == {"local": len(data), "peer": {}, "origin": 0}
        assert Path(report["path"]).stat().st_ino == path.stat().st_ino


def test_what_differs_from_the_stated_digest_is_discarded(hub: HubServer, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    data = tensors(COUNT, CHUNK, 6)
    (model / "model.safetensors").write_bytes(data)
    hub.publish("org/lied", model)
    source = "hf://org/lied/model.safetensors"
    liar = Daemon(tmp_path / "a")
    host = Daemon(tmp_path / "b", peers=(liar,))
    with liar:
        liar.pull(source)
        with liar.client() as client:
            wait_until(lambda: client.ls()["blobs"][0]["checked"], 10, "the digest to be compared")
        liar.kill()
        forge(liar)
        liar.start()
        with host:
            host.meets(liar)
            sent = hub.cdn_bytes
            try:
                first = Path(host.pull(source)["path"])
            except BlobCorrupt:
                pass
            else:  # it may be used before it has been compared, and then goes
                wait_until(lambda: not first.exists(), 10, "the forgery to be discarded")
            report = host.pull(source)
            assert report["bytes_by_source"] == {"local": 0, "peer": {}, "origin": len(data)}
            assert Path(report["path"]).read_bytes() == data
            assert hub.cdn_bytes - sent >= len(data)
            with host.client() as client:
                (peer,) = client.peers()
                assert (peer["state"], peer["resting_seconds"] > 60) == ("resting", True)


def forge(host: Daemon) -> None:
    """Make a store hold other bytes than it was told to, consistently: ids and checks are those of the forgery."""
    store = Store.open(host.store)
    (info,) = store.blobs()
    entry = store._catalog.entry(info.blob)
    tables = store._catalog.tables(entry)
    offset, length = tables.manifest.plan.span(1)
    forged = bytes(length)
    write(store.path(info.blob), offset, forged)
    tables.manifest.learn(1, chunk_id(forged), check(forged))
    store._index.put_chunks(entry.record.serial, tables, [1])
    store.close()
