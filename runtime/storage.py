"""The bytes of one file, by mapping or by reading: the two backends.

A mapping is private, so that who writes into a tensor changes neither the file nor anybody else's tensor: the kernel
copies each page on its first write. The copy holds what the page held *then*. If a neighbour on that page were still
arriving, its bytes would land in the file and never show in the mapping. Therefore bytes leave a mapping only when all
of every page they touch is had; a page that nobody can have written to stays the file's own, and keeps up with it.

Whatever is made of a buffer keeps it alive, and the lease on the file lasts as long as the mapping.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError

from weightcache.runtime.opened import Opened

_PAGE = mmap.PAGESIZE


class Storage(Protocol):
    """One file's bytes. Owns the lease on it; safe to use from several threads."""

    size: int

    def wait(self, begin: int, end: int) -> None:
        """Return when the bytes [begin, end) are had."""

    def take(self, begin: int, end: int, align: int) -> tuple[Any, int]:
        """The bytes [begin, end), once had, as (writable buffer, offset in it); the offset is a multiple of ``align``.

        ``begin`` < ``end``. Writing to the buffer changes nothing outside it.
        """


class Mapped:
    """Backend ``mmap``: one private mapping of the whole file, read lazily by the kernel."""

    def __init__(self, fd: int, size: int, opened: Opened) -> None:
        self.size = size
        self.wait = opened.wait
        self._map = mmap.mmap(fd, self.size, access=mmap.ACCESS_COPY)
        weakref.finalize(self._map, opened.close)

    def take(self, begin: int, end: int, align: int) -> tuple[Any, int]:
        # Whole pages (see above), though the last one ends with the file.
        self.wait(begin - begin % _PAGE, min(end + -end % _PAGE, self.size))
        if begin % align == 0:
            return self._map, begin
        # The format pads the header only, so a tensor may lie anywhere; torch on the CPU can crash on such data.
        return np.frombuffer(self._map, np.uint8, end - begin, begin).copy(), 0


class Read:
    """Backend ``pread``: each tensor is read into memory of its own."""

    def __init__(self, fd: int, size: int, opened: Opened) -> None:
        self.size = size
        self.wait = opened.wait
        self._fd = os.dup(fd)
        self._path = opened.path
        weakref.finalize(self, _release, self._fd, opened.close)

    def take(self, begin: int, end: int, align: int) -> tuple[Any, int]:
        self.wait(begin, end)
        buffer: Any = np.empty(end - begin, np.uint8)  # aligned for every dtype, and not zeroed first
        at = begin + os.preadv(self._fd, [buffer], begin)
        while at < end:
            got = os.preadv(self._fd, [buffer[at - begin :]], at)
            if not got:
                raise SafetensorError(f"Could not read tensor from {self._path}: the file was truncated while open")
            at += got
        return buffer, 0


def _release(fd: int, close: Callable[[], None]) -> None:
    os.close(fd)
    close()
