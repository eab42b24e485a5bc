"""Origins that fail or lie: bounded retries, then an error that names the source; never a byte of another version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from tests.fleet.bad_peer import read
from tests.fleet.daemons import Daemon, from_peers
from tests.fleet.weights import tensors
from tests.servers.liar import Liar
from tests.servers.nginx import NginxServer
from tests.servers.proxy import FaultProxy
from tests.servers.s3 import S3Server
from weightcache.errors import OriginUnavailable, SourceChanged, SourceError, WeightcacheError

MIB = 1 << 20
NEVER = 1 << 60  # bytes: what fails after so many passes
ALWAYS = 1 << 30  # times
ATTEMPTS = 3
STREAMS = 2
OPTIONS = ("--origin-timeout=0.5", f"--origin-attempts={ATTEMPTS}", f"--origin-streams={STREAMS}", "--fresh=0")
_numbers = count()


@dataclass
class Object:
    """One object, and how the proxy knows it."""

    key: str
    data: bytes

    @property
    def source(self) -> str:
        return f"s3://fleet/{self.key}"

    @property
    def path(self) -> str:
        return re.escape(self.key) + r"(\?|$)"  # and nothing beside it


@pytest.fixture(scope="module")
def host(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("origins"), *OPTIONS, env=s3_server.env()) as host:
        yield host


@pytest.fixture(scope="module")
def believer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A host that believes for long what it was told of a version."""
    options = ("--fresh=600", f"--origin-attempts={ATTEMPTS}")
    with Daemon(tmp_path_factory.mktemp("believer"), *options) as host:
        yield host


@pytest.fixture
def stored(s3: S3Server) -> Object:
    stored = Object(f"origins/{next(_numbers)}.safetensors", tensors(12, MIB, seed=next(_numbers)))
    s3.put("fleet", stored.key, stored.data)
    s3.proxy.reset_counts()
    return stored


# -- failures that pass


@pytest.mark.parametrize("fault", ["500", "503", "stall", "stall in the body", "reset", "reset in the body"])
def test_failures_that_pass_cost_a_retry_and_are_told(host: Daemon, s3: S3Server, stored: Object, fault: str) -> None:
    s3.proxy.stall(stored.path, after=NEVER, times=3)  # version, digest and header pass
    after = 100_000 if "body" in fault else 0
    match fault.split()[0]:
        case "stall":
            s3.proxy.stall(stored.path, after=after, times=2)
        case "reset":
            s3.proxy.reset(stored.path, after=after, times=2)
        case status:
            s3.proxy.answer(stored.path, int(status), times=2)
    report = host.pull(stored.source)
    assert read(report) == stored.data
    assert any(line.startswith("origin: unavailable") and stored.source in line for line in report["fallbacks"])
    assert s3.proxy.requests <= 12 + 3 + 2 + STREAMS


def test_failures_before_anything_is_known_cost_a_retry(host: Daemon, s3: S3Server, stored: Object) -> None:
    s3.proxy.answer(stored.path, 500, times=2)
    assert read(host.pull(stored.source)) == stored.data


def test_an_origin_that_asks_for_time_gets_it(tmp_path: Path) -> None:
    data = tensors(3, MIB)
    (tmp_path / "www").mkdir()
    (tmp_path / "www/file").write_bytes(data)
    with (
        NginxServer(tmp_path / "www", tmp_path / "run") as nginx,
        FaultProxy(nginx.port) as proxy,
        Daemon(tmp_path / "host", *OPTIONS) as host,
    ):
        proxy.answer("/plain/file$", 503, retry_after=1)
        proxy.stall("/plain/file$", after=NEVER, times=2)
        proxy.answer("/plain/file$", 503, times=STREAMS, retry_after=1)
        report = host.pull(f"http://127.0.0.1:{proxy.port}/plain/file")
    assert read(report) == data
    assert report["stages"]["resolve"] >= 1
    assert report["stages"]["transfer"] >= 1


# -- failures that last


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "resolved"])
@pytest.mark.parametrize("fault", ["500", "stall", "reset"])
def test_failures_that_last_end_in_a_bounded_number_of_requests(
    host: Daemon, s3: S3Server, stored: Object, fault: str, known: bool
) -> None:
    if known:
        s3.proxy.stall(stored.path, after=NEVER, times=3)
    match fault:
        case "stall":
            s3.proxy.stall(stored.path, times=ALWAYS)
        case "reset":
            s3.proxy.reset(stored.path, times=ALWAYS)
        case _:
            s3.proxy.answer(stored.path, 500, times=ALWAYS)

    with pytest.raises(OriginUnavailable) as failure:
        host.pull(stored.source)

    assert stored.source in str(failure.value)
    assert "\n" not in str(failure.value)
    assert s3.proxy.requests <= 3 + 2 * ATTEMPTS + STREAMS
    s3.proxy.heal()
    report = host.pull(stored.source)  # and nothing of it is left behind
    assert read(report) == stored.data


def test_an_origin_that_is_down(host: Daemon, s3: S3Server, stored: Object, tmp_path: Path) -> None:
    """What is here, or at a peer, still loads, and the report says from when the version is."""
    other = Daemon(tmp_path / "other", *OPTIONS, env=s3.env(), peers=(host,))
    cold = f"{stored.source}.cold"
    host.pull(stored.source)
    with other:
        other.meets(host)
        s3.proxy.refuse()
        with pytest.raises(OriginUnavailable, match=cold):
            host.pull(cold)
        warm, fresh = host.pull(stored.source), other.pull(stored.source)
        assert read(warm) == read(fresh) == stored.data
        assert warm["bytes_by_source"] == {"local": len(stored.data), "peer": {}, "origin": 0}
        assert fresh["bytes_by_source"] == {"local": 0, "peer": {host.address: len(stored.data)}, "origin": 0}
        assert any("using the version that this host saw at" in line for line in warm["fallbacks"])
        assert any(f"using the version that {host.address} saw at" in line for line in fresh["fallbacks"])


# -- objects that change


def test_an_object_that_is_replaced_in_mid_load_is_never_a_mixture(host: Daemon, s3: S3Server, stored: Object) -> None:
    older, newer = tensors(48, MIB, seed=1000), tensors(48, MIB, seed=1001)
    s3.put("fleet", stored.key, older)
    s3.proxy.stall(stored.path, after=NEVER, times=4)  # version, digest, header and a part of it pass
    stuck = s3.proxy.stall(stored.path, times=1000)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(host.pull, stored.source)
        assert stuck.struck.wait(20)
        s3.put("fleet", stored.key, newer)
        s3.proxy.heal()
        with pytest.raises(SourceChanged, match=stored.source):
            loading.result(30)
    report = host.pull(stored.source)
    assert read(report) == newer
    assert report["bytes_by_source"]["origin"] == len(newer)


def test_a_replaced_object_is_seen_at_once_after_a_failure(s3: S3Server, stored: Object, tmp_path: Path) -> None:
    """However fresh the version that is known, one failure shows that it is gone."""
    with Daemon(tmp_path / "host", "--fresh=600", env=s3.env()) as host, host.client() as client:
        client.manifest(stored.source)
        newer = tensors(12, MIB, seed=2000)
        s3.put("fleet", stored.key, newer)
        with pytest.raises(SourceChanged):
            client.pull(stored.source)
        assert read(client.pull(stored.source)) == newer


# Each lie, once an honest answer has told version and size: what comes of it.
LIES: dict[str, type[WeightcacheError]] = {
    "tag": SourceChanged,
    "no-tag": SourceChanged,
    "weak": SourceChanged,
    "total": SourceChanged,
    "shifted": SourceError,
    "no-range": SourceError,
    "whole": SourceError,
    "gzip": SourceError,
    "downgrade": SourceError,
    "short": OriginUnavailable,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_begins_to_lie_is_not_believed(believer: Daemon, lie: str) -> None:
    data = tensors(3, MIB, seed=7)
    with Liar(data) as liar, believer.client() as client:
        source = liar.url(f"{lie}.safetensors")
        client.manifest(source)  # from here on version and size are known
        liar.lie = lie
        with pytest.raises(LIES[lie], match=source):
            client.pull(source)
        liar.lie = ""
        assert read(client.pull(source)) == data


# -- servers that lack something


@pytest.mark.parametrize("mood", ["norange", "notag", "nothing", "nothing-norange"])
def test_servers_without_range_or_version_serve_a_fleet_by_one_reader(tmp_path: Path, mood: str) -> None:
    data = tensors(12, MIB, seed=5)
    (tmp_path / "www").mkdir()
    (tmp_path / "www/file").write_bytes(data)
    first = Daemon(tmp_path / "first")
    second = Daemon(tmp_path / "second", peers=(first,))
    with NginxServer(tmp_path / "www", tmp_path / "run") as nginx, FaultProxy(nginx.port) as proxy, first, second:
        second.meets(first)
        source = f"http://127.0.0.1:{proxy.port}/{mood}/file"
        assert read(first.pull(source)) == data
        proxy.reset_counts()
        report = second.pull(source)
        assert read(report) == data
        assert from_peers(report) == len(data)
        assert proxy.egress == 0
