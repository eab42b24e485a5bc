"""Anonymous files in memory: what a process hands another that does not fit a channel message."""

from __future__ import annotations

import os

from weightcache.core.ids import Buffer
from weightcache.errors import FormatError


def memory_file(*parts: Buffer) -> int:
    """A descriptor of a file that holds ``parts``, one after the other: the caller's to close or to send."""
    fd = os.memfd_create("weightcache")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.writelines(parts)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_memory_file(fd: int, limit: int) -> bytes:
    """All that such a file holds, wherever its offset stands; does not close it. Raises FormatError past ``limit``."""
    size = os.fstat(fd).st_size
    if size > limit:
        raise FormatError(f"a table of {size} bytes between processes: at most {limit} are accepted")
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        return file.read(size)
