"""The files of blobs: reserved whole before the first byte, never cut or punched, unlinked when they go.

Who else uses a file is asked of the kernel: it grants a write lease (``F_SETLEASE``) only on a file that nobody else
has open or mapped, and a mapping counts after its descriptor is closed. While the lease is held, whoever opens the file
waits; so between asking and unlinking nobody slips in. The lease announces an opener by a signal: SIGURG, which is
ignored by default, while the usual SIGIO would end the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from weightcache.core.ids import ID_BYTES

FILE_MODE = 0o444
DIR_MODE = 0o755

_BLOB_NAME = re.compile(rf"^[0-9a-f]{{{2 * ID_BYTES}}}$")
_sync_file_range = ctypes.CDLL(None).sync_file_range
_WRITE = 2
_WRITE_AND_WAIT = 1 | _WRITE | 4  # WAIT_BEFORE, WRITE, WAIT_AFTER
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS)


class BlobFiles:
    """The files below one ``blobs/`` directory. Not for several threads at once where names are added or removed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spare = root / ".new"  # the name of whatever is about to be renamed to where it belongs
        make_dir(root)

    def path(self, blob: bytes) -> Path:
        name = blob.hex()
        return self.root / name[:2] / name

    def reserve(self, blob: bytes, size: int) -> int:
        """Create a blob's file with all its space; returns the inode. Raises OSError and leaves nothing behind."""
        path = self.path(blob)
        make_dir(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            os.fchmod(fd, FILE_MODE)  # whatever the umask
            if size:
                _allocate(fd, size)
            return os.fstat(fd).st_ino
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)

    def link(self, blob: bytes, target: Path) -> None:
        """Make ``target`` a hard link to a blob, at once for whoever looks; what was there is replaced."""
        make_dir(target.parent)
        try:
            os.link(self.path(blob), self.spare)
            os.replace(self.spare, target)
        finally:
            self.spare.unlink(missing_ok=True)

    def remove(self, blob: bytes) -> None:
        path = self.path(blob)
        path.unlink(missing_ok=True)
        prune(path.parent, self.root)

    def open_reader(self, blob: bytes) -> int:
        return os.open(self.path(blob), os.O_RDONLY | os.O_CLOEXEC)

    def open_writer(self, blob: bytes) -> int:
        """A descriptor to write with. Its mode forbids that even to the owner, who therefore lifts it for a moment."""
        path = self.path(blob)
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            os.chmod(path, 0o644)
            try:
                return os.open(path, os.O_RDWR | os.O_CLOEXEC)
            finally:
                os.chmod(path, FILE_MODE)

    @contextlib.contextmanager
    def seized(self, blob: bytes) -> Iterator[bool]:
        """Whether nobody has a blob's file open or mapped; false where the kernel cannot tell.

        Until the end nobody else gets to open it. A file unlinked meanwhile gives its space back only then, which can
        take long: hold no lock across the end.
        """
        try:
            fd = self.open_reader(blob)
        except FileNotFoundError:
            yield True
            return
        try:
            try:
                fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                alone = True
            except OSError:
                alone = False
            yield alone
        finally:
            os.close(fd)

    def scan(self) -> Iterator[tuple[bytes, os.stat_result]]:
        """Every blob file there is."""
        self.spare.unlink(missing_ok=True)
        for folder in os.scandir(self.root):
            if len(folder.name) == 2 and folder.is_dir(follow_symlinks=False):
                for file in os.scandir(folder):
                    if _BLOB_NAME.match(file.name) and file.name.startswith(folder.name):
                        yield bytes.fromhex(file.name), file.stat(follow_symlinks=False)

    def available(self) -> int:
        """Bytes the disk has left for this process."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize


def _allocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(fd, size)  # the best such a filesystem offers; a C library that emulates it never comes here


def start_flush(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write the dirty pages of [offset, offset + length) out, without waiting for it."""
    _sync_file_range(fd, ctypes.c_long(offset), ctypes.c_long(length), _WRITE)


def flush_range(fd: int, offset: int, length: int) -> None:
    """Write the dirty pages of [offset, offset + length) out, and wait for it. Says nothing of metadata: see fsync."""
    _sync_file_range(fd, ctypes.c_long(offset), ctypes.c_long(length), _WRITE_AND_WAIT)


def make_dir(path: Path) -> None:
    """Make a directory that workers may enter, whatever the umask, and what lies above it. An existing one is left."""
    try:
        path.mkdir()
    except FileExistsError:
        return
    except FileNotFoundError:
        make_dir(path.parent)
        path.mkdir(exist_ok=True)
    path.chmod(DIR_MODE)


def prune(folder: Path, root: Path) -> None:
    """Remove ``folder`` and what lies above it, up to ``root``, as far as it is empty."""
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
