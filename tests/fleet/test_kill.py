"""SIGKILL at any moment, of the daemon or of its bulk processes: what was had stays had, and loads end byte-exact."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.fleet.daemons import Daemon, Json, from_peers
from tests.fleet.weights import tensors
from tests.servers.loop import wait_until
from tests.servers.s3 import S3Server
from weightcache.core.turns import ORIGIN_READ
from weightcache.errors import DaemonError

KILLS = 50
STREAMS = 2
SEED = int(os.environ.get("WEIGHTCACHE_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
# Bytes: reads, the start of a file, and what states its version.
IN_FLIGHT = STREAMS * ORIGIN_READ + (256 << 10) + (64 << 10)


@pytest.mark.timeout(600)  # a second each; on a busy machine several
def test_every_restart_resumes(s3: S3Server, tmp_path: Path) -> None:
    print(f"seed {SEED}")  # WEIGHTCACHE_TEST_SEED repeats it
    draw = random.Random(SEED)
    data = tensors(64, 1 << 20, SEED)  # a chunk each; one read brings up to eight
    s3.put("kill", "model.safetensors", data)
    source = "s3://kill/model.safetensors"
    host = Daemon(tmp_path / "a", env={"WEIGHTCACHE_ORIGIN_STREAMS": str(STREAMS)})
    had = whole = 0
    with host, ThreadPoolExecutor(1) as threads:
        for life in range(KILLS):
            s3.proxy.reset_counts()
            moment = draw.randrange(1, 40 << 20)
            loading = threads.submit(host.pull, source)
            while s3.proxy.egress < moment and not loading.done():
                threading.Event().wait(0.0005)
            host.kill()
            try:
                report = loading.result(30)
            except DaemonError:
                report = None
            sent = s3.proxy.egress
            host.start()
            with host.client() as client:
                blobs = client.ls()["blobs"]
                kept = blobs[0]["had_bytes"] if blobs else 0
                assert had <= kept, f"life {life}: what was had was lost"
                assert sent - (kept - had) <= IN_FLIGHT, f"life {life}: too much was read again"
                had = kept
                if report is not None:
                    assert had == len(data)
                if had == len(data):
                    report = client.pull(source)
                    assert report["bytes_by_source"] == {"local": len(data), "peer": {}, "origin": 0}
                    assert Path(report["path"]).read_bytes() == data
                    assert host.evict(source) == len(data)
                    whole, had = whole + 1, 0
        report = host.pull(source)
        assert report["bytes_by_source"]["local"] == had
        assert Path(report["path"]).read_bytes() == data
    assert whole > 0


def at_first_news(deed: Callable[[], None]) -> Callable[[Json], None]:
    """An event handler that does ``deed`` once, when bytes have landed."""
    left = [deed]

    def on_event(event: Json) -> None:
        if event["event"] == "had" and left:
            left.pop()()

    return on_event


def status(host: Daemon) -> Json:
    with host.client() as client:
        return client.status()


def kill_process(host: Daemon, role: str) -> None:
    os.kill(status(host)["processes"][role][0], signal.SIGKILL)


def test_bulk_processes_and_peers_die_in_mid_load(s3: S3Server, tmp_path: Path) -> None:
    a = Daemon(tmp_path / "a")
    b = Daemon(tmp_path / "b", peers=(a,))
    data = tensors(12, ORIGIN_READ, SEED)
    s3.put("kill", "large.safetensors", data)
    source = "s3://kill/large.safetensors"

    def load(host: Daemon, deed: Callable[[], None]) -> Json:
        with host.client() as client:
            report = client.pull(source, at_first_news(deed))
            assert Path(report["path"]).read_bytes() == data
            return report

    with a, b:
        b.meets(a)
        report = load(a, lambda: kill_process(a, "origin"))
        assert report["bytes_by_source"]["origin"] == len(data)
        assert any("own origin process died" in why for why in report["fallbacks"])

        for host, role in ((b, "recv"), (a, "send")):
            report = load(b, partial(kill_process, host, role))
            assert from_peers(report) > 0
            assert from_peers(report) + report["bytes_by_source"]["origin"] == len(data)
            assert b.evict(source) == len(data)

        with Daemon(tmp_path / "c", peers=(a,)) as c:  # to which no process of a has died yet
            c.meets(a)
            wait_until(lambda: status(a)["processes"]["send"], 20, "a to serve again")
            report = load(c, a.kill)
        assert from_peers(report) > 0
        assert report["bytes_by_source"]["origin"] > 0
        assert any(a.address in why for why in report["fallbacks"])
