"""Room is made by what nobody needs: not by what is pinned, leased, loading, or mapped by any process."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.store.support import CHUNK, content, fill
from weightcache.errors import StoreFull
from weightcache.store import Store
from weightcache.store.store import SLACK

Opener = Callable[..., Store]
Worker = Callable[..., "subprocess.Popen[str]"]

# Maps a file, closes the descriptor (Python's own mmap would keep one), and on the next line of input sends the bytes.
MAPS = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(fd).st_size
at = libc.mmap(None, size, 1, 1, fd, 0)
os.close(fd)
print("ready", flush=True)
sys.stdin.readline()
print(ctypes.string_at(at, size).hex())
"""


def test_the_least_recently_used_go_and_only_as_many_as_needed(open_store: Opener) -> None:
    store = open_store(capacity=CHUNK * 10)
    a, b, c, d = (content(name, CHUNK * 3) for name in "abcd")
    for made in (a, b, c):
        fill(store, made)
    store.touch(a.blob)
    store.create(d.manifest(), "d")
    assert {info.blob for info in store.blobs()} == {a.blob, c.blob, d.blob}
    assert not store.path(b.blob).exists()
    assert store.used == CHUNK * 9


def test_use_is_remembered_across_a_restart(open_store: Opener) -> None:
    store = open_store(capacity=CHUNK * 2)
    a, b = content("a", CHUNK), content("b", CHUNK)
    fill(store, a)
    fill(store, b)
    store.lease(a.blob)
    store.release(a.blob)
    store.close()
    store = open_store(capacity=CHUNK * 2)
    fill(store, content("c", CHUNK))
    assert store.info(b.blob) is None
    assert store.info(a.blob) is not None


def test_what_is_held_stays_and_the_error_says_what_to_do(open_store: Opener, worker: Worker) -> None:
    store = open_store(capacity=CHUNK * 4)
    pinned, leased, loading, mapped = (content(name, CHUNK) for name in ("pinned", "leased", "loading", "mapped"))
    for made in (pinned, leased, mapped):
        fill(store, made)
    store.create(loading.manifest(), "loading")
    store.pin(pinned.blob)
    store.lease(leased.blob)
    store.lease(loading.blob)
    reader = worker(MAPS, store.path(mapped.blob))
    with pytest.raises(StoreFull) as told:
        store.create(content("new", CHUNK).manifest(), "new.safetensors")
    assert re.search(r"no room for new.safetensors: it needs 4,096 bytes.*capacity of 16,384", str(told.value))
    for reason in ("1 pinned", "1 leased", "1 loading", "1 mapped", "unpin"):
        assert reason in str(told.value)
    everything = [made.blob for made in (pinned, leased, loading, mapped)]
    outcome = store.evict(everything)
    assert outcome.freed == 0
    assert dict(outcome.kept) == dict(zip(everything, ("pinned", "leased", "loading", "mapped"), strict=True))

    store.unpin(pinned.blob)
    store.release(leased.blob)
    store.release(loading.blob)
    assert reader.communicate("\n")[0].strip() == mapped.data.hex()
    assert store.evict(everything).freed == CHUNK * 4
    assert store.blobs() == []
    assert store.used == 0
    assert list((store.root / "blobs").iterdir()) == []


def test_nothing_is_evicted_for_what_will_not_fit_anyway(open_store: Opener) -> None:
    store = open_store(capacity=CHUNK * 4)
    a, b = content("a", CHUNK * 2), content("b", CHUNK * 2)
    fill(store, a)
    fill(store, b)
    store.pin(b.blob)
    with pytest.raises(StoreFull):
        store.create(content("c", CHUNK * 3).manifest(), "c")
    assert len(store.blobs()) == 2


def test_a_pin_outlives_a_restart_and_a_lease_does_not(open_store: Opener) -> None:
    a, b = content("a", CHUNK), content("b", CHUNK)
    store = open_store()
    for made in (a, b):
        fill(store, made)
    store.pin(a.blob)
    store.lease(b.blob)
    store.close()
    store = open_store()
    assert dict(store.evict([a.blob, b.blob]).kept) == {a.blob: "pinned"}


def test_a_lease_on_a_name_holds_the_blob_that_is_created(open_store: Opener) -> None:
    store = open_store(capacity=CHUNK * 2)
    a = content("a", CHUNK * 2)
    store.lease(a.blob)
    fill(store, a)
    with pytest.raises(StoreFull, match="1 leased"):
        store.create(content("b", CHUNK).manifest(), "b")


def test_the_stores_own_descriptors_do_not_count_as_mapped(store: Store) -> None:
    made = content("a", CHUNK * 3)
    fill(store, made)
    store.settle(made.blob)
    assert all(good for _, good in store.scrub(made.blob))
    assert store.verify_digest(made.blob, "sha256:" + "0" * 64) is False
    assert store.evict([made.blob]).freed == CHUNK * 3


def test_who_serves_a_blob_is_asked_to_let_go_and_told_when_it_is_gone(open_store: Opener) -> None:
    store = open_store(capacity=CHUNK * 3)
    served, pinned, new = (content(name, CHUNK) for name in ("served", "pinned", "new"))
    for made in (served, pinned):
        fill(store, made)
    store.pin(pinned.blob)
    readers = {made.blob: store.open_reader(made.blob) for made in (served, pinned)}
    gone: list[bytes] = []

    def let_go(blob: bytes) -> None:
        quick = threading.Thread(target=store.had, args=(pinned.blob,))  # as the event loop may at any time
        quick.start()
        quick.join(10)
        assert not quick.is_alive()
        if blob in readers:
            os.close(readers.pop(blob))

    store.let_go = let_go
    store.gone = gone.append
    store.create(content("large", CHUNK * 2).manifest(), "large")
    assert gone == [served.blob]
    assert list(readers) == [pinned.blob]
    store.discard(pinned.blob)
    assert gone == [served.blob, pinned.blob]
    assert readers == {}
    assert fill(store, new)


def test_blobs_that_share_a_file_go_together_and_count_once(open_store: Opener) -> None:
    store = open_store(capacity=CHUNK * 6)
    one, two = content("a", CHUNK * 4, seed="same"), content("b", CHUNK * 4, seed="same")
    for made in (one, two):
        fill(store, made) if made is one else store.create(made.manifest(known=True), "b")
        store.settle(made.blob)
    assert store.evict([one.blob]).freed == 0  # the other still has the bytes
    assert store.used == CHUNK * 4
    store.create(one.manifest(known=True), "a")
    store.pin(two.blob)
    assert dict(store.evict(need=1).kept) == {two.blob: "pinned"}
    store.unpin(two.blob)
    fill(store, content("c", CHUNK * 5))
    assert [info.name for info in store.blobs()] == ["https://origin.test/c"]


def test_a_discarded_blob_is_gone_but_not_from_who_has_it_mapped(store: Store, worker: Worker) -> None:
    made = content("a", CHUNK * 3)
    fill(store, made)
    store.lease(made.blob)
    reader = worker(MAPS, store.path(made.blob))
    store.discard(made.blob)
    assert store.info(made.blob) is None
    other = content("a", CHUNK * 3, seed="another's bytes")
    assert fill(store, other)
    assert reader.communicate("\n")[0].strip() == made.data.hex()
    assert store.path(made.blob).read_bytes() == other.data


def test_who_opens_a_blob_during_its_eviction_waits_and_nobody_dies_of_a_signal(store: Store) -> None:
    made = content("a", CHUNK * 3)
    fill(store, made)
    path = store.path(made.blob)
    with store._files.seized(made.blob) as alone:
        assert alone
        opener = subprocess.Popen(["cat", path], stdout=subprocess.PIPE)
        deadline = time.monotonic() + 10
        while not _waits_for_lease(path):
            assert opener.poll() is None
            assert time.monotonic() < deadline
        path.unlink()
    assert opener.communicate()[0] == made.data


def _waits_for_lease(path: Path) -> bool:
    inode = path.stat().st_ino
    lines = Path("/proc/locks").read_text().splitlines()
    return any("LEASE" in line and "BREAKING" in line and f":{inode} " in line for line in lines)


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB."""
    where, image = tmp_path / "disk", tmp_path / "image"
    where.mkdir()
    if request.param == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(where)]
    else:
        with open(image, "wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
        command = ["mount", "-o", "loop", str(image), str(where)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a {request.param} of 64 MiB cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_is_an_error_at_the_start_and_evicts_first(small_disk: Path, worker: Worker) -> None:
    store = Store.open(small_disk / "store")
    try:
        mib = 1 << 20
        old, new, huge = (
            content(name, size, chunk=mib) for name, size in (("old", 20 * mib), ("new", 30 * mib), ("huge", 60 * mib))
        )
        fill(store, old)
        reader = worker(MAPS, store.path(old.blob))
        with pytest.raises(StoreFull, match="1 mapped"):
            store.create(new.manifest(), "new")
        reader.communicate("\n")
        assert fill(store, new)
        assert store.info(old.blob) is None
        assert store.path(new.blob).read_bytes() == new.data
        with pytest.raises(StoreFull, match="no room for huge"):
            store.create(huge.manifest(), "huge")
        assert not store.path(huge.blob).exists()
        assert store.info(new.blob) is not None
        assert store._files.available() >= SLACK / 2
    finally:
        store.close()


def test_when_the_disk_fills_up_behind_our_back_reserving_evicts_until_it_fits(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quota shows itself only when space is taken: ``statvfs`` says nothing of it."""
    a, b, c = (content(name, CHUNK) for name in "abc")
    for made in (a, b):
        fill(store, made)
    real = os.posix_fallocate

    def quota(fd: int, offset: int, length: int) -> None:
        if len(store.blobs()) > 1:
            raise OSError(122, os.strerror(122))
        real(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", quota)
    assert fill(store, c)
    assert {info.blob for info in store.blobs()} == {b.blob, c.blob}
