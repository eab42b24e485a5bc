"""Reading again: flipped bits are found and dropped, and the page cache is left as it was."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os

import pytest

from tests.store.support import CHUNK, Content, content, fill
from weightcache.core.ids import NO_ID
from weightcache.errors import StoreError
from weightcache.store import Store


def flip(store: Store, made: Content, offset: int) -> None:
    """What a failing disk does."""
    path = store.path(made.blob)
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte[0] ^ 0x10]), offset)
    finally:
        os.close(fd)


@pytest.mark.parametrize("deep", [False, True])
def test_flipped_bits_are_found(store: Store, deep: bool) -> None:
    made = content("model", CHUNK * 50 + 1)
    fill(store, made, range(0, 51, 2))
    for offset in (0, CHUNK * 20 + 77, CHUNK * 50):
        flip(store, made, offset)
    flip(store, made, CHUNK * 3)  # not had: nothing is said of it
    found = dict(store.scrub(made.blob, deep=deep))
    assert list(found) == list(range(0, 51, 2))
    assert [index for index, good in found.items() if not good] == [0, 20, 50]


def test_a_blob_being_scrubbed_is_not_evicted(store: Store) -> None:
    made = content("model", CHUNK * 3)
    fill(store, made)
    reading = store.scrub(made.blob)
    next(reading)
    assert dict(store.evict([made.blob]).kept) == {made.blob: "leased"}
    assert all(good for _, good in reading)
    assert store.evict([made.blob]).freed == CHUNK * 3


def test_a_shortened_file_is_found(store: Store) -> None:
    made = content("model", CHUNK * 3)
    fill(store, made)
    os.truncate(store.path(made.blob), CHUNK + 5)
    assert dict(store.scrub(made.blob)) == {0: True, 1: False, 2: False}


def test_digests_of_the_whole_file(store: Store) -> None:
    made = content("model", CHUNK * 700 + 13)
    fill(store, made)
    sha, md5 = hashlib.sha256(made.data).hexdigest(), hashlib.md5(made.data).hexdigest()
    assert store.verify_digest(made.blob, f"sha256:{sha}") is True
    assert store.verify_digest(made.blob, f"sha256:{sha.upper()}") is True
    assert store.verify_digest(made.blob, f"md5:{md5}") is True
    assert store.verify_digest(made.blob, "md5:" + "0" * 32) is False
    assert store.verify_digest(made.blob, "xor:00") is None
    store.unhave(made.blob, [0])
    with pytest.raises(StoreError, match="not complete"):
        store.verify_digest(made.blob, f"sha256:{sha}")


def test_crc32c_is_verified_where_a_package_can(store: Store) -> None:
    pytest.importorskip("crc32c")
    made = Content("https://origin.test/nine", b"123456789")
    fill(store, made)
    assert store.verify_digest(made.blob, "crc32c:e3069283") is True
    assert store.verify_digest(made.blob, "crc32c:e3069284") is False


def test_an_empty_file_has_digests_too(store: Store) -> None:
    made = content("empty", 0)
    fill(store, made)
    assert store.verify_digest(made.blob, f"sha256:{hashlib.sha256().hexdigest()}") is True
    assert list(store.scrub(made.blob)) == []


def cached_pages(fd: int, size: int) -> int:
    """How many of a file's pages are in memory, asked without bringing any there."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    pages = ctypes.create_string_buffer(size // mmap.PAGESIZE)
    assert libc.mincore(at, size, pages) == 0
    libc.munmap(at, size)
    return sum(page & 1 for page in pages.raw[: size // mmap.PAGESIZE])


def test_a_scrub_leaves_the_page_cache_as_it_was(store: Store) -> None:
    size = 4 << 20
    made = content("model", size, chunk=size // 4)
    fill(store, made)
    fd = store.open_reader(made.blob)
    try:
        os.fsync(fd)
        before = cached_pages(fd, size)
        assert all(good for _, good in store.scrub(made.blob))
        assert cached_pages(fd, size) == before == size // mmap.PAGESIZE
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_pages(fd, size):
            pytest.skip("this filesystem keeps everything in memory")
        assert all(good for _, good in store.scrub(made.blob))
        assert cached_pages(fd, size) == 0
    finally:
        os.close(fd)


def test_ids_stay_known_for_what_is_lost(store: Store) -> None:
    made = content("model", CHUNK * 3)
    fill(store, made)
    flip(store, made, CHUNK)
    bad = [index for index, good in store.scrub(made.blob) if not good]
    store.unhave(made.blob, bad)
    manifest = store.manifest(made.blob)
    assert manifest is not None
    assert NO_ID not in (manifest.ids[0:32], manifest.ids[32:64])
    assert fill(store, made, bad)
    assert store.path(made.blob).read_bytes() == made.data
