"""What strangers, and peers that want more than their share, get: nothing."""

from __future__ import annotations

import json
import os
import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fleet.bad_peer import BadPeer, read
from tests.fleet.daemons import Daemon, cli, from_peers
from tests.fleet.weights import tensors
from tests.servers.loop import wait_until
from tests.servers.nginx import NginxServer
from tests.servers.proxy import FaultProxy
from tests.servers.s3 import S3Server
from weightcache.core.snapshot import FileEntry
from weightcache.core.source import parse_source
from weightcache.core.wire import Frame, Kind, Link, Port, Role
from weightcache.errors import SourceDenied, WeightcacheError
from weightcache.net.handshake import DEADLINE, Handshake

MIB = 1 << 20
PORTS = (Port.CONTROL, Port.BULK)


# -- safe by default


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (["--listen=0.0.0.0:0", "--advertise=127.0.0.1"], "listen"),
        (["--listen=192.0.2.1:7700"], "listen"),
        (["--listen=[::]:0", "--advertise=::1"], "listen"),
        (["--metrics=0.0.0.0:9100"], "metrics"),
        (["--peer=192.0.2.1:7700"], "peers"),
        (["--discover=dns:weightcache.example:7700"], "discover"),
    ],
)
def test_without_a_key_nothing_but_loopback(tmp_path: Path, options: list[str], setting: str) -> None:
    failed = cli("daemon", f"--store={tmp_path}/store", *options, timeout=20)
    assert failed.returncode == 2
    (line,) = failed.stderr.splitlines()
    assert f"{setting} has" in line
    assert "set cluster_key_file" in line
    assert not (tmp_path / "store").exists()


@dataclass
class Cluster:
    """Two hosts that listen on every interface and share a key; the first has a file that the second took from it."""

    key: bytes
    hosts: tuple[Daemon, Daemon]
    source: str
    data: bytes


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root, key = tmp_path_factory.mktemp("cluster"), secrets.token_hex(32)
    file = key_file(root / "key", key)
    data, source = tensors(4, MIB, seed=99), "s3://fleet/security/file.safetensors"
    s3_server.put("fleet", "security/file.safetensors", data)
    options = ("--advertise=127.0.0.1", f"--cluster-key-file={file}", "--log-level=debug")
    first = Daemon(root / "first", *options, interface="0.0.0.0", env=s3_server.env())
    second = Daemon(root / "second", *options, interface="0.0.0.0", env=s3_server.env(), peers=(first,))
    with first, second:
        second.meets(first)
        assert read(first.pull(source)) == data
        report = second.pull(source)
        assert read(report) == data
        assert from_peers(report) == len(data)
        yield Cluster(key.encode(), (first, second), source, data)


def key_file(path: Path, key: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(key + "\n")
    return path


# -- strangers


def hello(port: Port, key: bytes | None) -> bytes:
    """The first frame of somebody who knows ``key``."""
    return Handshake(Link(Role.CLIENT, port), key, os.urandom(16), b"").start()


def tls_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="example.org")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def answer_to(port: int, said: bytes) -> tuple[bytes, float]:
    """All that a port says to somebody who says ``said``, until it closes; and after how many seconds it does."""
    began = time.monotonic()
    heard = bytearray()
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.settimeout(3 * DEADLINE)
        try:
            stranger.sendall(said)
            while data := stranger.recv(1 << 16):
                heard += data
        except ConnectionError:
            pass  # closed with our bytes unread
    return bytes(heard), time.monotonic() - began


def test_a_stranger_gets_no_byte(cluster: Cluster) -> None:
    host, _ = cluster.hosts
    with ThreadPoolExecutor(32) as pool:
        answers: dict[tuple[Port, str], Future[tuple[bytes, float]]] = {}
        for port in PORTS:
            other = PORTS[port is Port.CONTROL]
            said = {
                "nothing": b"",
                "no key": hello(port, None),
                "another key": hello(port, secrets.token_bytes(32)),
                "half a hello": hello(port, cluster.key)[:-20],
                "a hello that was changed": hello(port, cluster.key)[:-1] + b"\0",
                "a hello for the other port": hello(other, cluster.key),
                "HTTP": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
                "TLS": tls_hello(),
                "zeros": bytes(MIB),
                "noise": os.urandom(MIB),
            }
            number = host.port if port is Port.CONTROL else host.bulk_port
            answers |= {(port, name): pool.submit(answer_to, number, data) for name, data in said.items()}
        heard = {name: answer.result() for name, answer in answers.items()}
    assert {name: data for name, (data, _) in heard.items() if data} == {}
    assert {name: seconds for name, (_, seconds) in heard.items() if seconds > DEADLINE + 2} == {}
    assert from_peers(cluster.hosts[1].pull(cluster.source, revalidate=True)) == 0  # it is still there, and well


class Recorder:
    """A client's end of a handshake, by hand: what it said is kept."""

    def __init__(self, port: Port, number: int, key: bytes | None) -> None:
        self.link = Link(Role.CLIENT, port)
        self.handshake = Handshake(self.link, key, os.urandom(16), b"")
        self.socket = socket.create_connection(("127.0.0.1", number), timeout=10)
        self.said = b""
        self.say(self.handshake.start())
        while not self.handshake.done:
            self.hear()
            self.say(self.handshake.advance())

    def say(self, data: bytes) -> None:
        self.said += data
        self.socket.sendall(data)

    def hear(self) -> None:
        count = self.socket.recv_into(self.link.space())
        assert count, "it was closed"
        self.link.filled(count)

    def frame(self) -> Frame:
        while (frame := self.link.receive()) is None:
            self.hear()
        return frame


@pytest.mark.parametrize("port", PORTS)
def test_a_recorded_connection_opens_nothing(cluster: Cluster, port: Port) -> None:
    """The server's challenge is new each time: who repeats what he overheard gets that, and never an answer to it."""
    host, _ = cluster.hosts
    number = host.port if port is Port.CONTROL else host.bulk_port
    real = Recorder(port, number, cluster.key)
    with real.socket:
        heard, _ = answer_to(number, real.said)
    assert len(heard) < 100  # one WELCOME: a node id that was on the wire before, and a nonce


# -- secrets


def processes(host: Daemon) -> list[int]:
    """The daemon and its children."""
    assert host.process is not None
    daemon = host.process.pid
    return [daemon, *map(int, Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split())]


def test_the_key_is_shown_nowhere(cluster: Cluster, tmp_path: Path) -> None:
    first, second = cluster.hosts
    stranger_file = key_file(tmp_path / "key", "another-key-of-this-test")
    with Daemon(tmp_path / "stranger", f"--cluster-key-file={stranger_file}", peers=(first,)) as stranger:
        wait_until(lambda: "unreachable" in stranger.log.read_text(), 20, "the stranger to be refused")
    shown = [host.log.read_text() for host in (first, second, stranger)]
    for host in cluster.hosts:
        assert len(processes(host)) >= 2
        for pid in processes(host):
            shown += [
                Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace") for name in ("cmdline", "environ")
            ]
        with host.client() as client:
            shown.append(json.dumps([client.status(), client.peers(), client.ls()]))
    key = cluster.key.decode()
    assert not [text for text in shown if key in text or "another-key-of-this-test" in text]
    assert any("node started" in text for text in shown)


def test_a_query_is_told_to_nobody(tmp_path: Path) -> None:
    data = tensors(3, MIB)
    (tmp_path / "www").mkdir()
    (tmp_path / "www/file").write_bytes(data)
    host = Daemon(tmp_path / "host", "--log-level=debug", "--origin-attempts=2")
    with (
        NginxServer(tmp_path / "www", tmp_path / "run") as nginx,
        FaultProxy(nginx.port) as proxy,
        host,
        BadPeer() as peer,
    ):
        peer.meet(host)
        source = f"http://127.0.0.1:{proxy.port}/plain/file?X-Signature=s3cr3t"
        proxy.stall("/plain/file", after=1 << 60, times=2)
        proxy.answer("/plain/file", 500)
        report = host.pull(source)
        assert read(report) == data
        with host.client() as client:
            shown = json.dumps([report, client.status(), client.peers(), client.ls(), client.manifest(source)])
        errors = []
        for wrong in (f"{source}\x01", source.replace("/plain/", "/gone/"), source.replace("/plain/", "/broken/")):
            with pytest.raises(WeightcacheError) as failure:
                host.pull(wrong)
            errors.append(str(failure.value))
        assert peer.asked["find"] == 0
        assert "s3cr3t" not in shown + "".join(errors) + host.log.read_text()
    assert any(exchange.query for exchange in proxy.exchanges)  # the origin did see it


# -- peers that want more than their share


def everything_told(peer: BadPeer, host: Daemon, blob: bytes) -> tuple[object, object, list[object]]:
    """What a host tells a peer of a blob, by every way there is: state, manifest, chunk."""
    (state,) = peer.call(host, "want", [blob])
    bulk = Recorder(Port.BULK, host.bulk_port, peer.key)
    with bulk.socket:
        bulk.say(bulk.link.send(Kind.GET, 1, blob, 0))
        frame = bulk.frame()
    return state, peer.call(host, "manifest", blob), [frame.kind, *frame.fields]


def test_local_files_stay_local(s3: S3Server, tmp_path: Path) -> None:
    """A path means something else on every host: it is neither told of, nor looked up, nor served."""
    (tmp_path / "shelf").mkdir()
    file = tmp_path / "shelf/private.safetensors"
    file.write_bytes(tensors(2, MIB))
    source = f"file://{file}"
    host = Daemon(tmp_path / "host", f"--file-root={tmp_path}/shelf", env=s3.env())
    with host, BadPeer() as peer:
        peer.meet(host)
        assert read(host.pull(source)) == file.read_bytes()
        assert peer.asked == {}

        state = file.stat()
        version = f"modified:{state.st_mtime_ns}-{state.st_size}-{state.st_ino}"
        blob = FileEntry("private.safetensors", parse_source(source), version, state.st_size).blob
        with host.client() as client:
            assert [row["blob"] for row in client.ls()["blobs"]] == [blob.hex()]
        assert peer.call(host, "find", source) is None
        assert everything_told(peer, host, blob) == (None, None, [Kind.NO, 1, "unknown", 0])
        assert peer.call(host, "find", f"file://{tmp_path}/shelf") is None
        assert peer.call(host, "find", "s3://fleet/security/file.safetensors") is None
        assert s3.proxy.requests == 0  # a peer's question makes no host go and look


def test_the_allow_list_holds_whatever_peers_have(cluster: Cluster, s3: S3Server, tmp_path: Path) -> None:
    file = key_file(tmp_path / "key", cluster.key.decode())
    options = (f"--cluster-key-file={file}", "--origin-allow=s3://other/")
    with Daemon(tmp_path / "host", *options, env=s3.env(), peers=(cluster.hosts[0],)) as host:
        host.meets(cluster.hosts[0])
        with pytest.raises(SourceDenied, match="not allow-listed") as failure:
            host.pull(cluster.source)
        assert cluster.source in str(failure.value)
        with host.client() as client:
            assert client.ls() == {"snapshots": [], "blobs": []}


# -- this host's other users


def test_only_the_owner_and_his_group_may_speak_or_write(cluster: Cluster) -> None:
    for host in cluster.hosts:
        assert host.socket.stat().st_mode & 0o777 == 0o660
        paths = [host.store, *host.store.rglob("*")]
        assert [path for path in paths if path.lstat().st_mode & 0o022 and not path.is_socket()] == []
        blobs = [path for path in (host.store / "blobs").rglob("*") if path.is_file()]
        assert blobs
        assert {path.stat().st_mode & 0o777 for path in blobs} == {0o444}


def test_a_file_in_the_sockets_place_is_not_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("do not remove")
    failed = cli("daemon", f"--store={tmp_path}/store", f"--socket={precious}", timeout=20)
    assert failed.returncode == 10
    assert str(precious) in failed.stderr
    assert precious.read_text() == "do not remove"
