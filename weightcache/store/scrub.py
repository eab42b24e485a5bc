"""Reading a blob again: are its chunks still what was written, and is the whole what the origin states?

The page cache belongs to those who serve models: a chunk that was in it stays there, one that had to come from the disk
is dropped again. ``RWF_NOWAIT`` tells the two apart.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from weightcache.core.ids import check, chunk_id
from weightcache.core.layout import CHUNK
from weightcache.store.records import Tables

PIECE = 1 << 20  # bytes of a file that is read as a whole: the daemon keeps the memory


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


def read_spans(fd: int, spans: Iterable[tuple[int, int]], longest: int) -> Iterator[memoryview]:
    """The bytes of (offset, length), each valid until the next is asked for; fewer where the file ends early."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead: it makes the next span look like a used one
    buffer = memoryview(bytearray(longest))
    for offset, length in spans:
        yield buffer[: _read(fd, buffer[:length], offset)]


def _read(fd: int, view: memoryview, offset: int) -> int:
    try:
        if os.preadv(fd, [view], offset, os.RWF_NOWAIT) == len(view):
            return len(view)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
    done = 0
    while done < len(view) and (count := os.preadv(fd, [view[done:]], offset + done)):
        done += count
    os.posix_fadvise(fd, offset, len(view), os.POSIX_FADV_DONTNEED)
    return done


def scrub(fd: int, tables: Tables, *, deep: bool = False) -> Iterator[tuple[int, bool]]:
    """(index, whether it is intact) for every chunk had: by xxh3-128, or by its BLAKE3 id where ``deep``."""
    manifest = tables.manifest
    spans = map(manifest.plan.span, tables.had)
    for index, data in zip(tables.had, read_spans(fd, spans, min(CHUNK, manifest.size)), strict=True):
        good = chunk_id(data) == manifest.id(index) if deep else check(data) == manifest.check(index)
        yield index, good and len(data) == manifest.plan.span(index)[1]


def matches(fd: int, size: int, digest: str, go_on: Callable[[], None] = lambda: None) -> bool | None:
    """Whether the whole file has ``digest`` (``sha256:``, ``md5:`` or ``crc32c:HEX``); None: nothing here can tell.

    ``go_on`` is called between pieces, and may raise.
    """
    algorithm, _, expected = digest.partition(":")
    state = _hash(algorithm)
    if state is None:
        return None
    spans = ((offset, min(PIECE, size - offset)) for offset in range(0, size, PIECE))
    for data in read_spans(fd, spans, PIECE):
        go_on()
        state.update(data)
    return state.hexdigest() == expected.lower()


def _hash(algorithm: str) -> _Hash | None:
    if algorithm == "sha256":
        return hashlib.sha256()
    if algorithm == "md5":
        return hashlib.md5(usedforsecurity=False)
    if algorithm == "crc32c":
        from crc32c import CRC32CHash  # only Google's stores state such a digest

        return CRC32CHash()
    return None
