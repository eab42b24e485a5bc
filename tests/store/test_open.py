"""Opening a store: by one process, in a directory that serves, quickly."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store.support import CHUNK, content, fill
from weightcache.core.ids import blob_id
from weightcache.core.layout import ChunkPlan
from weightcache.core.manifest import Manifest
from weightcache.errors import StoreError, StoreInUse
from weightcache.store import Store

Opener = Callable[..., Store]
Worker = Callable[..., "subprocess.Popen[str]"]

HOLDS = """
import sys
from pathlib import Path
from weightcache.store import Store
store = Store.open(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
"""


def test_one_process_at_a_time(root: Path, open_store: Opener, worker: Worker) -> None:
    holder = worker(HOLDS, root)
    with pytest.raises(StoreInUse, match=f"{root}: in use by process {holder.pid}; stop it"):
        open_store()
    holder.kill()
    holder.wait()
    store = open_store()
    with pytest.raises(StoreInUse, match=str(os.getpid())):
        open_store()
    store.close()
    store.close()
    open_store()


def test_a_path_that_is_a_file_is_refused(root: Path, open_store: Opener) -> None:
    root.write_text("a file")
    with pytest.raises(StoreError, match=str(root)):
        open_store()
    assert root.read_text() == "a file"


def test_a_refused_store_is_not_left_locked(root: Path, open_store: Opener) -> None:
    root.mkdir()
    (root / "blobs").write_text("in the way")
    with pytest.raises(StoreError, match="blobs"):
        open_store()
    (root / "blobs").unlink()
    open_store()


ORDINARY_USER = """
import os, sys
from pathlib import Path
from tests.store.support import CHUNK, content, fill
from weightcache.errors import StoreError
from weightcache.store import Store
os.setgid(65534); os.setuid(65534)  # after the imports: an ordinary user need not be able to read this Python
os.umask(0o077)
where = Path(sys.argv[1])
made = content("model", CHUNK * 4)
store = Store.open(where / "own")
fill(store, made, [0, 1])
assert store.path(made.blob).stat().st_mode & 0o777 == 0o444
store.close()
store = Store.open(where / "own")
assert fill(store, made, [2, 3])
assert store.path(made.blob).read_bytes() == made.data
assert store.path(made.blob).stat().st_mode & 0o777 == 0o444
assert store.path(made.blob).parent.stat().st_mode & 0o777 == 0o755
store.settle(made.blob)
assert store.evict([made.blob]).freed == CHUNK * 4
try:
    Store.open(where / "locked")
except StoreError as error:
    assert "Permission denied" in str(error), error
else:
    raise AssertionError("opened a directory it may not read")
print("ready", flush=True)
"""


def test_it_works_for_an_ordinary_user_who_is_told_of_what_he_may_not_read(worker: Worker) -> None:
    if os.getuid():
        pytest.skip("only root can become another user")
    where = Path(tempfile.mkdtemp(prefix="weightcache-"))
    try:
        where.chmod(0o777)
        (where / "locked").mkdir(mode=0o700)
        worker(ORDINARY_USER, where)
    finally:
        shutil.rmtree(where)


def test_a_filesystem_without_fallocate_is_used_as_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    made = content("model", CHUNK * 3 + 1)
    assert fill(store, made)
    assert store.path(made.blob).read_bytes() == made.data


def test_memory_backed_disks_work_like_others() -> None:
    root = Path(tempfile.mkdtemp(prefix="weightcache-", dir="/dev/shm"))
    try:
        store = Store.open(root / "store")
        made = content("model", CHUNK * 20)
        assert fill(store, made)
        store.settle(made.blob)
        assert store.path(made.blob).stat().st_blocks * 512 >= CHUNK * 20
        assert all(good for _, good in store.scrub(made.blob))
        reader = store.open_reader(made.blob)
        assert dict(store.evict([made.blob]).kept) == {made.blob: "mapped"}
        os.close(reader)
        assert store.evict([made.blob]).freed == CHUNK * 20
        store.close()
    finally:
        shutil.rmtree(root)


def test_a_hundred_thousand_chunks_open_within_a_second_of_cpu(open_store: Opener) -> None:
    store = open_store()
    size, count, blobs = 512, 2_500, 40
    made = []
    for number in range(blobs):
        plan = ChunkPlan(size * count, tuple(range(0, size * count, size)))
        manifest = Manifest(blob_id(f"https://origin.test/{number}", "etag:1", plan.size), plan)
        store.create(manifest, str(number))
        ids = os.urandom(count * 32)
        landed = [(index, ids[index * 32 : index * 32 + 32], ids[index : index + 16]) for index in range(count)]
        began = time.process_time()
        assert store.record(manifest.blob, landed)
        assert time.process_time() - began < count * 100e-6
        made.append(manifest.blob)
    store.close()
    began = time.process_time()
    store = open_store()
    assert time.process_time() - began < 1.0
    assert all(store.info(blob).state == "complete" for blob in made)  # type: ignore[union-attr]
