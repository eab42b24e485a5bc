"""Who has a blob mapped keeps its bytes: while it is evicted, while the daemon restarts, while the store is full."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.daemons import Daemon, cli
from tests.fleet.weights import tensors
from tests.fleet.workers import Worker
from tests.servers.loop import wait_until
from tests.servers.s3 import S3Server
from weightcache.core.turns import ORIGIN_READ
from weightcache.errors import StoreFull

SIZE = ORIGIN_READ  # bytes of a file's tensors, more or less
CAPACITY = 4 * ORIGIN_READ

WORK = """
import hashlib
from weightcache.runtime import load_file, safe_open

def digest(tensors):
    state = hashlib.sha256()
    for tensor in tensors.values():
        state.update(tensor.numpy())
    return state.hexdigest()
"""

_names = itertools.count()


@pytest.fixture(scope="module")
def host(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("mapped")
    with Daemon(root / "a", f"--capacity={CAPACITY}", env=s3_server.env()) as host:
        yield host


@pytest.fixture(scope="module")
def worker(host: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(tmp_path_factory.mktemp("worker") / "log", host.worker_env) as worker:
        worker.run(WORK)
        yield worker


def put(s3: S3Server, size: int = SIZE) -> tuple[str, str]:
    """A new file: its source, and the digest of its tensors."""
    seed = next(_names)
    data = tensors(4, size // 4, seed)
    s3.put("mapped", f"{seed}.safetensors", data)
    return f"s3://mapped/{seed}.safetensors", hashlib.sha256(memoryview(data)[-size:]).hexdigest()


def kept(host: Daemon, source: str) -> str:
    """Why an eviction leaves a file alone; "": it went."""
    with host.client() as client:
        return "".join(blob["why"] for blob in client.evict([source])["kept"])


def test_an_eviction_leaves_what_is_leased_or_mapped(s3: S3Server, host: Daemon, worker: Worker) -> None:
    source, digest = put(s3)
    worker.run(f"tensors = load_file({source!r})")
    refused = cli("evict", source, env=host.worker_env)
    assert (refused.returncode, "leased" in refused.stdout) == (8, True)
    host.kill()
    host.start()
    assert kept(host, source) == "mapped"  # the lease went with the daemon, the mapping did not
    assert worker.run("", "digest(tensors)") == digest
    assert Path(host.pull(source)["path"]).stat().st_nlink == 2
    worker.run("del tensors; import gc; gc.collect()")
    wait_until(lambda: not kept(host, source), 10, "the file to go")
    with host.client() as client:
        assert client.ls()["blobs"] == []


def test_a_full_store_evicts_others_and_never_this_one(s3: S3Server, host: Daemon, worker: Worker) -> None:
    source, digest = put(s3)
    worker.run(f"tensors = load_file({source!r})")
    others = [put(s3)[0] for _ in range(2 * CAPACITY // SIZE)]
    for other in others:
        host.pull(other)
    with host.client() as client:
        wait_until(lambda: all(blob["leases"] <= 1 for blob in client.ls()["blobs"]), 10, "the daemon's own care")
        here = {entry["source"] for entry in client.ls()["snapshots"]}
        assert here == {source, *others[-(CAPACITY // SIZE - 2) :]}  # the headers take the place of one
        with pytest.raises(StoreFull, match=r"no room for .*: it needs .* \(kept: 1 leased\); unpin or release"):
            client.pull(put(s3, CAPACITY)[0])
        assert {entry["source"] for entry in client.ls()["snapshots"]} == here  # nothing went in vain
    assert worker.run("", "digest(tensors)") == digest
    worker.run("del tensors")


def test_a_load_goes_on_when_the_daemon_restarts_in_the_middle(s3: S3Server, host: Daemon, worker: Worker) -> None:
    data = tensors(2, ORIGIN_READ, seed=77)
    s3.put("mapped", "arriving.safetensors", data)
    s3.proxy.stall(r"arriving\.safetensors$", after=2 << 20, times=100)  # no read of tensors ends
    worker.run("file = safe_open('s3://mapped/arriving.safetensors', 'pt')")
    worker.start("tensors = file.get_tensors()", "digest(tensors)")
    wait_until(lambda: s3.proxy.egress >= 2 << 20, 20, "the load to be under way")
    host.kill()
    s3.proxy.heal()
    host.start()
    assert worker.result() == hashlib.sha256(memoryview(data)[-2 * ORIGIN_READ :]).hexdigest()
    assert "load interrupted" in worker.log.read_text()
    worker.run("del tensors, file")


def test_what_a_worker_writes_is_its_own(s3: S3Server, host: Daemon, worker: Worker) -> None:
    source, digest = put(s3)
    worker.run(f"mine, other = load_file({source!r}), load_file({source!r})")
    worker.run("for tensor in mine.values(): tensor.zero_()")
    assert worker.run("", "digest(other)") == digest
    assert worker.run("", "digest(mine)") == hashlib.sha256(bytes(SIZE)).hexdigest()
    assert hashlib.sha256(memoryview(Path(host.pull(source)["path"]).read_bytes())[-SIZE:]).hexdigest() == digest
    worker.run("del mine, other")


def test_a_worker_that_is_killed_holds_nothing(s3: S3Server, host: Daemon, worker: Worker) -> None:
    source, _ = put(s3)
    worker.run(f"tensors = load_file({source!r})")
    assert kept(host, source) == "leased"
    worker.kill()
    wait_until(lambda: not kept(host, source), 10, "the lease to end")
