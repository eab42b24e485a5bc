"""The main job: the first host loads from the origin, every later one from its peers, and each gets the very bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.numpy

from tests.fleet.daemons import Daemon, Json, cli, from_peers
from tests.fleet.weights import minilm, same_files, tensors
from tests.fleet.workers import Worker, WorkerError
from tests.servers.hub import HubServer
from tests.servers.loop import wait_until
from tests.servers.s3 import S3Server
from weightcache.client import Client
from weightcache.config import Config
from weightcache.core.turns import ORIGIN_READ

NEVER = 1 << 60  # bytes: what stalls after so many passes

COMPARE = """
import torch, safetensors.torch
from weightcache.runtime import load_file, safe_open

def same(ours, path):
    real = safetensors.torch.load_file(path)
    assert list(ours) == list(real)
    return all(torch.equal(ours[n], t) and ours[n].dtype == t.dtype for n, t in real.items())
"""

FIRST_TENSOR = """
import queue, threading
first = queue.Queue()
def take(name):
    first.put((name, bytes(file.get_tensor(name)[:64].tolist()).hex()))
for name in file.keys():
    threading.Thread(target=take, args=(name,), daemon=True).start()
"""


@dataclass
class Fleet:
    """Three daemons, the last of which knows only the others, and the model as objects below a prefix."""

    hosts: list[Daemon]
    source: str
    size: int


@pytest.fixture(scope="module")
def fleet(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    files = [path for path in minilm().rglob("*") if path.is_file()]
    for path in files:
        s3_server.put("main", f"minilm/{path.relative_to(minilm())}", path)
    root, env = tmp_path_factory.mktemp("main"), s3_server.env()
    with (
        Daemon(root / "a", env=env) as a,
        Daemon(root / "b", env=env, peers=(a,)) as b,
        Daemon(root / "c", env=env, peers=(a, b)) as c,
    ):
        c.meets(a, b)
        b.meets(a)
        yield Fleet([a, b, c], "s3://main/minilm/", sum(path.stat().st_size for path in files))


def test_the_first_host_reads_the_origin_once(fleet: Fleet, s3: S3Server) -> None:
    done = cli("pull", "--json", fleet.source, env=fleet.hosts[0].worker_env)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["bytes_total"] == fleet.size
    assert report["bytes_by_source"] == {"local": 0, "peer": {}, "origin": fleet.size}
    assert report["fallbacks"] == []
    assert 0 < report["seconds"] < 30
    assert same_files(Path(report["path"]), minilm()) == fleet.size
    reads = Counter(read.path for read in s3.proxy.exchanges if read.method == "GET" and "list-type" not in read.query)
    assert s3.proxy.egress - fleet.size < 16 << 10  # no byte twice, the headers' included; and what lists the prefix
    assert reads.pop("/main/minilm/model.safetensors") <= 1 + fleet.size // (ORIGIN_READ // 2)  # in large pieces
    assert max(reads.values()) == 2  # of the one that is no safetensors and larger than a first look
    assert reads.total() == len(reads) + 1


def test_the_second_loads_from_it_with_the_origin_gone(fleet: Fleet, s3: S3Server) -> None:
    s3.stop()
    s3.proxy.refuse()
    try:
        with fleet.hosts[1].client() as client:
            events: list[Json] = []
            report = client.pull(fleet.source, events.append)
        assert report["bytes_by_source"] == {"local": 0, "peer": {fleet.hosts[0].address: fleet.size}, "origin": 0}
        assert report["fallbacks"] == []
        assert same_files(Path(report["path"]), minilm()) == fleet.size
        assert events[0]["event"] == "snapshot"
        assert [event["done"] for event in events if event["event"] == "progress"] == sorted(
            event["done"] for event in events if event["event"] == "progress"
        )
    finally:
        s3.proxy.accept()
        s3.start()
    assert s3.proxy.egress == 0


async def test_the_third_loads_from_both_at_once(fleet: Fleet, s3: S3Server) -> None:
    a, b, c = fleet.hosts
    async with Client(Config(store=c.store, socket=c.socket)) as client:
        report = await client.pull(fleet.source)
        assert await client.path(fleet.source) == Path(report["path"])
    peers = report["bytes_by_source"]["peer"]
    assert peers.keys() == {a.address, b.address}
    assert min(peers.values()) > ORIGIN_READ
    assert sum(peers.values()) == fleet.size
    assert same_files(Path(report["path"]), minilm()) == fleet.size
    assert s3.proxy.requests == 0


def test_a_warm_load_is_local(fleet: Fleet, s3: S3Server) -> None:
    for host in fleet.hosts:
        report = host.pull(fleet.source)
        assert report["bytes_by_source"] == {"local": fleet.size, "peer": {}, "origin": 0}
    assert s3.proxy.requests == 0


def test_workers_of_every_host_read_the_same_tensors(fleet: Fleet, s3: S3Server, tmp_path: Path) -> None:
    original = str(minilm() / "model.safetensors")
    for host in fleet.hosts:
        with Worker(tmp_path / "worker.log", host.worker_env) as worker:
            worker.run(COMPARE + f"source = {fleet.source + 'model.safetensors'!r}; original = {original!r}")
            assert worker.run("", "same(load_file(source), original)")
            worker.run(
                "with safe_open(source, 'pt') as ours, safetensors.safe_open(original, 'pt') as real:\n"
                "    equal = all(torch.equal(ours.get_tensor(n), real.get_tensor(n)) for n in real.keys())\n"
                "    about = ours.keys() == real.keys() and ours.metadata() == real.metadata()\n"
            )
            assert worker.run("", "[equal, about]") == [True, True]
            with pytest.raises(WorkerError, match=r"SourceError: .* is a directory .* model\.safetensors"):
                worker.run(f"load_file({fleet.source!r})")
            assert worker.end() == 0
        assert (tmp_path / "worker.log").read_text() == ""
    assert s3.proxy.egress == 0


def test_a_tensor_is_usable_while_the_rest_is_on_its_way(s3: S3Server, tmp_path: Path) -> None:
    data = tensors(27, ORIGIN_READ // 4)  # several of them in each read, the last one, too
    s3.put("main", "arriving.safetensors", data)
    # Its version, its header and one read pass, all others wait.
    s3.proxy.stall(r"arriving\.safetensors$", after=NEVER, begin=1)
    s3.proxy.stall(r"arriving\.safetensors$", times=1000, begin=1)
    host = Daemon(tmp_path / "a")
    with host, Worker(tmp_path / "log", host.worker_env) as worker:
        worker.run("from weightcache.runtime import safe_open")
        worker.run("file = safe_open('s3://main/arriving.safetensors', 'pt')")
        first = worker.run(FIRST_TENSOR, "first.get()")
        with host.client() as client:
            assert client.ls()["snapshots"][0]["had"] < 2 * ORIGIN_READ
        s3.proxy.heal()
        found = worker.run("", "{n: bytes(file.get_tensor(n)[:64].tolist()).hex() for n in file.keys()}")
    with_numpy = {name: tensor[:64].tobytes().hex() for name, tensor in safetensors.numpy.load(data).items()}
    assert found == with_numpy
    assert first == [first[0], with_numpy[first[0]]]


def test_a_host_that_joins_late_is_used_and_uses(s3: S3Server, tmp_path: Path) -> None:
    data = tensors(16, ORIGIN_READ // 4)
    s3.put("main", "late.safetensors", data)
    source, slow = "s3://main/late.safetensors", {"WEIGHTCACHE_ORIGIN_STREAMS": "2"}
    # Its version, its header and one read pass, and then the first host is stuck.
    s3.proxy.stall(r"late\.safetensors$", after=NEVER, begin=1)
    stalls = [s3.proxy.stall(r"late\.safetensors$", begin=1) for _ in range(2)]
    early = Daemon(tmp_path / "a", env=slow)
    late = Daemon(tmp_path / "b", peers=(early,), env=slow)
    with early, ThreadPoolExecutor() as threads:
        first = threads.submit(early.pull, source)
        assert all(stall.struck.wait(20) for stall in stalls)
        with late:
            second = threads.submit(late.pull, source).result(30)
            with early.client() as client:
                wait_until(lambda: client.status()["moved"]["peer"].get(late.address), 20, "news of the late host")
                s3.proxy.heal()
            report = first.result(30)
            assert Path(second["path"]).read_bytes() == Path(report["path"]).read_bytes() == data
            assert second["bytes_by_source"]["peer"][early.address] > 0
            assert from_peers(second) + second["bytes_by_source"]["origin"] == len(data)
            assert from_peers(report) + report["bytes_by_source"]["origin"] == len(data)


def test_a_second_host_never_asks_the_hub(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.publish("org/minilm", minilm())
    size = sum(path.stat().st_size for path in minilm().rglob("*") if path.is_file())
    with Daemon(tmp_path / "a") as a, Daemon(tmp_path / "b", peers=(a,)) as b:
        b.meets(a)
        first = a.pull("hf://org/minilm")
        assert (first["revision"], first["bytes_by_source"]["origin"]) == (commit, size)
        asked, sent = dict(hub.counts), hub.cdn_bytes
        assert sent == (minilm() / "model.safetensors").stat().st_size
        second = b.pull("hf://org/minilm")
        assert second["bytes_by_source"] == {"local": 0, "peer": {a.address: size}, "origin": 0}
        assert same_files(Path(second["path"]), minilm()) == size
        assert (dict(hub.counts), hub.cdn_bytes) == (asked, sent)
