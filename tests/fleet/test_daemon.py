"""The daemon as an operator meets it: how it starts and stops, what it shows, what it does when a part of it dies."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fleet.bad_peer import read
from tests.fleet.daemons import Daemon, Json, cli
from tests.fleet.weights import tensors
from tests.servers.loop import accepts, wait_until
from tests.servers.s3 import S3Server
from weightcache.core.ids import blob_id, check, chunk_id
from weightcache.core.layout import ChunkPlan
from weightcache.core.manifest import Manifest
from weightcache.errors import DaemonError, SourceNotFound
from weightcache.store import Store
from weightcache.tools.coldstart_machine import cpu
from weightcache.tools.local import free_ports

MIB = 1 << 20
NEVER = 1 << 60
STEPS = ("started", "died")  # of a bulk process


def status(host: Daemon) -> Json:
    with host.client() as client:
        return client.status()


def family(host: Daemon) -> list[int]:
    """The daemon's process and those of its own that run now."""
    assert host.process is not None
    return [host.process.pid, *chain.from_iterable(status(host)["processes"].values())]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def lines(host: Daemon) -> list[Json]:
    """Its log. Each line is one JSON object, or this fails."""
    return [json.loads(line) for line in host.log.read_text().splitlines()]


# -- start and stop


def test_sigterm_ends_it_within_two_seconds_in_the_middle_of_a_load(s3: S3Server, tmp_path: Path) -> None:
    data, source = tensors(24, MIB, seed=1), "s3://fleet/daemon/stopped.safetensors"
    s3.put("fleet", "daemon/stopped.safetensors", data)
    s3.proxy.stall(r"stopped\.safetensors", after=NEVER, times=4)  # version, digest, header and a part pass
    stuck = s3.proxy.stall(r"stopped\.safetensors")
    host = Daemon(tmp_path / "host", "--origin-streams=2", env=s3.env())
    other = Daemon(tmp_path / "other", peers=(host,))
    with host, other, ThreadPoolExecutor(1) as pool:
        other.meets(host)
        loading = pool.submit(host.pull, source)
        assert stuck.struck.wait(20)
        wait_until(lambda: status(host)["loads"][0]["had_chunks"], 10, "a part to have landed")
        pids = family(host)
        assert len(pids) >= 3
        began = time.monotonic()
        assert host.stop() == 0
        assert time.monotonic() - began < 2
        with pytest.raises(DaemonError):
            loading.result(10)
        wait_until(lambda: not any(map(is_alive, pids)), 2, "all of its processes to be gone")
        assert not host.socket.exists()
        assert not accepts(host.port)
        assert not accepts(host.bulk_port)
        s3.proxy.heal()
        with host:  # and what it had, it has
            report = host.pull(source)
            assert read(report) == data
            assert report["bytes_by_source"]["local"] > 0
    assert {line["level"] for line in lines(host)} <= {"info", "warning"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with Daemon(tmp_path / "host") as host:
        assert host.process is not None
        host.process.send_signal(number)
        assert host.process.wait(2) == 0
        assert not host.socket.exists()


def test_a_store_of_100_000_chunks_costs_half_a_second_at_most(tmp_path: Path) -> None:
    fill(tmp_path / "full/store", blobs=20, chunks=5000)
    took = []
    for name, blobs in (("empty", 0), ("full", 20)):
        with Daemon(tmp_path / name) as host, host.client() as client:
            assert client.status()["blobs"] == {"complete": blobs, "partial": 0}
            assert host.process is not None
            took.append(cpu([host.process.pid]))  # others use this machine, too
    assert took[1] < took[0] + 0.5, took


def fill(root: Path, blobs: int, chunks: int) -> None:
    """A store of small chunks, all had and durable, made as a daemon would make it."""
    data = bytes(chunks)
    zero = chunk_id(data[:1]), check(data[:1])
    store = Store.open(root)
    for number in range(blobs):
        manifest = Manifest(blob_id(f"https://host/{number}", "etag:1", chunks), ChunkPlan(chunks, range(chunks)))
        store.create(manifest, f"{number}.bin")
        assert store.record(manifest.blob, [(index, *zero) for index in range(chunks)])
        store.settle(manifest.blob)
    store.close()


# -- what it shows


def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def metrics(port: int) -> dict[tuple[str, ...], float]:
    """Every sample by name and labels, as Prometheus would read it."""
    code, text = get(port, "/metrics")
    assert code == 200
    samples = [sample for found in text_string_to_metric_families(text) for sample in found.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def test_metrics_count_what_moves(s3: S3Server, tmp_path: Path) -> None:
    data, source = tensors(6, MIB, seed=2), "s3://fleet/daemon/counted.safetensors"
    s3.put("fleet", "daemon/counted.safetensors", data)
    one, two = free_ports(2)
    first = Daemon(tmp_path / "first", f"--metrics=127.0.0.1:{one}", env=s3.env())
    second = Daemon(tmp_path / "second", f"--metrics=127.0.0.1:{two}", env=s3.env(), peers=(first,))
    with first, second:
        second.meets(first)
        first.pull(source)
        second.pull(source)
        size = float(len(data))
        here, there = metrics(one), metrics(two)
        assert here["weightcache_received_bytes_total", "origin"] == size
        assert here["weightcache_received_bytes_total", "peer"] == 0
        assert there["weightcache_received_bytes_total", "origin"] == 0
        assert there["weightcache_received_bytes_total", "peer"] == size
        assert there["weightcache_blobs", "complete"] == 1
        assert there["weightcache_peers",] == 1
        assert there["weightcache_source_failures_total",] == 0
        assert there["weightcache_store_used_bytes",] >= size
        assert here["weightcache_load_seconds_count",] == 1
        assert 0 < here["weightcache_load_seconds_sum",] < 60
        assert (here["weightcache_failed_loads_total",], here["weightcache_evicted_bytes_total",]) == (0, 0)
        wait_until(lambda: metrics(one)["weightcache_sent_bytes_total",] == size, 10, "the sent bytes to be counted")

        with pytest.raises(SourceNotFound):
            second.pull("s3://fleet/daemon/none.safetensors")
        assert second.evict(source) == size
        later = metrics(two)
        assert (later["weightcache_load_seconds_count",], later["weightcache_failed_loads_total",]) == (1, 1)
        assert later["weightcache_evicted_bytes_total",] == size

        assert json.loads(get(one, "/healthz")[1]) == {"ok": True}
        shut = ["/v1/status", "/v1/peers", "/v1/ls", "/v1/load", "/v1/evict", "/v1/path", "/v1/pin", "/v1/verify"]
        answers = {get(one, path, method)[0] for path in shut for method in ("GET", "POST")}
        assert answers == {404}


def test_a_browser_sees_how_the_host_is(s3: S3Server, tmp_path: Path) -> None:
    s3.put("fleet", "daemon/seen&.safetensors", tensors(32, MIB, seed=5))
    (port,) = free_ports(1)
    options = (f"--metrics=127.0.0.1:{port}", "--origin-bandwidth=100kB")
    host = Daemon(tmp_path / "host", *options, env=s3.env())
    other = Daemon(tmp_path / "other", peers=(host,))
    with host, other:
        other.meets(host)
        command = [sys.executable, "-m", "weightcache.tools", "pull", "s3://fleet/daemon/seen&.safetensors"]
        with subprocess.Popen(command, env=host.worker_env) as pull:  # which takes longer than we look
            code, text = wait_until(lambda: "/seen&amp;.safetensors" in (page := get(port, "/"))[1] and page, 60)
            pull.kill()
        assert code == 200
        assert "s3://fleet/daemon/seen&amp;.safetensors" in text
        assert other.address in text
        ElementTree.fromstring(text[text.index("<body>") : text.index("</html>")])  # each element is closed


def test_what_the_command_line_shows_is_json(s3: S3Server, tmp_path: Path) -> None:
    data, source = tensors(3, MIB, seed=3), "s3://fleet/daemon/shown.safetensors"
    s3.put("fleet", "daemon/shown.safetensors", data)
    host = Daemon(tmp_path / "host", "--datacenter=here", env=s3.env())
    other = Daemon(tmp_path / "other", peers=(host,))
    with host, other:
        other.meets(host)
        host.pull(source)
        shown = {}
        for command in ("status", "peers", "ls"):
            done = cli(command, "--json", env=host.worker_env)
            assert done.returncode == 0, done.stderr
            shown[command] = json.loads(done.stdout)
    about = shown["status"]
    assert about["datacenter"] == "here"
    assert about["listen"] == host.address
    assert about["blobs"] == {"complete": 1, "partial": 0}
    assert about["moved"]["origin"] == len(data)
    assert about["uptime_seconds"] > 0
    assert [(row["address"], row["state"], row["received"]) for row in shown["peers"]] == [
        (other.address, "connected", 0)
    ]
    (blob,) = shown["ls"]["blobs"]
    assert (blob["name"], blob["size"], blob["state"]) == ("shown.safetensors", len(data), "complete")
    (snapshot,) = shown["ls"]["snapshots"]
    assert (snapshot["source"], snapshot["size"], snapshot["had"]) == (source, len(data), len(data))


def test_each_line_of_the_log_is_an_object(s3: S3Server, tmp_path: Path) -> None:
    """Also what is said when things fail, and by processes of its own that die."""
    s3.put("fleet", "daemon/logged.safetensors", tensors(3, MIB, seed=4))
    s3.proxy.answer("logged", 500)
    (nobody,) = free_ports(1)
    host = Daemon(tmp_path / "host", "--log-level=debug", f"--peer=127.0.0.1:{nobody}", env=s3.env())
    with host:
        host.pull("s3://fleet/daemon/logged.safetensors")
        with pytest.raises(SourceNotFound):
            host.pull("s3://fleet/daemon/none.safetensors")
        os.kill(status(host)["processes"]["origin"][0], signal.SIGABRT)
        wait_until(lambda: "bulk process died" in host.log.read_text(), 10, "its death to be noticed")
        host.stop()
    said = lines(host)
    events = {"daemon ready", "peer unreachable", "loaded", "request failed", "bulk process died", "daemon stopping"}
    assert events <= {line["event"] for line in said}
    for line in said:
        datetime.fromisoformat(line["ts"])
        assert line["level"] in ("debug", "info", "warning", "error")
        assert line["logger"]


# -- who it finds


@pytest.mark.parametrize("how", ["zeroconf", "dns"])
def test_daemons_find_each_other(s3: S3Server, tmp_path: Path, how: str) -> None:
    data, source = tensors(3, MIB, seed=5), f"s3://fleet/daemon/{how}.safetensors"
    s3.put("fleet", f"daemon/{how}.safetensors", data)
    first = Daemon(tmp_path / "first", *(["--discover=zeroconf"] if how == "zeroconf" else []), env=s3.env())
    option = "zeroconf" if how == "zeroconf" else f"dns:localhost:{first.port}"
    with first, Daemon(tmp_path / "second", f"--discover={option}", env=s3.env()) as second:
        second.meets(first)
        first.meets(second)
        first.pull(source)
        report = second.pull(source)
        assert read(report) == data
        assert report["bytes_by_source"] == {"local": 0, "peer": {first.address: len(data)}, "origin": 0}


# -- settings


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('datacenter = "file"\ncapacity = "1GB"\nfresh = 5\n[origin]\nstreams = 3\n')
    env = {"WEIGHTCACHE_DATACENTER": "environment", "WEIGHTCACHE_CAPACITY": "2GB", "WEIGHTCACHE_CONFIG": str(file)}
    plain = Daemon(tmp_path / "file", env={"WEIGHTCACHE_CONFIG": str(file)})
    stated = Daemon(tmp_path / "environment", env=env)
    ordered = Daemon(tmp_path / "line", "--datacenter=line", env=env)
    with plain, stated, ordered:
        seen = [(about["datacenter"], about["bytes"]["capacity"]) for about in map(status, (plain, stated, ordered))]
    assert seen == [("file", 10**9), ("environment", 2 * 10**9), ("line", 2 * 10**9)]


# -- when a part of it dies


def test_a_process_that_keeps_dying_is_started_ever_more_rarely(s3: S3Server, tmp_path: Path) -> None:
    data, source = tensors(3, MIB, seed=6), "s3://fleet/daemon/served.safetensors"
    s3.put("fleet", "daemon/served.safetensors", data)
    host = Daemon(tmp_path / "host", env=s3.env())
    other = Daemon(tmp_path / "other", env=s3.env(), peers=(host,))
    with host:
        host.pull(source)
        seen: set[int] = set()

        def newcomer() -> int:
            """The sender's process, once it is not one that was killed."""
            return next((pid for pid in status(host)["processes"]["send"] if pid not in seen), 0)

        for _ in range(3):
            pid = wait_until(newcomer, 20, "the sender to be started again")
            seen.add(pid)
            os.kill(pid, signal.SIGKILL)
        wait_until(newcomer, 20, "the sender to be started again")
        sender = [line for line in lines(host) if line.get("role") == "send"]
        at = {what: [_time(line) for line in sender if line["event"] == f"bulk process {what}"] for what in STEPS}
        pauses = [start - death for death, start in zip(at["died"], at["started"][1:], strict=True)]
        assert pauses[2] > pauses[0] + 0.3  # they double, but for a second in each
        with other:  # and then it serves as before
            other.meets(host)
            report = other.pull(source)
            assert read(report) == data
            assert report["bytes_by_source"]["origin"] == 0


def _time(line: Json) -> float:
    return datetime.fromisoformat(line["ts"]).timestamp()


def test_a_load_outlives_the_death_of_its_processes(s3: S3Server, tmp_path: Path) -> None:
    data, source = tensors(48, MIB, seed=7), "s3://fleet/daemon/outlived.safetensors"
    s3.put("fleet", "daemon/outlived.safetensors", data)
    s3.proxy.stall(r"outlived\.safetensors", after=NEVER, times=4)
    stuck = s3.proxy.stall(r"outlived\.safetensors")
    with Daemon(tmp_path / "host", "--origin-streams=1", env=s3.env()) as host, ThreadPoolExecutor(1) as pool:
        loading = pool.submit(host.pull, source)
        assert stuck.struck.wait(20)
        os.kill(status(host)["processes"]["origin"][0], signal.SIGKILL)
        report = loading.result(30)
        assert read(report) == data
        assert any("this host's own origin process died" in line for line in report["fallbacks"])
