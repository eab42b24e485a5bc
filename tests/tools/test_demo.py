"""The demo: it would notice a wrong byte, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from aiohttp import ClientSession, web
from safetensors.numpy import save_file

from tests.servers.loop import wait_until
from weightcache.runtime import load_file
from weightcache.tools.demo_worker import differences
from weightcache.tools.meter import Meter


@pytest.fixture
def original(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(1000, dtype=np.float32), "b": np.ones((3, 5), np.int64), "none": np.empty(0, "u1")}, path)
    return path


def test_what_is_the_same_does_not_differ(original: Path) -> None:
    assert differences(load_file(original), original) == []


@pytest.mark.parametrize("byte", [0, 1999, 3999])
def test_one_flipped_bit_differs(original: Path, byte: int) -> None:
    tensors = load_file(original)
    tensors["a"].numpy().view("u1")[byte] ^= 1
    assert differences(tensors, original) == ["a"]


def test_shape_dtype_and_absence_differ(original: Path) -> None:
    tensors = load_file(original)
    tensors["a"] = tensors["a"].view(tensors["b"].dtype)
    tensors["b"] = tensors["b"].reshape(5, 3)
    del tensors["none"]
    assert differences(tensors, original) == ["a", "b", "none"]


async def test_the_meter_counts_what_leaves_and_what_is_asked() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=bytes(1_000_000))

    app = web.Application()
    app.router.add_get("/x", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    meter = Meter(runner.addresses[0][1])
    async with meter.listening(), ClientSession() as session:

        async def ask() -> None:
            async with session.get(f"http://127.0.0.1:{meter.port}/x") as response:
                assert len(await response.read()) == 1_000_000

        await asyncio.gather(*(ask() for _ in range(4)))
        await ask()
    await runner.cleanup()
    assert meter.requests == 5
    assert 5_000_000 < meter.sent < 5_010_000


def _children(parent: int) -> set[int]:
    """All descendants of a process."""
    found: set[int] = set()
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | _children(child)
    return found


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory for temporary files; the paths of sockets in it are short enough."""
    with tempfile.TemporaryDirectory(prefix="wc", dir="/tmp") as folder:
        yield Path(folder)


def test_interrupted_it_leaves_nothing_behind(short: Path) -> None:
    command = [sys.executable, "-m", "weightcache.tools.demo"]
    environ = os.environ | {"TMPDIR": str(short)}
    with subprocess.Popen(command, env=environ, stdout=-1, stderr=-1, text=True) as demo:
        # the server, two daemons and their senders: in the middle of it all
        wait_until(lambda: len(_children(demo.pid)) >= 5, 60, "the demo's processes")
        children = _children(demo.pid)
        demo.send_signal(signal.SIGTERM)
        _, err = demo.communicate(timeout=30)
    assert demo.returncode == 128 + signal.SIGTERM
    assert err == ""
    wait_until(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()], 10, "their end")
    assert list(short.iterdir()) == []


def test_it_plays_to_its_end(short: Path) -> None:
    environ = os.environ | {"TMPDIR": str(short), "COLUMNS": "120"}
    command = [sys.executable, "-m", "weightcache.tools.demo"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.partition("own disk")[2]
    for load in ("cold", "from peers", "warm", "together"):
        assert load in table
    assert done.stdout.count("every byte is the original's; the origin sent 0 B in 0 requests") == 3
    assert list(short.iterdir()) == []
