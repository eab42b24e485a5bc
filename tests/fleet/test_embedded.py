"""Without a daemon a process works on the store by itself; with one, many workers are one load."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fleet.daemons import Daemon, cli
from tests.fleet.weights import tensors
from tests.fleet.workers import Worker
from tests.servers.loop import wait_until
from tests.servers.s3 import S3Server
from tests.store.support import content, fill
from weightcache import SyncClient
from weightcache.config import Config
from weightcache.core.turns import ORIGIN_READ
from weightcache.errors import StoreError
from weightcache.store import Store

COUNT = 4
WORKERS = 20

LOAD = """
import hashlib
from weightcache.runtime import load_file

def digest(source):
    state = hashlib.sha256()
    for tensor in load_file(source).values():
        state.update(tensor.numpy())
    return state.hexdigest()
"""
PULL = """
import hashlib, os
from weightcache import SyncClient

def pulled(*sources):
    from concurrent.futures import ThreadPoolExecutor
    with SyncClient() as client, ThreadPoolExecutor() as threads:
        reports = list(threads.map(client.pull, sources))
        return [[hashlib.sha256(open(r["path"], "rb").read()).hexdigest(), r["bytes_by_source"]] for r in reports]
"""


@pytest.fixture
def env(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A store, a socket at which nobody answers, and a directory for temporary files that must be empty afterwards."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    yield {
        "WEIGHTCACHE_STORE": str(tmp_path / "store"),
        "WEIGHTCACHE_SOCKET": str(tmp_path / "sock"),
        "TMPDIR": str(temporary),
    }
    assert [path.name for path in temporary.iterdir() if path.name.startswith("weightcache")] == []
    wait_until(lambda: not processes(temporary), 5, "no process to be left behind")


def processes(temporary: Path) -> list[str]:
    """The processes whose directory for temporary files this is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={temporary}\0".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue  # it has just ended
    return found


def put(s3: S3Server, name: str, seed: int) -> tuple[str, bytes, str]:
    data = tensors(COUNT, ORIGIN_READ, seed)
    s3.put("embedded", name, data)
    return f"s3://embedded/{name}", data, hashlib.sha256(memoryview(data)[-COUNT * ORIGIN_READ :]).hexdigest()


def assert_once(s3: S3Server, size: int) -> None:
    """Its origin sent everything once, and besides only the answers that nothing is published beside an object."""
    assert size <= s3.proxy.egress < size + 1024


def test_one_line_loads_without_a_daemon(s3: S3Server, env: dict[str, str], tmp_path: Path) -> None:
    source, data, digest = put(s3, "line.safetensors", 1)
    with Worker(tmp_path / "log", env) as worker:
        assert worker.run(LOAD, f"digest({source!r})") == digest
        assert_once(s3, len(data))
        assert worker.end() == 0
    with Worker(tmp_path / "log", env) as worker:  # the next process finds it
        assert worker.run(LOAD, f"digest({source!r})") == digest
        assert worker.end() == 0
    assert_once(s3, len(data))
    assert (tmp_path / "log").read_text() == ""
    shown = cli("path", source, env=env)
    assert Path(shown.stdout.strip()).read_bytes() == data


def test_a_client_pulls_several_at_once(s3: S3Server, env: dict[str, str], tmp_path: Path) -> None:
    (first, one, _), (second, two, _) = put(s3, "first.safetensors", 2), put(s3, "second.safetensors", 3)
    with Worker(tmp_path / "log", env) as worker:
        found = worker.run(PULL, f"pulled({first!r}, {second!r})")
        assert found == [
            [hashlib.sha256(data).hexdigest(), {"local": 0, "peer": {}, "origin": len(data)}] for data in (one, two)
        ]
        assert worker.end() == 0
    assert_once(s3, len(one) + len(two))


def test_two_processes_take_turns_on_one_store(s3: S3Server, env: dict[str, str], tmp_path: Path) -> None:
    source, data, digest = put(s3, "turns.safetensors", 4)
    with Worker(tmp_path / "one", env) as one, Worker(tmp_path / "two", env) as two:
        for worker in (one, two):
            worker.run(LOAD)
        for worker in (one, two):
            worker.start("", f"digest({source!r})")
        assert [worker.result() for worker in (one, two)] == [digest, digest]
        assert_once(s3, len(data))
        assert [worker.end() for worker in (one, two)] == [0, 0]


def test_an_embedded_node_that_is_killed_leaves_no_process(s3: S3Server, env: dict[str, str], tmp_path: Path) -> None:
    source, _, digest = put(s3, "killed.safetensors", 5)
    s3.proxy.stall(r"killed\.safetensors$", after=1 << 20, times=100)
    with Worker(tmp_path / "log", env) as worker:
        worker.start(LOAD, f"digest({source!r})")
        wait_until(lambda: s3.proxy.egress >= 1 << 20, 20, "the load to be under way")
        worker.kill()
    s3.proxy.heal()
    for left in Path(env["TMPDIR"]).iterdir():  # nobody can clean up behind SIGKILL
        for file in left.iterdir():
            file.unlink()
        left.rmdir()
    with Worker(tmp_path / "log", env) as worker:
        assert worker.run(LOAD, f"digest({source!r})") == digest
        assert worker.end() == 0


ENDS = {
    "a stream is open": """
from weightcache.runtime import stream_file
stream = stream_file(source)
next(stream)
""",
    "a thread loads": """
import threading
from weightcache.runtime import load_file
threading.Thread(target=load_file, args=(source,), daemon=True).start()
""",
    "the main thread has a handle": """
from weightcache.runtime import safe_open
handle = safe_open(source, "pt")
tensor = handle.get_tensor(handle.offset_keys()[0])
""",
}


@pytest.mark.parametrize("way", ENDS)
def test_a_process_that_ends_in_the_middle_of_its_load(
    way: str, s3: S3Server, env: dict[str, str], tmp_path: Path
) -> None:
    """It ends at once and quietly; nothing is left (see ``env``), and the next has the store to itself."""
    source, _, digest = put(s3, "ends.safetensors", 6)
    s3.proxy.stall(r"ends\.safetensors$", after=1 << 20, times=100, begin=ORIGIN_READ)
    with Worker(tmp_path / "log", env) as worker:
        worker.run(f"source = {source!r}{ENDS[way]}", "None")
        wait_until(lambda: s3.proxy.egress > ORIGIN_READ, 20, "the load to be under way")
        assert worker.end() == 0
    said = (tmp_path / "log").read_text()
    told = said.rstrip().endswith("it was closed while it was still arriving")  # which ends a thread, as Python says
    assert told if way == "a thread loads" else not said
    s3.proxy.heal()
    with Worker(tmp_path / "log", env) as worker:
        assert worker.run(LOAD, f"digest({source!r})") == digest
        assert worker.end() == 0


def test_many_workers_of_a_daemon_are_one_load(s3: S3Server, tmp_path: Path) -> None:
    source, data, _ = put(s3, "many.safetensors", 6)
    with Daemon(tmp_path / "a") as host, ThreadPoolExecutor(WORKERS) as threads:
        reports = list(threads.map(host.pull, [source] * WORKERS))
        assert_once(s3, len(data))
        assert {Path(report["path"]).read_bytes() == data for report in reports} == {True}
        with host.client() as client:
            wait_until(lambda: client.ls()["blobs"][0]["leases"] == 0, 10, "all leases to end")
            assert client.status()["loads"] == []


def test_what_fails_in_the_middle_of_a_stream_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path / "store")
    fill(store, content("model", 1 << 20))
    store.close()

    def unreadable(*_: object, **__: object) -> Iterator[tuple[int, bool]]:
        raise StoreError("the disk is on fire")

    monkeypatch.setattr(Store, "scrub", unreadable)
    with SyncClient(Config(store=tmp_path / "store", socket=tmp_path / "sock")) as client:
        with pytest.raises(StoreError, match="the disk is on fire"):
            client.verify()
        assert len(client.ls()["blobs"]) == 1
