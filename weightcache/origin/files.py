"""``file://``: disks and network mounts of this host, confined to the configured roots.

Confinement is checked on the descriptor, after the kernel has followed every link: what was opened is what is checked.
"""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from weightcache.config import OriginConfig
from weightcache.core.ids import Buffer
from weightcache.core.published import beside
from weightcache.core.snapshot import FileEntry, Snapshot, check_path
from weightcache.core.source import Source
from weightcache.errors import SourceDenied, SourceError, SourceNotFound
from weightcache.origin.base import PIECE, Came, Room, check_state, one_file, too_long, tree, unavailable, unpermitted

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # opening a pipe or a terminal must not block or act


class FileOrigin:
    """Local files. A version is (mtime in ns, size, inode): what a rewrite or a replacement cannot leave as it was."""

    def __init__(self, config: OriginConfig) -> None:
        self._roots = tuple(os.path.realpath(root.expanduser()) for root in config.file_roots)

    async def resolve(self, source: Source) -> Snapshot:
        return await asyncio.to_thread(self._resolve, source)

    async def read(self, entry: FileEntry, begin: int, end: int, room: Room, came: Came) -> None:
        while begin < end:
            buffer = await room(end - begin)
            await asyncio.to_thread(self._read, entry, begin, buffer)
            came(buffer)
            begin += len(buffer)

    async def stream(self, entry: FileEntry) -> AsyncGenerator[Buffer, None]:
        for begin in range(0, entry.size, PIECE):
            piece = memoryview(bytearray(min(PIECE, entry.size - begin)))
            await asyncio.to_thread(self._read, entry, begin, piece)
            yield piece

    async def beside(self, entry: FileEntry, limit: int) -> bytes | None:
        return await asyncio.to_thread(self._beside, beside(entry.source), limit)

    async def publish(self, entry: FileEntry, data: bytes, *, replace: bool) -> bool:
        return await asyncio.to_thread(self._publish, entry, data, replace)

    async def close(self) -> None:
        """There is nothing to give up: descriptors live as long as one read."""

    def _resolve(self, source: Source) -> Snapshot:
        if os.path.isdir(self._confine(source, os.path.realpath(f"/{source.path}"))):
            return tree(source, self._walk(source))
        if source.is_tree:
            raise SourceNotFound(f"{source.public}: no such directory")
        return one_file(source, self._entry(source, source.path.rpartition("/")[2]))

    def _walk(self, source: Source) -> Iterator[FileEntry]:
        with _errors(source):
            top = f"/{source.path}"
            for directory, inner, names in os.walk(top, onerror=_raise):
                for name in inner:
                    if os.path.islink(os.path.join(directory, name)):
                        raise SourceError(f"{source.public}: {name} is a link to a directory; name its target itself")
                for name in names:
                    path = check_path(os.path.relpath(os.path.join(directory, name), top))
                    yield self._entry(source.child(path), path)

    def _entry(self, source: Source, path: str) -> FileEntry:
        with self._open(source) as fd:
            version, size = _state(fd)
        return FileEntry(path, source, version, size)

    def _read(self, entry: FileEntry, begin: int, buffer: memoryview) -> None:
        at = 0
        with self._open(entry.source) as fd:
            check_state(entry, *_state(fd))
            while at < len(buffer):
                count = os.preadv(fd, [buffer[at:]], begin + at)
                if not count:
                    break  # truncated meanwhile: the state says so
                at += count
            check_state(entry, *_state(fd))
        if at < len(buffer):
            end = begin + len(buffer)
            raise SourceError(f"{entry.source.public}: bytes {begin} to {end} are not within its {entry.size}")

    def _beside(self, source: Source, limit: int) -> bytes | None:
        try:
            with self._open(source) as fd, open(fd, "rb", closefd=False) as file:
                data = file.read(limit + 1)
        except SourceNotFound:
            return None
        if len(data) > limit:
            raise too_long(source, limit)
        return data

    def _publish(self, entry: FileEntry, data: bytes, replace: bool) -> bool:
        source = beside(entry.source)
        try:
            with _errors(source):
                path = f"/{source.path}"
                place = self._confine(source, os.path.realpath(os.path.dirname(path)))
                with tempfile.TemporaryDirectory(dir=place, prefix=".weightcache-") as folder:
                    made = os.path.join(folder, "manifest")
                    with open(made, "xb") as file:
                        file.write(data)
                    # Whole, or not at all.
                    (os.replace if replace else os.link)(made, os.path.join(place, os.path.basename(path)))
        except SourceDenied:
            raise unpermitted(entry) from None
        except FileExistsError:
            return False
        return True

    @contextmanager
    def _open(self, source: Source) -> Iterator[int]:
        with _errors(source):
            # A name outside the roots is refused before it is touched, so that nothing is learned about it.
            fd = os.open(self._confine(source, os.path.realpath(f"/{source.path}")), _OPEN)
            try:
                self._confine(source, os.readlink(f"/proc/self/fd/{fd}"))
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise SourceError(f"{source.public}: not a regular file")
                yield fd
            finally:
                os.close(fd)

    def _confine(self, source: Source, real: str) -> str:
        if not self._roots:
            raise SourceDenied(f"{source.public}: file sources are off; list their directories in origin.file_roots")
        if not any(os.path.commonpath((root, real)) == root for root in self._roots):
            raise SourceDenied(f"{source.public}: outside the directories of origin.file_roots")
        return real


def _state(fd: int) -> tuple[str, int]:
    found = os.fstat(fd)
    return f"modified:{found.st_mtime_ns}-{found.st_size}-{found.st_ino}", found.st_size


@contextmanager
def _errors(source: Source) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise SourceNotFound(f"{source.public}: no such file") from None
    except PermissionError:
        raise SourceDenied(f"{source.public}: permission denied; let the daemon's user read it") from None
    except FileExistsError:
        raise
    except OSError as error:
        raise unavailable(source, error.strerror or type(error).__name__) from None


def _raise(error: OSError) -> None:
    raise error
