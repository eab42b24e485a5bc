"""The receiver as a real process, against a real sender and against peers that lie, stall, and break off."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.net.bulk import BLOB, KEY, RECEIVER, SECONDS, SENDER, Receiver, Sender, Talker, manifest_of, sample
from weightcache.core.bitmap import ChunkSet
from weightcache.core.ids import check, chunk_id
from weightcache.core.layout import CHUNK
from weightcache.core.wire import Kind
from weightcache.net import client
from weightcache.net.client import Peer, ReceiverConfig, Stream
from weightcache.net.sockets import round_trip

HANDLE = 7
DATA = sample(0.25)  # one small chunk
ID = chunk_id(DATA)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.write_bytes(b"")
    return path


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def aim(receiver: Receiver, port: int, target: Path) -> None:
    """Tell a receiver of a peer, and of the blob its chunks go to."""
    receiver.send("peer", SENDER, "127.0.0.1", port)
    receiver.send("blob", HANDLE, fds=(os.open(target, os.O_RDWR),))


def ask(receiver: Receiver, *numbers: int, expected: bytes = ID, length: int = len(DATA)) -> None:
    """Ask for the same small chunk, once for each number; request n lands at n times its length."""
    wanted = [[number, HANDLE, BLOB, number, number * length, length, expected] for number in numbers]
    receiver.send("get", SENDER, wanted)


def reasons(receiver: Receiver) -> dict[int, str]:
    return {number: kind for number, (kind, _, _) in receiver.failed.items()}


def serve(peer: Talker, data: bytes = DATA, name: bytes = ID) -> None:
    """Answer the next request."""
    number = peer.frame().fields[0]
    peer.sock.sendall(peer.link.send(Kind.DATA, number, len(data), name) + data)
    peer.link.moved(len(data))


def test_small_chunks_are_told_together_and_none_waits_for_what_is_still_due(
    server: socket.socket, target: Path
) -> None:
    with Receiver() as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, *range(8))
        with Talker.accept(server) as peer:
            for _ in range(7):
                serve(peer)
            told: list[list[list[Any]]] = []
            while sum(map(len, told)) < 7:  # though the eighth never comes
                told.append(receiver.message("got").fields[1])
            assert [row[0] for rows in told for row in rows] == list(range(7))
            serve(peer)
            assert [row[0] for row in receiver.message("got").fields[1]] == [7]
        small = sample(0.1)
        ask(receiver, *range(10, 18), expected=chunk_id(small), length=len(small))
        with Talker.accept(server) as peer:
            answers = b""
            for _ in range(8):
                number = peer.frame().fields[0]
                answers += peer.link.send(Kind.DATA, number, len(small), chunk_id(small)) + small
                peer.link.moved(len(small))
            peer.sock.sendall(answers)
            rows, messages = 0, 0
            while rows < 8:
                rows, messages = rows + len(receiver.message("got").fields[1]), messages + 1
            assert messages < 8


def test_no_more_is_asked_for_than_keeps_the_peer_busy(server: socket.socket, target: Path) -> None:
    data = sample(1)
    with Receiver() as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, *range(5), expected=chunk_id(data), length=len(data))
        with Talker.accept(server) as peer:
            numbers = [peer.frame().fields[0], peer.frame().fields[0]]
            for number in range(5):
                assert peer.link.receive() is None, "the next request comes when one answer has"
                peer.sock.sendall(peer.link.send(Kind.DATA, number, len(data), chunk_id(data)) + data)
                peer.link.moved(len(data))
                if number < 3:
                    numbers.append(peer.frame().fields[0])
            receiver.answers(5)
    assert numbers == [0, 1, 2, 3, 4]
    assert target.read_bytes() == data * 5


def test_the_kernel_tells_how_far_a_peer_is(server: socket.socket) -> None:
    with socket.create_connection(server.getsockname()) as one, server.accept()[0] as other:
        one.sendall(b"?")
        other.sendall(other.recv(1))
        one.recv(1)
        assert 0 < round_trip(one) < 1
        assert 0 < round_trip(other) < 1


def test_far_peers_are_asked_further_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as sock:
        stream = Stream(Peer(SENDER, "127.0.0.1", 1), sock, ReceiverConfig(KEY, RECEIVER), 0.0)
        for seconds, due in ((0.0, CHUNK), (0.0001, CHUNK), (0.01, 30_000_000), (0.2, 600_000_000)):
            monkeypatch.setattr(client, "round_trip", lambda sock, seconds=seconds: seconds)
            stream.measure()
            assert stream.ahead == due


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("known", [True, False])
def test_a_blob_arrives_from_a_real_sender(tmp_path: Path, target: Path, streams: int, known: bool) -> None:
    data = sample(6.3)
    manifest = manifest_of(data)
    source = tmp_path / "source"
    source.write_bytes(data)
    with Sender() as sender, Receiver(streams=streams) as receiver:
        sender.blob(str(source), manifest, ChunkSet(len(manifest), full=True))
        aim(receiver, sender.port, target)
        wanted: list[list[Any]] = []
        for index, (offset, length) in enumerate(manifest.plan):
            wanted.append([index, HANDLE, BLOB, index, offset, length, manifest.id(index) if known else b""])
        receiver.send("get", SENDER, wanted)
        receiver.answers(len(wanted))
        assert not receiver.failed
        for index, (offset, length) in enumerate(manifest.plan):
            chunk, care, size, seconds, hashing, writing = receiver.got[index]
            assert (chunk, care, size) == (manifest.id(index), check(data[offset : offset + length]), length)
            assert 0 < hashing + writing < seconds < SECONDS
    assert target.read_bytes() == data


def test_what_the_peer_refuses_is_told_with_its_reason(server: socket.socket, target: Path) -> None:
    with Receiver() as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, 0, 1, 2, 3)
        with Talker.accept(server) as peer:
            for reason, wait in (("missing", 0), ("unknown", 0), ("busy", 70)):
                peer.send(Kind.NO, peer.frame().fields[0], reason, wait)
            serve(peer)
            receiver.answers(4)
    assert receiver.failed == {0: ["missing", "", 0], 1: ["unknown", "", 0], 2: ["busy", "", 70]}
    assert target.read_bytes()[3 * len(DATA) :] == DATA


@pytest.mark.parametrize("expected", [ID, b""], ids=["known", "unknown"])
def test_wrong_bytes_are_never_written(server: socket.socket, target: Path, expected: bytes) -> None:
    with Receiver() as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, 0, 1, 2, expected=expected)
        with Talker.accept(server) as peer:
            serve(peer, bytes(len(DATA)))
            serve(peer, DATA[:-1] + bytes([DATA[-1] ^ 1]))
            serve(peer)
            receiver.answers(3)
    assert reasons(receiver) == {0: "mismatch", 1: "mismatch"}
    assert list(receiver.got) == [2]
    assert target.read_bytes() == bytes(2 * len(DATA)) + DATA


def test_another_chunk_than_the_expected_is_not_taken(server: socket.socket, target: Path) -> None:
    other = sample(0.25)
    with Receiver() as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, 0, 1)
        with Talker.accept(server) as peer:
            serve(peer, other, chunk_id(other))  # sound, but not what was asked for
            serve(peer)
            receiver.answers(2)
    assert reasons(receiver) == {0: "mismatch"}
    assert target.read_bytes() == bytes(len(DATA)) + DATA


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((Kind.DATA, 0, len(DATA) - 1, ID), "length"),
        ((Kind.DATA, 0, CHUNK, ID), "length"),
        ((Kind.DATA, 1, len(DATA), ID), "garbage"),  # not the oldest request
        ((Kind.NO, 99, "busy", 0), "garbage"),
        (b"HTTP/1.1 200 OK\r\n\r\n" * 9, "garbage"),
        (b"\xff" * 40, "garbage"),
        (b"\x01\x00\x00\x00\x21\x90" + bytes(16), "garbage"),  # a wrong MAC
    ],
)
def test_a_peer_that_breaks_the_protocol_is_left(
    server: socket.socket, target: Path, answer: tuple[Any, ...] | bytes, kind: str
) -> None:
    with Receiver() as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, 0, 1, 2)
        with Talker.accept(server) as peer:
            peer.frame()
            peer.sock.sendall(answer if isinstance(answer, bytes) else peer.link.send(*answer))
            receiver.answers(3)
            assert reasons(receiver) == {0: kind, 1: "reset", 2: "reset"}
        ask(receiver, 3)  # on a new connection, as if nothing had been
        with Talker.accept(server) as peer:
            serve(peer)
            receiver.answers(4)
    assert list(receiver.got) == [3]


@pytest.mark.parametrize("part", [0, 1, len(DATA) - 1])
def test_a_connection_lost_in_mid_chunk_fails_what_it_carried(server: socket.socket, target: Path, part: int) -> None:
    with Receiver() as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, 0, 1)
        with Talker.accept(server) as peer:
            peer.frame()
            peer.sock.sendall(peer.link.send(Kind.DATA, 0, len(DATA), ID) + DATA[:part])
        receiver.answers(2)
    assert reasons(receiver) == {0: "reset", 1: "reset"}
    assert target.read_bytes() == b""


@pytest.mark.parametrize("part", [None, 0, 500_000])
def test_silence_is_a_stall_only_while_an_answer_is_due(server: socket.socket, target: Path, part: int | None) -> None:
    with Receiver(idle=0.4) as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, 0, 1)
        with Talker.accept(server) as peer:
            if part is not None:
                peer.frame()
                peer.sock.sendall(peer.link.send(Kind.DATA, 0, len(DATA), ID) + DATA[:part])
            receiver.answers(2)
    assert reasons(receiver) == {0: "stalled", 1: "stalled"}


def test_a_trickle_is_no_stall(server: socket.socket, target: Path) -> None:
    with Receiver(idle=0.6) as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, 0)
        with Talker.accept(server) as peer:
            frame = peer.link.send(Kind.DATA, peer.frame().fields[0], len(DATA), ID)
            peer.sock.sendall(frame)
            sent = 0
            peer.sock.settimeout(0.1)
            while sent < 10:  # a second and more, of one byte each: less than any low-water mark
                peer.sock.sendall(DATA[sent : sent + 1])
                sent += 1
                with pytest.raises(TimeoutError):
                    peer.sock.recv(1)
            peer.sock.settimeout(SECONDS)
            peer.sock.sendall(DATA[sent:])
            receiver.answers(1)
    assert target.read_bytes() == DATA


def test_nobody_there(server: socket.socket, target: Path) -> None:
    port = server.getsockname()[1]
    server.close()
    with Receiver() as receiver:
        aim(receiver, port, target)
        ask(receiver, 0)
        receiver.answers(1)
        receiver.send("peer", SENDER, "a.name.to.look.up", port)
        ask(receiver, 1)
        receiver.send("forget", SENDER)
        ask(receiver, 2)
        receiver.answers(3)
    assert reasons(receiver) == {0: "refused", 1: "refused", 2: "refused"}
    assert "Connection refused" in receiver.failed[0][1]


@pytest.mark.parametrize(("key", "node"), [(b"another", SENDER), (KEY, b"somebody" * 2), (KEY, RECEIVER)])
def test_who_is_not_the_peer_gets_no_request(target: Path, key: bytes, node: bytes) -> None:
    with Sender(key=key, node_id=node) as sender, Receiver() as receiver:
        aim(receiver, sender.port, target)
        ask(receiver, 0, 1)
        receiver.answers(2)
    assert reasons(receiver) == {0: "auth", 1: "auth"}


def test_a_peer_that_says_nothing_is_left_at_the_deadline(server: socket.socket, target: Path) -> None:
    with Receiver(handshake=0.3) as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, 0)
        receiver.answers(1)
    assert reasons(receiver) == {0: "stalled"}


def test_what_is_cancelled_is_neither_written_nor_answered(server: socket.socket, target: Path) -> None:
    with Receiver(pipeline=2) as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, 0, 1, 2, 3)
        with Talker.accept(server) as peer:
            peer.frame()
            receiver.send("cancel", [0, 2, 4])  # 0 has been sent, 2 has not
            ask(receiver, 5)
            receiver.send("get", b"nobody" * 2, [[9, HANDLE, BLOB, 0, 0, 1, b""]])
            receiver.answers(1)  # so the cancellation has been read
            peer.sock.sendall(peer.link.send(Kind.DATA, 0, len(DATA), ID) + DATA)
            peer.link.moved(len(DATA))
            for _ in (1, 3, 5):
                serve(peer)
            receiver.answers(4)
    assert sorted(receiver.got) == [1, 3, 5]
    found = target.read_bytes()
    assert [found[n * len(DATA) : (n + 1) * len(DATA)] == DATA for n in range(6)] == [False, True] * 3


def test_a_blob_that_is_closed_takes_its_requests_along(server: socket.socket, target: Path) -> None:
    with Receiver() as receiver:
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, 0)
        with Talker.accept(server) as peer:
            receiver.send("close", HANDLE)
            ask(receiver, 1)
            receiver.answers(1)
            assert reasons(receiver) == {1: "disk"}
            assert str(target) not in receiver.open_files()
            serve(peer)
            receiver.send("blob", HANDLE, fds=(os.open(target, os.O_RDWR),))
            ask(receiver, 2)
            serve(peer)
            receiver.answers(2)
    assert target.read_bytes() == bytes(2 * len(DATA)) + DATA


def test_a_disk_that_refuses_fails_the_request_and_not_the_connection(server: socket.socket, target: Path) -> None:
    with Receiver() as receiver:
        receiver.send("peer", SENDER, "127.0.0.1", server.getsockname()[1])
        receiver.send("blob", HANDLE, fds=(os.open("/dev/full", os.O_RDWR),))
        ask(receiver, 0)
        with Talker.accept(server) as peer:
            serve(peer)
            receiver.answers(1)
            receiver.send("close", HANDLE)
            receiver.send("blob", HANDLE, fds=(os.open(target, os.O_RDWR),))
            ask(receiver, 1)
            serve(peer)
            receiver.answers(2)
    assert receiver.failed[0][:2] == ["disk", "No space left on device"]
    assert list(receiver.got) == [1]


def test_a_slow_peer_delays_nobody(tmp_path: Path, server: socket.socket, target: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    with Sender(node_id=b"the fast one----") as sender, Receiver() as receiver:
        sender.blob(str(source), manifest_of(DATA), ChunkSet(1, full=True))
        aim(receiver, server.getsockname()[1], target)
        ask(receiver, 0)
        with Talker.accept(server) as slow:
            slow.sock.sendall(slow.link.send(Kind.DATA, slow.frame().fields[0], len(DATA), ID) + DATA[:5000])
            receiver.send("peer", b"the fast one----", "127.0.0.1", sender.port)
            receiver.send("get", b"the fast one----", [[1, HANDLE, BLOB, 0, len(DATA), len(DATA), ID]])
            receiver.answers(1)
            assert list(receiver.got) == [1]
            slow.sock.sendall(DATA[5000:])
            receiver.answers(2)
    assert target.read_bytes() == DATA * 2
