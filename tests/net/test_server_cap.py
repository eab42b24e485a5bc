"""The sender's bandwidth cap, as peers see it at their sockets."""

from __future__ import annotations

import os
import selectors
import time
from pathlib import Path

import pytest

from tests.net.bulk import BLOB, SECONDS, Sender, Talker, manifest_of, sample
from weightcache.core.bitmap import ChunkSet
from weightcache.core.layout import CHUNK
from weightcache.core.manifest import Manifest
from weightcache.core.pace import BURST
from weightcache.core.wire import Kind

RATE = 20 << 20
BUFFERS = 8 << 20  # what sockets may hold on the way, and a turn


@pytest.fixture(scope="module")
def data() -> bytes:
    return sample(4)


@pytest.fixture
def manifest(data: bytes) -> Manifest:
    return manifest_of(data)


@pytest.fixture
def path(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "blob"
    path.write_bytes(data)
    return str(path)


def test_all_peers_together_get_what_the_cap_says(path: str, data: bytes, manifest: Manifest) -> None:
    with Sender(bandwidth=RATE) as sender, Talker.dial(sender.port) as one, Talker.dial(sender.port) as two:
        sender.blob(path, manifest, ChunkSet(4, full=True))
        began = time.monotonic()
        for peer, chunks in ((one, (0, 1)), (two, (2, 3))):
            for index in chunks:
                peer.send(Kind.GET, index, BLOB, index)
        seen: list[tuple[float, int]] = []
        found = _read_all({one: 2 * CHUNK, two: 2 * CHUNK}, seen)
        seconds = time.monotonic() - began
        for at, total in seen:
            assert total <= RATE * (at - began + BURST) + BUFFERS
        assert len(data) / RATE - BURST - BUFFERS / RATE <= seconds
        assert seconds <= 2 * len(data) / RATE  # nor much less than it says, on a busy machine
        assert found[one] == data[: 2 * CHUNK]
        assert found[two] == data[2 * CHUNK :]


def _read_all(wanted: dict[Talker, int], seen: list[tuple[float, int]]) -> dict[Talker, bytes]:
    """The chunks that peers were asked for; ``seen``: when how many bytes had come to all of them."""
    found = {peer: bytearray() for peer in wanted}
    with selectors.DefaultSelector() as selector:
        for peer in wanted:
            selector.register(peer.sock, selectors.EVENT_READ, peer)
        while any(len(found[peer]) < size for peer, size in wanted.items()):
            ready = selector.select(SECONDS)
            assert ready, "nothing comes"
            for key, _ in ready:
                peer, link = key.data, key.data.link
                if link.bytes_left:
                    part = peer.sock.recv(min(1 << 18, link.bytes_left))
                    assert part
                    found[peer] += part
                    link.moved(len(part))
                else:
                    assert peer.frame().kind is Kind.DATA
                    part = link.take(CHUNK)
                    found[peer] += part
                    link.moved(len(part))
            seen.append((time.monotonic(), sum(map(len, found.values()))))
    return {peer: bytes(got) for peer, got in found.items()}


def test_who_waits_for_the_cap_holds_up_nobody_else(path: str, manifest: Manifest) -> None:
    with Sender(bandwidth=100_000) as sender, Talker.dial(sender.port) as slow, Talker.dial(sender.port) as other:
        sender.blob(path, manifest, ChunkSet(4, [0, 1]))
        slow.send(Kind.GET, 1, BLOB, 0)
        assert slow.frame().kind is Kind.DATA
        for number in range(50):
            other.send(Kind.GET, number, BLOB, 3)
            assert other.frame().fields == [number, "missing", 0]
        assert slow.link.bytes_left == CHUNK  # it would take more than a minute
        other.send(Kind.GET, 50, BLOB, 1)
        number, reason, wait = other.frame().fields
        assert (number, reason) == (50, "busy")
        assert wait > 0


def test_a_peer_that_leaves_while_it_waits_takes_its_share_along(path: str, data: bytes, manifest: Manifest) -> None:
    with Sender(bandwidth=CHUNK) as sender:
        sender.blob(path, manifest, ChunkSet(4, full=True))
        for index in range(3):
            with Talker.dial(sender.port) as gone:
                gone.send(Kind.GET, index, BLOB, index)
                assert gone.frame().kind is Kind.DATA  # not busy: nothing of the others is due any more
        descriptors = len(os.listdir(f"/proc/{sender.process.pid}/fd"))
        assert descriptors < 20
