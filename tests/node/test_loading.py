"""A load whose blob is discarded under it: whole again by itself, or a clear end; and how the host says it is."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from weightcache.config import Config, OriginConfig
from weightcache.core.snapshot import Snapshot
from weightcache.errors import UnknownBlob
from weightcache.node.loading import LINK_ATTEMPTS
from weightcache.node.node import Node

SIZE = 9 << 20


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(Config(store=tmp_path / "store", origin=OriginConfig(file_roots=(tmp_path / "shelf",))), serve=False)
    await node.start()
    yield node
    await node.stop()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "shelf").mkdir()
    path = tmp_path / "shelf" / "model.bin"
    path.write_bytes(os.urandom(SIZE))
    return path


def lose(node: Node, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every blob be found wrong when its load is about to link it."""
    link = node.store.materialise
    left = iter(range(times))

    def after_discarding(snapshot: Snapshot, *, whole: bool) -> Path:
        if next(left, None) is not None:
            for entry in snapshot.files:
                node.store.discard(entry.blob)
        return link(snapshot, whole=whole)

    monkeypatch.setattr(node.store, "materialise", after_discarding)


@pytest.mark.parametrize("here", [False, True], ids=["that has just come", "that was here"])
async def test_a_blob_that_is_discarded_is_brought_again(
    node: Node, file: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    if here:
        async with node.load(file.as_uri()) as loading:
            await loading.opened()
            await loading.finished()
    lose(node, LINK_ATTEMPTS - 1, monkeypatch)
    async with node.load(file.as_uri()) as loading:
        await loading.opened()
        report = await loading.finished()
        assert Path(report.path).read_bytes() == file.read_bytes()
        assert report.tally.origin == (LINK_ATTEMPTS - here) * SIZE
        assert f"{file.as_uri()}: what was here is not what its origin has: brought again" in report.tally.fallbacks


async def test_not_for_ever(node: Node, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose(node, LINK_ATTEMPTS, monkeypatch)
    async with node.load(file.as_uri()) as loading:
        await loading.opened()
        with pytest.raises(UnknownBlob):
            await loading.finished()


async def test_a_clock_that_is_set_back_changes_no_uptime(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = node.status()["uptime_seconds"], time.time
    monkeypatch.setattr(time, "time", lambda: now() - 1e6)
    assert 0 <= before <= node.status()["uptime_seconds"] < 600
