"""Streams over whole daemons: a pipeline from a peer, through a restart, without a daemon; and what a lease is for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.daemons import Daemon
from tests.fleet.weights import tensors
from tests.fleet.workers import Worker, WorkerError
from tests.servers.loop import wait_until
from tests.servers.s3 import S3Server
from weightcache.core.turns import ORIGIN_READ

WORK = """
import hashlib
from weightcache.runtime import stream_file, stream_snapshot
from weightcache.runtime.emulated import Emulated

def digests(stream):
    found = {}
    for path, name, tensor in stream:
        found.setdefault(path, hashlib.sha256()).update(tensor.numpy())
    return [[path, state.hexdigest()] for path, state in found.items()]
"""
PARTS = ("vae/v", "unet/u", "text_encoder/t")
IN_ORDER = [f"{name}.safetensors" for name in reversed(PARTS)]


def put(s3: S3Server, prefix: str) -> tuple[str, list[list[str]]]:
    """A pipeline of two chunks a component: its source, and the digests of its files' tensors in order of use."""
    found = {}
    for seed, name in enumerate(PARTS):
        data = tensors(2, ORIGIN_READ, seed)
        s3.put("stream", f"{prefix}/{name}.safetensors", data)
        found[f"{name}.safetensors"] = hashlib.sha256(memoryview(data)[-2 * ORIGIN_READ :]).hexdigest()
    s3.put("stream", f"{prefix}/model_index.json", b"{}")
    return f"s3://stream/{prefix}/", [[name, found[name]] for name in IN_ORDER]


@pytest.fixture(scope="module")
def hosts(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Daemon]]:
    root, env = tmp_path_factory.mktemp("stream"), s3_server.env()
    with Daemon(root / "a", env=env) as a, Daemon(root / "b", env=env, peers=(a,)) as b:
        b.meets(a)
        yield a, b


@pytest.fixture
def worker(hosts: tuple[Daemon, Daemon], tmp_path: Path) -> Iterator[Worker]:
    with Worker(tmp_path / "log", hosts[1].worker_env) as worker:
        worker.run(WORK)
        yield worker


def test_a_pipeline_comes_from_a_peer_in_the_order_of_its_use(
    s3: S3Server, hosts: tuple[Daemon, Daemon], worker: Worker
) -> None:
    source, expected = put(s3, "peer")
    size = hosts[0].pull(source)["bytes_total"]
    worker.run(f"stream = stream_snapshot({source!r}, device=Emulated(checked=True))")
    assert worker.run("", "digests(stream)") == expected
    found = worker.run("", "stream.report.to_json()")
    came = found["bytes_by_source"]
    assert came[hosts[0].address] + came.get("local", 0) == size  # files of one shape have one header: it comes once
    assert came.get("local", 0) < ORIGIN_READ
    assert found["bytes"] == 6 * ORIGIN_READ
    assert found["stages"]["copy"]["bytes"] == 6 * ORIGIN_READ
    with hosts[1].client() as client:  # it holds nothing any more, though the worker lives
        wait_until(lambda: not client.evict([source])["kept"], 10, "the leases to end")
    name = f"{source}unet/u.safetensors"
    worker.run(f"stream = stream_file({name!r}); tensors = dict(stream)")
    assert list(worker.run("", "stream.report.by_source()")) == [hosts[0].address]


def test_a_stream_goes_on_when_the_daemon_restarts_in_the_middle(
    s3: S3Server, hosts: tuple[Daemon, Daemon], worker: Worker
) -> None:
    source, expected = put(s3, "restart")
    stalled = s3.proxy.stall(r"unet/u\.safetensors$", after=2 << 20, times=100)
    worker.run(f"stream = stream_snapshot({source!r})")
    worker.start("", "digests(stream)")
    assert stalled.struck.wait(20)
    hosts[1].kill()
    s3.proxy.heal()
    hosts[1].start()
    assert worker.result() == expected
    assert "load interrupted" in worker.log.read_text()


def test_a_source_that_is_gone_is_its_error(s3: S3Server, worker: Worker) -> None:
    with pytest.raises(WorkerError, match="SourceNotFound"):
        worker.run("stream_snapshot('s3://stream/nothing/')")


def test_who_leaves_early_holds_nothing(s3: S3Server, hosts: tuple[Daemon, Daemon], worker: Worker) -> None:
    source, _ = put(s3, "early")
    hosts[1].pull(source)
    worker.run(f"stream = stream_snapshot({source!r}); next(stream)")
    with hosts[1].client() as client:
        assert {kept["why"] for kept in client.evict([source])["kept"]} == {"leased"}
        worker.run("stream.close()")
        wait_until(lambda: not client.evict([source])["kept"], 10, "the leases to end")


def test_without_a_daemon_the_store_is_held_until_the_end(s3: S3Server, tmp_path: Path) -> None:
    source, expected = put(s3, "embedded")
    env = {"WEIGHTCACHE_STORE": str(tmp_path / "store"), "WEIGHTCACHE_SOCKET": str(tmp_path / "sock")}
    with Worker(tmp_path / "log", env | s3.env()) as worker:
        worker.run(WORK + f"stream = stream_snapshot({source!r})")
        assert worker.run("", "digests(stream)") == expected
        assert worker.run("", "stream.report.by_source()")["origin"] > 6 * ORIGIN_READ
        assert worker.end() == 0
