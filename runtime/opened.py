"""What the runtime needs of a file, whether it lies on this disk or is still arriving."""

from __future__ import annotations

import os
from typing import Protocol

from weightcache.core.source import is_source


class Opened(Protocol):
    """One file that has its full size already, and whose bytes are had, or will be."""

    @property
    def path(self) -> str:
        """A real path: it may be opened and mapped at once."""

    def wait(self, begin: int, end: int) -> None:
        """Return when the bytes [begin, end) are had; raise the load's WeightcacheError if they never will be.

        Called from any number of threads, once or more a tensor: it must be cheap for what is had.
        """

    def close(self) -> None:
        """Give up the lease. Called once, from whatever thread drops the last tensor: it must not block or raise."""


class LocalFile:
    """A plain file: everything is had, and nothing is leased."""

    def __init__(self, path: str) -> None:
        self.path = path

    def wait(self, begin: int, end: int) -> None:
        pass

    def close(self) -> None:
        pass


def open_source(filename: str | os.PathLike[str]) -> Opened:
    """``filename`` as an Opened: a source is asked of the daemon, anything else is a local path.

    Raises WeightcacheError when the source cannot be used, and TypeError when ``filename`` is no path.
    """
    try:
        path = os.fspath(filename)
    except TypeError as error:
        raise TypeError(f"argument 'filename': {error}") from None
    if not isinstance(path, str):
        raise TypeError("argument 'filename': 'bytes' object is not an instance of 'str'")
    if is_source(path):
        from weightcache.openfile import open_file  # it starts what a process with only local files never needs

        return open_file(path)
    return LocalFile(path)
