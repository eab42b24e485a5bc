"""A fleet on a real Redis: found, lost in mid-load, found again; full stores, dead hosts, datacenters."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fleet.daemons import Daemon, Json, cli, from_peers
from tests.fleet.weights import tensors
from tests.servers.loop import wait_until
from tests.servers.redis import RedisServer
from tests.servers.s3 import S3Server
from weightcache.core.turns import ORIGIN_READ

TENSOR = ORIGIN_READ // 4
NEVER = 1 << 60
FIRST_READ = 256 << 10  # each host may read the header for itself
PASSWORD = "no-one-shall-see-this"


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer(PASSWORD) as server:
        yield server


def host(root: Path, redis: RedisServer, s3: S3Server, *options: str) -> Daemon:
    return Daemon(root, *options, env=s3.env() | {"WEIGHTCACHE_DISCOVER": redis.url})


class Patched(Daemon):
    """One that begins with a statement of its own."""

    def __init__(self, first: str, root: Path, env: dict[str, str]) -> None:
        super().__init__(root, env=env)
        self.first = first

    def command(self) -> list[str]:
        python, _, _, *rest = super().command()
        program = f"{self.first}; from weightcache.tools.cli import main; main()"
        return [python, "-c", program, *rest]


def status(daemon: Daemon) -> Json:
    with daemon.client() as client:
        return client.status()


def peers(daemon: Daemon) -> list[Json]:
    with daemon.client() as client:
        return client.peers()


def trouble(daemon: Daemon) -> str:
    return str(status(daemon)["directory"]["trouble"])


def held(redis: RedisServer) -> bool:
    return bool(redis.keys("*}:all:*"))


def test_a_fleet_survives_its_redis(redis: RedisServer, s3: S3Server, tmp_path: Path) -> None:
    first, second, third = (tensors(24, TENSOR, seed=seed) for seed in range(3))
    for name, data in (("one", first), ("two", second), ("three", third)):
        s3.put("main", f"redis/{name}.safetensors", data)
    with host(tmp_path / "a", redis, s3) as a, host(tmp_path / "b", redis, s3) as b:
        a.meets(b)
        b.meets(a)
        # The second host loads from the first.
        a.pull("s3://main/redis/one.safetensors")
        s3.proxy.reset_counts()
        report = b.pull("s3://main/redis/one.safetensors")
        assert Path(report["path"]).read_bytes() == first
        assert report["bytes_by_source"]["origin"] == s3.proxy.egress == 0
        wait_until(lambda: held(redis), 10, "holders to be announced")
        # Redis dies in mid-load: the load ends, and another one works.
        # Its version, its header and one read pass, all others hang.
        s3.proxy.stall(r"two\.safetensors$", after=NEVER, begin=1)
        stall = s3.proxy.stall(r"two\.safetensors$", after=TENSOR // 2, times=1000, begin=1)
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(a.pull, "s3://main/redis/two.safetensors")
            assert stall.struck.wait(20)
            redis.kill()
            s3.proxy.heal()
            assert Path(running.result(60)["path"]).read_bytes() == second
        wait_until(lambda: trouble(a) and trouble(b), 10, "the loss to be noticed")
        s3.proxy.reset_counts()
        report = b.pull("s3://main/redis/two.safetensors")
        assert Path(report["path"]).read_bytes() == second
        assert from_peers(report) > 0
        assert s3.proxy.egress == 0
        a.pull("s3://main/redis/three.safetensors")
        shown = cli("status", env=a.worker_env).stdout
        assert f"redis 127.0.0.1:{redis.port}" in shown
        assert "the last known view is kept" in shown
        assert {row["state"] for row in peers(a)} == {"connected"}
        # It comes back, and knows nothing: all is told again.
        redis.start()
        wait_until(lambda: held(redis) and not trouble(a) and not trouble(b), 15, "all to be announced again")
        assert len(redis.keys("*}:peer:*")) == 2
        wait_until(lambda: len(redis.keys("*}:all:*")) == 3, 10, "three blobs to be announced again")
        # A daemon that is killed is dropped, and with a full store it is a holder again.
        a.kill()
        wait_until(lambda: len(redis.keys("*}:peer:*")) == 1, 20, "the key of the dead to expire")
        wait_until(lambda: not status(b)["directory"]["members"] and not peers(b), 10, "the dead to be dropped")
        a.start()
        b.meets(a)
        s3.proxy.reset_counts()
        report = b.pull("s3://main/redis/three.safetensors")
        assert Path(report["path"]).read_bytes() == third
        assert s3.proxy.egress == 0
        for daemon in (a, b):
            said = daemon.log.read_text() + json.dumps(status(daemon)) + cli("status", env=daemon.worker_env).stdout
            assert PASSWORD not in said
            assert said.count("directory lost") == 1


def test_holders_that_are_no_neighbours_are_found(redis: RedisServer, s3: S3Server, tmp_path: Path) -> None:
    """In a large fleet most are not: here nobody is anybody's."""
    data = tensors(12, TENSOR, seed=4)
    s3.put("main", "redis/far.safetensors", data)
    lonely = "import weightcache.directory.redis as rules; rules.NEIGHBOURS = 0"
    env = s3.env() | {"WEIGHTCACHE_DISCOVER": redis.url}
    with Patched(lonely, tmp_path / "a", env=env) as a, Patched(lonely, tmp_path / "b", env=env) as b:
        a.pull("s3://main/redis/far.safetensors")
        wait_until(lambda: held(redis), 10, "the holder to be announced")
        assert not peers(a)
        assert not peers(b)
        s3.proxy.reset_counts()
        report = b.pull("s3://main/redis/far.safetensors")
        assert Path(report["path"]).read_bytes() == data
        assert from_peers(report) == len(data)
        assert s3.proxy.egress == 0
        assert [row["address"] for row in peers(b)] == [a.address]


def test_without_redis_a_daemon_starts_and_says_so(redis: RedisServer, s3: S3Server, tmp_path: Path) -> None:
    data = tensors(4, TENSOR, seed=5)
    s3.put("main", "redis/alone.safetensors", data)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hangs = f"redis://:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}"
        web = f"redis://:{PASSWORD}@{s3.direct.removeprefix('http://')}"
        wrong = redis.url.replace(PASSWORD, "guess")
        cases = {hangs: "no answer within", web: "no Redis", wrong: "the user or password is refused"}
        with ExitStack() as stack:
            for number, (url, why) in enumerate(cases.items()):
                daemon = Daemon(tmp_path / str(number), f"--discover={url}", env=s3.env())
                stack.enter_context(daemon)
                told = wait_until(lambda daemon=daemon: trouble(daemon), 10, "the trouble to be told")  # type: ignore[misc]
                assert why in told
                assert f"127.0.0.1:{url.rpartition(':')[2].partition('/')[0]}" in told
                report = daemon.pull("s3://main/redis/alone.safetensors")
                assert Path(report["path"]).read_bytes() == data
                log = daemon.log.read_text()
                assert log.count("directory lost") == 1
                assert PASSWORD not in log + told + json.dumps(status(daemon))
                assert "guess" not in log + told


@pytest.mark.parametrize(
    ("discover", "code", "what"),
    [
        (f"redis://:{PASSWORD}@127.0.0.1:port", 2, "redis://[user:password@]host"),
        (f"redis://:{PASSWORD}@/0", 2, "redis://[user:password@]host"),
        (f"redis:{PASSWORD}@127.0.0.1", 2, "redis://[user:password@]host"),
        (f"redis://user:{PASSWORD}@10.0.0.1:6379/0", 2, "set cluster_key_file"),
    ],
)
def test_a_url_that_cannot_be_is_refused_without_its_password(
    tmp_path: Path, discover: str, code: int, what: str
) -> None:
    failed = cli("daemon", f"--store={tmp_path}/store", f"--discover={discover}", timeout=20)
    assert failed.returncode == code
    (line,) = failed.stderr.splitlines()
    assert what in line
    assert PASSWORD not in failed.stderr + failed.stdout


def test_what_one_host_learned_of_a_source_the_next_finds_on_redis(
    redis: RedisServer, s3: S3Server, tmp_path: Path
) -> None:
    data = tensors(8, TENSOR, seed=6)
    s3.put("main", "redis/known.safetensors", data)
    source = "s3://main/redis/known.safetensors"
    with host(tmp_path / "a", redis, s3) as a:
        a.pull(source)
        wait_until(lambda: redis.keys("*}:snapshot:*") and redis.keys("*}:manifest:*"), 10, "both to be taught")
    s3.proxy.reset_counts()
    with host(tmp_path / "b", redis, s3) as b:
        report = b.pull(source)
        assert Path(report["path"]).read_bytes() == data
        assert {exchange.method for exchange in s3.proxy.exchanges} == {"GET"}  # it asked nobody what the source is
    (key,) = redis.keys("*}:snapshot:*")
    redis.call("SETRANGE", key, "100", "otherwise")
    with host(tmp_path / "c", redis, s3) as c:
        assert Path(c.pull(source)["path"]).read_bytes() == data
        assert "HEAD" in {exchange.method for exchange in s3.proxy.exchanges}
        assert "is not of this cluster" in c.log.read_text()


def test_peers_of_another_version_are_refused_and_the_rest_goes_on(
    redis: RedisServer, s3: S3Server, tmp_path: Path
) -> None:
    data = tensors(8, TENSOR, seed=7)
    s3.put("main", "redis/versions.safetensors", data)

    with host(tmp_path / "a", redis, s3) as a, host(tmp_path / "b", redis, s3) as b:
        env = s3.env() | {"WEIGHTCACHE_DISCOVER": redis.url}
        newer = Patched("import weightcache.net.handshake as rules; rules.PROTOCOL += 1", tmp_path / "new", env=env)
        with newer:
            a.meets(b)
            for one, other in ((a, newer), (newer, a)):
                row = wait_until(
                    lambda one=one, other=other: [row for row in peers(one) if row["address"] == other.address],  # type: ignore[misc]
                    10,
                    "the other version to be refused",
                )[0]
                assert row["state"] == "unreachable"
                assert "protocol 1" in row["why"].replace("this host 1", "protocol 1")
                assert "2" in row["why"]
                assert "upgrade" in row["why"]
            a.pull("s3://main/redis/versions.safetensors")
            assert from_peers(b.pull("s3://main/redis/versions.safetensors")) == len(data)
            report = newer.pull("s3://main/redis/versions.safetensors")
            assert Path(report["path"]).read_bytes() == data
            assert from_peers(report) == 0


ORIGIN_FIRST, REMOTE_FIRST, NEVER_REMOTE = "local,origin,remote", "local,remote,origin", "local,origin"


def from_afar(reports: list[Json], others: list[Daemon]) -> int:
    """Bytes that came from hosts of the other datacenter."""
    addresses = {other.address for other in others}
    return sum(
        size for report in reports for peer, size in report["bytes_by_source"]["peer"].items() if peer in addresses
    )


@pytest.mark.parametrize(
    ("prefer", "read", "crossed"), [(ORIGIN_FIRST, 1, 0), (REMOTE_FIRST, 0, 1), (NEVER_REMOTE, 1, 0)]
)
def test_each_datacenter_takes_each_byte_once(
    redis: RedisServer, s3: S3Server, tmp_path: Path, prefer: str, read: int, crossed: int
) -> None:
    data = tensors(32, TENSOR, seed=8)
    s3.put("main", "redis/centers.safetensors", data)
    source = "s3://main/redis/centers.safetensors"
    with ExitStack() as stack:
        here, there = (
            [
                stack.enter_context(
                    host(tmp_path / f"{name}{number}", redis, s3, f"--datacenter={name}", f"--prefer={prefer}")
                )
                for number in range(2)
            ]
            for name in ("here", "there")
        )
        for pair in (here, there):
            pair[0].meets(pair[1])
            pair[1].meets(pair[0])
        if prefer != NEVER_REMOTE:
            for one in there:
                one.meets(*here)
        for one in here:
            one.pull(source)
        s3.proxy.reset_counts()
        with ThreadPoolExecutor(2) as threads:
            reports = list(threads.map(lambda one: one.pull(source), there))
        for report in reports:
            assert Path(report["path"]).read_bytes() == data
        afar, egress = from_afar(reports, here), s3.proxy.egress
        print(f"{prefer}: {afar / len(data):.3f} from afar, {egress / len(data):.3f} read at the origin")
        assert crossed * len(data) * 0.9 <= afar <= crossed * 1.3 * len(data)
        assert read * len(data) * 0.9 <= egress <= read * 1.3 * len(data) + 4 * FIRST_READ
        if prefer == NEVER_REMOTE:
            assert not {one.address for one in here} & {row["address"] for row in peers(there[0])}
        else:
            assert {row["datacenter"] for row in peers(there[0])} == {"here", "there"}
            assert "here" in cli("peers", env=there[0].worker_env).stdout


def test_what_the_origin_does_not_give_comes_from_another_datacenter(
    redis: RedisServer, s3: S3Server, tmp_path: Path
) -> None:
    data = tensors(16, TENSOR, seed=9)
    s3.put("main", "redis/down.safetensors", data)
    source = "s3://main/redis/down.safetensors"
    with (
        host(tmp_path / "here", redis, s3, "--datacenter=here") as here,
        host(tmp_path / "there", redis, s3, "--datacenter=there") as there,
    ):
        there.meets(here)
        here.pull(source)
        s3.proxy.refuse()
        try:
            report = there.pull(source)
        finally:
            s3.proxy.accept()
        assert Path(report["path"]).read_bytes() == data
        assert from_peers(report) == len(data)
