"""Hosts with several bulk processes a side. Receivers land slowly here, so that there is work for all of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.fleet.daemons import Daemon, Json, from_peers, slowly, written
from tests.fleet.weights import tensors
from tests.servers.loop import wait_until
from tests.servers.s3 import S3Server
from weightcache.tools.local import free_ports

MIB = 1 << 20
TWO = "--bulk-processes=2"
SOURCE = "s3://lanes/blob.safetensors"


@pytest.fixture(scope="module")
def data(s3_server: S3Server) -> bytes:
    data = tensors(64, MIB, 31)
    s3_server.put("lanes", "blob.safetensors", data)
    return data


@contextmanager
def two_hosts(s3_server: S3Server, tmp_path: Path, *options: str) -> Iterator[tuple[Daemon, Daemon]]:
    """One that has it all, and one whose second receiver has had work."""
    a = Daemon(tmp_path / "a", TWO, *options, env=s3_server.env())
    b = Daemon(tmp_path / "b", TWO, peers=(a,), env=s3_server.env() | slowly())
    with a, b:
        b.meets(a)
        a.pull(SOURCE)
        b.pull(SOURCE)
        wait_until(lambda: len(processes(b, "recv")) == 2, 10, "the second receiver")
        b.evict(SOURCE)
        yield a, b


def processes(host: Daemon, role: str) -> list[int]:
    with host.client() as client:
        return list(client.status()["processes"][role])


def moved(host: Daemon) -> Json:
    with host.client() as client:
        return dict(client.status()["moved"])


def test_the_work_is_split_between_all_processes(s3_server: S3Server, data: bytes, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with two_hosts(s3_server, tmp_path, f"--metrics=127.0.0.1:{port}") as (a, b):
        pids = [*processes(a, "send"), *processes(b, "recv")]
        before = [written(pid) for pid in pids]
        report = b.pull(SOURCE)
        assert Path(report["path"]).read_bytes() == data
        assert (from_peers(report), report["fallbacks"]) == (len(data), [])
        assert len(pids) == 4
        for pid, earlier in zip(pids, before, strict=True):
            assert 0.35 < (written(pid) - earlier) / len(data) < 0.65

        # What they count is added up, once each has told: within a second.
        wait_until(lambda: sum(moved(a)["sent"].values()) == 2 * len(data), 10, "what was sent")
        assert (moved(a)["sent"], moved(b)["peer"]) == ({b.address: 2 * len(data)}, {a.address: 2 * len(data)})
        metrics = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        found = dict(line.split() for line in metrics.splitlines() if line[0] != "#")
        assert float(found["weightcache_sent_bytes_total"]) == 2 * len(data)
        assert float(found["weightcache_served_connections"]) == 2

        assert held(a)  # until both senders let go of it
        assert a.evict(SOURCE) == len(data)
        assert not held(a)


def held(host: Daemon) -> list[str]:
    """The blobs that its senders have open."""
    links = [link for pid in processes(host, "send") for link in Path(f"/proc/{pid}/fd").iterdir()]
    return [name for link in links if (name := os.readlink(link)).startswith(f"{host.store}/blobs/")]


@pytest.mark.parametrize("role", ["recv", "send"])
def test_one_that_dies_takes_nothing_else_along(s3_server: S3Server, data: bytes, tmp_path: Path, role: str) -> None:
    with two_hosts(s3_server, tmp_path) as (a, b):
        host = b if role == "recv" else a
        first, second = processes(host, role)
        with b.client() as client:
            report = client.pull(SOURCE, once_had(lambda: os.kill(second, signal.SIGKILL)))
        assert Path(report["path"]).read_bytes() == data
        assert from_peers(report) + report["bytes_by_source"]["origin"] == len(data)
        assert from_peers(report) > 0
        if role == "recv":  # it did not wait for what died, and blames nobody
            assert (from_peers(report), report["fallbacks"]) == (len(data), [])
        assert first in processes(host, role)


def once_had(deed: Callable[[], None]) -> Callable[[Json], None]:
    """Do it once, when bytes have landed."""
    left = [deed]

    def on_event(event: Json) -> None:
        if event["event"] == "had" and left:
            left.pop()()

    return on_event
