"""A store in memory (tmpfs): loaded, mapped, evicted, and full, like one on a disk."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.daemons import Daemon, cli
from tests.fleet.weights import tensors
from tests.servers.s3 import S3Server
from weightcache.core.turns import ORIGIN_READ

MEMORY = Path("/dev/shm")
CAPACITY = 48 << 20  # of the store, since the machine's own tmpfs is not to be filled


@pytest.fixture
def folder() -> Iterator[Path]:
    if os.statvfs(MEMORY).f_bavail * os.statvfs(MEMORY).f_frsize < 4 * CAPACITY:
        pytest.skip(f"{MEMORY} has no room")
    with tempfile.TemporaryDirectory(prefix="weightcache-test-", dir=MEMORY) as folder:
        yield Path(folder)


def test_a_store_in_memory(s3_server: S3Server, folder: Path) -> None:
    first, second, large = tensors(3, ORIGIN_READ, 21), tensors(3, ORIGIN_READ, 22), tensors(7, ORIGIN_READ, 23)
    for name, data in (("first", first), ("second", second), ("large", large)):
        s3_server.put("memory", name, data)
    with Daemon(folder, f"--capacity={CAPACITY}", env=s3_server.env()) as host:
        path = Path(host.pull("s3://memory/first")["path"])
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[:] == first
            # Somebody maps it, and the kernel knows (F_SETLEASE): there is no room for the second.
            full = cli("pull", "--json", "s3://memory/second", env=host.worker_env)
            assert full.returncode != 0
            assert json.loads(full.stdout)["error"] == "StoreFull"
            assert mapped[:] == first
        del mapped
        assert Path(host.pull("s3://memory/second")["path"]).read_bytes() == second
        assert not path.exists()  # evicted for it
        full = cli("pull", "--json", "s3://memory/large", env=host.worker_env)
        assert json.loads(full.stdout)["error"] == "StoreFull"
        assert Path(host.pull("s3://memory/second")["path"]).read_bytes() == second
