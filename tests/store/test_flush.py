"""The dirty budget: what landed is counted until it is on the disk, and descriptors do not stay open."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest

from weightcache.store import Flusher, Landing, flush

PIECE = 1 << 20


@pytest.fixture
def landing(tmp_path: Path) -> Landing:
    fd = os.open(tmp_path / "blob", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, 16 * PIECE)
    return Landing(fd)


def land(flusher: Flusher, landing: Landing, pieces: range) -> None:
    for piece in pieces:
        os.pwrite(landing.fd, os.urandom(PIECE), piece * PIECE)
        flusher.landed(landing, piece * PIECE, PIECE)


def open_descriptors(path: str) -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}") == path
        except OSError:
            continue
    return found


def test_at_the_budget_it_is_full_until_the_disk_has_half(landing: Landing) -> None:
    said: list[bool] = []
    caught_up = threading.Event()

    def changed(full: bool) -> None:
        said.append(full)
        if not full:
            caught_up.set()

    flusher = Flusher(4 * PIECE, changed)
    with flusher._work:  # its thread stands still: a quick disk would keep up
        land(flusher, landing, range(12))
    assert caught_up.wait(20)
    assert said[0] is True
    assert said == [bool(index % 2 == 0) for index in range(len(said))]
    flusher.close()


def test_below_half_nothing_is_written_out_until_the_blob_has_come(landing: Landing) -> None:
    path = os.readlink(f"/proc/self/fd/{landing.fd}")
    flusher = Flusher(64 * PIECE, lambda full: None)
    land(flusher, landing, range(8))
    assert flusher.dirty == 8 * PIECE
    assert open_descriptors(path) == 1, "one a blob, however many ranges"
    flusher.ended(landing)
    deadline = threading.Event()
    while flusher.dirty and not deadline.wait(0.01):
        pass
    assert open_descriptors(path) == 0, "an open descriptor would keep the blob from being evicted"
    flusher.close()


def test_the_budget_follows_what_the_kernel_allows(
    landing: Landing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allow(size: int) -> None:
        (tmp_path / "vmstat").write_text(f"nr_dirty 3\nnr_dirty_threshold {size // mmap.PAGESIZE}\nnr_free_pages 4\n")

    monkeypatch.setattr(flush, "_STATISTICS", tmp_path / "vmstat")
    said: list[bool] = []
    allow(4 << 30)
    flusher = Flusher(None, said.append)
    flusher.landed(landing, 0, 900 << 20)
    assert not said, "below half of 4 GiB"
    with flusher._work:  # its thread stands still
        allow(1 << 30)  # as when a process takes most of the host's memory
        second = flusher.begin(os.dup(landing.fd))
        assert said == [True], "who fetches hears of it at once"
        allow(4 << 30)
        third = flusher.begin(os.dup(landing.fd))
        assert said == [True, False]
    for unused in (second, third):
        flusher.ended(unused)
    flusher.close()


def test_a_blob_that_ends_before_anything_landed_is_closed_at_once(landing: Landing) -> None:
    path = os.readlink(f"/proc/self/fd/{landing.fd}")
    flusher = Flusher(64 * PIECE, lambda full: None)
    flusher.ended(landing)
    assert open_descriptors(path) == 0


def test_close_leaves_no_descriptor(landing: Landing) -> None:
    path = os.readlink(f"/proc/self/fd/{landing.fd}")
    flusher = Flusher(64 * PIECE, lambda full: None)
    land(flusher, landing, range(4))
    flusher.close()
    assert open_descriptors(path) == 0
