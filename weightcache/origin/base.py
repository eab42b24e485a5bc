"""What all origins share: their interface, how they state versions, and how their refusals become our errors."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Protocol

from weightcache.core.ids import Buffer
from weightcache.core.published import beside, without_published
from weightcache.core.snapshot import MAX_FILES, MAX_SIZE, FileEntry, Snapshot, check_path, folder_name, tree_revision
from weightcache.core.source import Source
from weightcache.errors import (
    OriginUnavailable,
    SourceChanged,
    SourceDenied,
    SourceError,
    SourceNotFound,
    WeightcacheError,
)

PIECE = 1 << 20  # bytes: the most that ``stream`` yields at once
PATIENCE = 0.05  # seconds after which what has come of a read is handed on, though more is due
SLOWEST = 64 << 10  # bytes/s: an origin that trickles more slowly than this has failed

Room = Callable[[int], Awaitable[memoryview]]  # memory for the next of so many bytes that are due
Came = Callable[[memoryview], None]  # is given the bytes of a read in order, as they come

_TAG = re.compile(r'(?P<weak>W/)?"?(?P<tag>[\x21\x23-\x7e]{1,1000})"?')
_LOGIN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    "hf": "set HF_TOKEN to a token that may read it, and accept the repository's terms if it has any",
    "file": "let the daemon's user read it",
}


class Origin(Protocol):
    """Where bytes come from. Every call is one bounded attempt: whoever calls decides about retries.

    All raise SourceNotFound, SourceDenied, SourceChanged or SourceError for what a retry cannot mend, and
    OriginUnavailable for what it may.
    """

    async def resolve(self, source: Source) -> Snapshot:
        """What the source is now: its files, with their sizes and versions."""
        ...

    async def read(self, entry: FileEntry, begin: int, end: int, room: Room, came: Came) -> None:
        """Bytes [begin, end) of exactly that version; all within ``entry.size``. It is over when all have come.

        They lie in what ``room`` gives, unless the origin's client has memory of its own. When this does not end well,
        a thread may write into that room, behind what has come, for a moment still.
        """
        ...

    def stream(self, entry: FileEntry) -> AsyncGenerator[Buffer, None]:
        """The whole of that version from byte 0, in pieces of at most PIECE bytes. For what is not ``ranged``."""
        ...

    async def beside(self, entry: FileEntry, limit: int) -> bytes | None:
        """What was published beside a file (``core.published.beside``), or None. SourceError beyond ``limit`` bytes."""
        ...

    async def publish(self, entry: FileEntry, data: bytes, *, replace: bool) -> bool:
        """Put ``data`` beside a file. False, and nothing is done: there is something, and it is not to be replaced."""
        ...

    async def close(self) -> None:
        """Give up connections and descriptors. Nothing may be asked afterwards."""
        ...


async def fresh(size: int) -> memoryview:
    """Room that is used once."""
    return memoryview(bytearray(size))


async def read_whole(origin: Origin, entry: FileEntry, begin: int, end: int) -> bytes:
    """What ``Origin.read`` brings, in one: for small things."""
    parts: list[memoryview] = []
    await origin.read(entry, begin, end, fresh, parts.append)
    return b"".join(parts)


def version_of(tag: str | None, modified: datetime | None) -> str:
    """A version from an ETag, else from the time of the last change; "" when the origin states neither.

    A tag that no well-behaved server sends (not printable, or endless) counts as none.
    """
    match = _TAG.fullmatch(tag or "")
    if match:
        return ("weak:" if match["weak"] else "etag:") + match["tag"]
    # obstore gives 1970 where there was no Last-Modified
    return f"modified:{modified.astimezone(UTC).isoformat()}" if modified and modified.timestamp() > 0 else ""


def strong_tag(entry: FileEntry) -> str | None:
    """What ``If-Match`` may carry for this entry; None when its version is no strong ETag."""
    kind, _, tag = entry.version.partition(":")
    return f'"{tag}"' if kind == "etag" else None


def check_state(entry: FileEntry, version: str, size: int) -> None:
    """Raise SourceChanged unless an answer states the version and total size that ``entry`` was resolved to."""
    if not entry.version.startswith("once:") and version != entry.version:
        raise changed(entry, version or "without a version")
    if size != entry.size:
        raise changed(entry, f"{size} bytes")


def changed(entry: FileEntry, now: str) -> SourceChanged:
    """The error for an object that is no longer what was resolved; ``now`` says what it is instead."""
    was = f"{entry.version}, {entry.size} bytes"
    return SourceChanged(f"{entry.source.public} changed at its origin: it was {was}, now it is {now}; load it again")


def check_size(source: Source, size: int) -> int:
    """``size`` itself if a file may be that large; else SourceError."""
    if not 0 <= size <= MAX_SIZE:
        raise SourceError(f"{source.public}: its origin states a size of {size} bytes; at most {MAX_SIZE} are accepted")
    return size


def refused(source: Source, status: int, detail: str = "", retry_after: float | None = None) -> WeightcacheError:
    """The error for an HTTP status that is no success. ``detail`` is the origin's own code for it, if it gave one."""
    said = f"the origin answers {status}" + (f" ({detail})" if detail else "")
    if status in (401, 403):
        login = _LOGIN.get(source.scheme, "it asks for a login, and none is sent to web servers; use a signed URL")
        if detail == "RequestTimeTooSkewed":
            login = "this host's clock is wrong: set it"
        return SourceDenied(f"{source.public}: {said}; {login}")
    if status in (404, 410):
        if detail in ("NoSuchBucket", "ContainerNotFound"):
            return SourceNotFound(f"{source.scheme}://{source.authority}: no such bucket; {said}")
        return SourceNotFound(f"{source.public}: nothing of that name; {said}")
    if status in (408, 425, 429) or status >= 500:
        return unavailable(source, said, retry_after)
    return SourceError(f"{source.public}: {said}; check the source and the origin's settings")


def unavailable(source: Source, reason: str, retry_after: float | None = None) -> OriginUnavailable:
    """The error for an origin that could not be reached or broke off; ``retry_after`` in seconds, if it asked."""
    error = OriginUnavailable(f"{source.public}: {reason}; try again, or check that this host reaches the origin")
    error.retry_after = retry_after
    return error


def broke_off(source: Source, got: int, length: int) -> OriginUnavailable:
    """The error for a body that ended early."""
    return unavailable(source, f"broke off after {got} of {length} bytes")


def allowance(timeout: float, length: int) -> float:
    """Seconds that a read of ``length`` bytes may take as a whole, given those it may go without a byte."""
    return timeout + length / SLOWEST


def pieces(data: bytes | memoryview) -> Iterator[memoryview]:
    """``data`` in parts of at most PIECE bytes, without copying."""
    view = memoryview(data)
    return (view[at : at + PIECE] for at in range(0, len(view), PIECE))


def one_file(source: Source, entry: FileEntry) -> Snapshot:
    """The snapshot of a source that names one object."""
    check_path(entry.path)
    return Snapshot(source, folder_name(source), tree_revision([entry]), (entry,), time.time(), single=True)


def too_long(source: Source, limit: int) -> SourceError:
    """The error for something small by its nature that is not."""
    return SourceError(f"{source.public}: more than the {limit} bytes that a manifest may have")


def unwritable(entry: FileEntry, why: str) -> SourceError:
    """The error for a manifest that cannot be put beside its object."""
    name = beside(entry.source).path.rpartition("/")[2]
    way = f"publish it with --to fleet, or with --to FILE and put that beside the object, as {name}"
    return SourceError(f"{entry.source.public}: {why}; {way}")


def unpermitted(entry: FileEntry) -> SourceDenied:
    """The error for credentials that may read an object, and not write beside it."""
    where = beside(entry.source).public
    return SourceDenied(
        f"{where}: the daemon's credentials may not write it; permit them to, or publish with --to fleet or --to FILE"
    )


def tree(source: Source, entries: Iterable[FileEntry]) -> Snapshot:
    """The snapshot of everything below a source. SourceNotFound when that is nothing, SourceError when too much."""
    files: list[FileEntry] = []
    for entry in entries:
        check_path(entry.path)
        files.append(entry)
        check_count(source, len(files))
    if not files:
        raise SourceNotFound(f"{source.public}: neither an object nor anything below it")
    files = sorted(without_published(files), key=lambda entry: entry.path)
    return Snapshot(source, folder_name(source), tree_revision(files), tuple(files), time.time())


def check_count(source: Source, count: int) -> None:
    """Raise SourceError when a source holds more files than a snapshot may."""
    if count > MAX_FILES:
        raise SourceError(f"{source.public}: more than {MAX_FILES} files; name a part of it")
