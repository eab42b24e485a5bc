"""The sender as a real process: served well, served badly, and by strangers."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import weightcache
from tests.net.bulk import (
    BLOB,
    KEY,
    RECEIVER,
    SENDER,
    Sender,
    Talker,
    eventually,
    manifest_of,
    read_to_end,
    sample,
)
from weightcache.core.bitmap import ChunkSet
from weightcache.core.layout import CHUNK
from weightcache.core.manifest import Manifest
from weightcache.core.wire import Kind, Link, Port, Role
from weightcache.net.handshake import Handshake


@pytest.fixture(scope="module")
def data() -> bytes:
    return sample(3.5)


@pytest.fixture
def path(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "blob"
    path.write_bytes(data)
    return str(path)


@pytest.fixture
def manifest(data: bytes) -> Manifest:
    return manifest_of(data)


def test_chunks_are_sent_in_the_order_of_the_requests(path: str, data: bytes, manifest: Manifest) -> None:
    with Sender() as sender, Talker.dial(sender.port) as peer:
        assert peer.handshake.peer_id == SENDER
        sender.blob(path, manifest, ChunkSet(4, [0, 1, 3]))
        for number, index in enumerate((3, 0, 2, 1, 9)):
            peer.send(Kind.GET, number, BLOB, index)
        for number, index in enumerate((3, 0, 2, 1, 9)):
            frame = peer.frame()
            if index in (2, 9):
                assert (frame.kind, frame.fields) == (Kind.NO, [number, "missing", 0])
                continue
            offset, length = manifest.plan.span(index)
            assert (frame.kind, frame.fields) == (Kind.DATA, [number, length, manifest.id(index)])
            assert peer.raw() == data[offset : offset + length]
        sent: dict[bytes, int] = {}
        while sum(sent.values()) < len(data) - CHUNK:
            for node, size in sender.message("sent").fields[1].items():
                sent[node] = sent.get(node, 0) + size
        assert sent == {RECEIVER: len(data) - CHUNK}


def test_a_chunk_can_be_had_from_the_moment_it_is_announced(path: str, data: bytes, manifest: Manifest) -> None:
    known = Manifest(BLOB, manifest.plan)
    with Sender() as sender, Talker.dial(sender.port) as peer:
        sender.blob(path, known, ChunkSet(4))
        peer.send(Kind.GET, 1, BLOB, 3)
        assert peer.frame().fields == [1, "missing", 0]
        sender.send("had", BLOB, [[3, manifest.id(3)]])
        eventually(lambda: _has(peer, 3), "the chunk was never sent")
        assert peer.raw() == data[3 * CHUNK :]


def _has(peer: Talker, index: int) -> bool:
    peer.send(Kind.GET, 2, BLOB, index)
    return peer.frame().kind is Kind.DATA


def test_an_unknown_blob_is_asked_of_the_node_once(path: str, data: bytes, manifest: Manifest) -> None:
    other = b"o" * 32
    with Sender() as sender, Talker.dial(sender.port) as one, Talker.dial(sender.port) as two:
        for peer in (one, two):
            peer.send(Kind.GET, 1, BLOB, 3)
            peer.send(Kind.GET, 2, other, 0)
        asked = [sender.message("want").fields[1] for _ in range(2)]
        assert asked == [BLOB, other]
        sender.send("none", other)
        sender.blob(path, manifest, ChunkSet(4, full=True))
        for peer in (one, two):
            assert peer.frame().kind is Kind.DATA
            assert peer.raw() == data[3 * CHUNK :]
            assert peer.frame().fields == [2, "unknown", 0]
        one.send(Kind.GET, 3, other, 0)
        assert sender.message("want").fields == ["want", other]  # it may be there by now: asked afresh


def test_requests_over_the_pipeline_are_refused_as_busy_and_in_order(
    path: str, data: bytes, manifest: Manifest
) -> None:
    with Sender(pipeline=2) as sender, Talker.dial(sender.port) as peer:
        # They come at once and wait for the node: the third is one too many, the fifth is not even read yet.
        peer.sock.sendall(b"".join(peer.link.send(Kind.GET, number, BLOB, 3) for number in range(7)))
        sender.message("want")
        sender.blob(path, manifest, ChunkSet(4, full=True))
        answers = []
        for number in range(7):
            frame = peer.frame()
            assert frame.fields[0] == number
            answers.append(frame.kind)
            if frame.kind is Kind.DATA:
                assert peer.raw() == data[3 * CHUNK :]
            else:
                assert frame.fields[1] == "busy"
                assert 0 < frame.fields[2] < 1000
        assert answers[:4] == [Kind.DATA, Kind.DATA, Kind.NO, Kind.NO]


def test_a_flood_of_requests_is_not_read_and_costs_nothing(path: str, manifest: Manifest) -> None:
    with Sender() as sender, Talker.dial(sender.port) as peer:
        peer.send(Kind.GET, 0, BLOB, 0)
        sender.message("want")  # and is not answered: everything waits
        flood = b"".join(peer.link.send(Kind.GET, number, BLOB, 0) for number in range(1, 1000))
        peer.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            peer.sock.sendall(flood * 1000)  # 60 MB: the sockets hold less
        before = cpu_seconds(sender.process.pid)
        with pytest.raises(TimeoutError):
            peer.sock.recv(1)
        assert cpu_seconds(sender.process.pid) - before < 0.1


def cpu_seconds(pid: int) -> float:
    """The time a process has spent on a CPU."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_reader_that_reads_nothing_delays_nobody(path: str, data: bytes, manifest: Manifest) -> None:
    with Sender(stall=2.0) as sender, Talker.dial(sender.port, small=True) as slow, Talker.dial(sender.port) as peer:
        sender.blob(path, manifest, ChunkSet(4, full=True))
        for number in range(8):
            slow.send(Kind.GET, number, BLOB, 0)
        slow.frame()
        for index in range(4):
            peer.send(Kind.GET, index, BLOB, index)
            peer.frame()
            assert peer.raw() == data[index * CHUNK : (index + 1) * CHUNK]
        eventually(lambda: sender.message("connections").fields[1] == 1, "the stalled reader was never cut off")


def test_a_dropped_blob_is_closed_at_once_or_after_the_chunk_being_sent(
    path: str, data: bytes, manifest: Manifest
) -> None:
    with Sender() as sender, Talker.dial(sender.port, small=True) as peer:
        sender.blob(path, manifest, ChunkSet(4, full=True))
        peer.sock.sendall(peer.link.send(Kind.GET, 1, BLOB, 0) + peer.link.send(Kind.GET, 2, BLOB, 1))
        peer.frame()
        sender.send("drop", BLOB)
        Talker.dial(sender.port, small=True).close()  # who greets it has sent it something after that
        assert peer.raw() == data[:CHUNK]  # what had begun is finished
        assert sender.message("dropped").fields == ["dropped", BLOB]
        assert path not in sender.open_files()
        assert peer.frame().fields == [2, "unknown", 0]
        sender.blob(path, manifest, ChunkSet(4, full=True))
        sender.send("drop", BLOB)
        assert sender.message("dropped").fields == ["dropped", BLOB]
        assert path not in sender.open_files()


def test_a_peer_that_leaves_in_mid_chunk_leaves_no_descriptor(path: str, manifest: Manifest) -> None:
    with Sender() as sender:
        sender.blob(path, manifest, ChunkSet(4, full=True))
        peer = Talker.dial(sender.port, small=True)
        peer.send(Kind.GET, 1, BLOB, 0)
        peer.frame()
        sender.send("drop", BLOB)
        peer.close()
        sender.message("dropped")
        assert path not in sender.open_files()


def test_a_blob_shorter_than_it_should_be_is_told_to_the_node(path: str, manifest: Manifest) -> None:
    with Sender() as sender, Talker.dial(sender.port) as peer:
        sender.blob(path, manifest, ChunkSet(4, full=True))
        os.truncate(path, CHUNK + 1000)
        peer.send(Kind.GET, 1, BLOB, 1)
        peer.frame()
        with pytest.raises(ConnectionResetError):
            peer.raw()
        assert sender.message("fault").fields[:3] == ["fault", BLOB, 1]


def strangers() -> dict[str, bytes]:
    """What somebody without the key may send first. The last three say too little to be judged before the deadline."""
    wrong = Handshake(Link(Role.CLIENT, Port.BULK), b"another key", b"x" * 16, b"").start()
    return {
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "zeros": bytes(5000),
        "noise": os.urandom(4000),
        "another key": wrong,
        "a long frame": struct.pack("<IB", 4097, 1),
        "a longer frame": struct.pack("<IB", 0xFFFFFFFF, 255),
        "nothing": b"",
        "one byte": b"\x10",
        "half a hello": wrong[:40],
    }


@pytest.mark.parametrize("first", strangers())
def test_a_stranger_gets_no_byte(first: str) -> None:
    with Sender(handshake=0.3) as sender, socket.create_connection(("127.0.0.1", sender.port)) as sock:
        sock.sendall(strangers()[first])
        assert read_to_end(sock) == b""


def test_a_replayed_handshake_gets_no_further() -> None:
    with Sender() as sender:
        client = Handshake(Link(Role.CLIENT, Port.BULK), KEY, b"x" * 16, b"")
        said, welcomes = [client.start()], []
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", sender.port)) as sock:
                sock.sendall(said[0])
                welcomes.append(sock.recv(4096))
                if len(said) == 1:
                    client.link.space()[: len(welcomes[0])] = welcomes[0]
                    client.link.filled(len(welcomes[0]))
                    said.append(client.advance())
                    continue  # the real client stops here, its proof unsent, but overheard
                sock.sendall(said[1])
                assert read_to_end(sock) == b""
        assert len(set(welcomes)) == 3


def test_strangers_cannot_keep_others_out() -> None:
    with Sender(pending=4) as sender:
        crowd = [socket.create_connection(("127.0.0.1", sender.port)) for _ in range(12)]
        Talker.dial(sender.port).close()
        for sock in crowd[:4]:
            assert read_to_end(sock) == b""
        for sock in crowd:
            sock.close()


def test_connections_are_bounded() -> None:
    with Sender(connections=1) as sender, Talker.dial(sender.port) as first:
        with pytest.raises(ConnectionError):
            Talker.dial(sender.port)
        first.send(Kind.GET, 1, BLOB, 0)
        sender.message("want")


@pytest.mark.parametrize("kind", [Kind.INFO, Kind.DATA])
def test_what_may_not_come_ends_the_connection(kind: Kind) -> None:
    with Sender() as sender, Talker.dial(sender.port) as peer:
        peer.sock.sendall(os.urandom(200) if kind is Kind.DATA else b"\x00\x00\x00\x00\x04" + bytes(16))
        assert read_to_end(peer.sock) == b""


def test_the_sender_ends_with_its_node() -> None:
    with Sender() as sender, Talker.dial(sender.port) as peer:
        sender.close()
        assert read_to_end(peer.sock) == b""


@pytest.mark.parametrize("module", ["server", "client"])
def test_bulk_processes_stay_light(module: str) -> None:
    heavy = "{'asyncio', 'aiohttp', 'logging', 'ssl', 'multiprocessing'}"
    program = f"""
import sys, types
sys.modules["weightcache"] = package = types.ModuleType("weightcache")  # what the package itself imports is not ours
package.__path__ = [{str(Path(weightcache.__file__).parent)!r}]
import weightcache.net.{module}
print(sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
