"""A snapshot: what a source resolves to. One object, a repository at a commit, or everything below a prefix.

It is what the origin stated when it was asked: each file's path, size and version. From that follow the blob ids, so
two hosts that resolve the same state of a source ask the swarm for the same blobs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import msgpack
from blake3 import blake3

from weightcache.core.ids import ID_BYTES, blob_id
from weightcache.core.source import Source, parse_source
from weightcache.errors import FormatError

MAX_FILES = 100_000
MAX_PATH = 1024  # bytes of a file's path within its snapshot
MAX_SNAPSHOT_BYTES = 64 << 20  # encoded
MAX_SIZE = 1 << 46  # of one file: 64 TiB
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a snapshot, as its origin states it.

    ``path`` is relative, with "/" between its parts. ``version`` is one of ``sha256:HEX`` (the content's own digest),
    ``etag:TAG`` (strong), ``weak:TAG``, ``modified:TIME``, or ``once:TOKEN`` (the origin states nothing to tell one
    state from another: only the daemon that resolved it may read it, once). ``digest`` is what the origin states of the
    whole file's bytes (``sha256:HEX``, ``md5:HEX``, ``crc32c:HEX``) or "". ``ranged``: the origin answers ranges.
    """

    path: str
    source: Source
    version: str
    size: int
    digest: str = ""
    ranged: bool = True

    @property
    def blob(self) -> bytes:
        """The id of the blob these bytes become (32 bytes)."""
        return blob_id(str(self.source), self.version, self.size)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A resolved source. ``folder`` and ``revision`` place it on disk: ``hub/FOLDER/snapshots/REVISION/``.

    ``immutable``: the source is pinned by content or commit and can never resolve to anything else.
    ``resolved_at``: seconds since the epoch, by the clock of the host that asked the origin.
    """

    source: Source
    folder: str
    revision: str
    files: tuple[FileEntry, ...]
    resolved_at: float
    immutable: bool = False
    single: bool = False  # the source names one file, not a directory

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files)


def folder_name(source: Source) -> str:
    """The directory under ``hub/`` for a source: ``models--org--name`` for a hub, as its own cache names it.

    Elsewhere a readable beginning, and a digest of the source: no two share a directory.
    """
    if source.scheme == "hf":
        return "models--" + source.authority.replace("/", "--")
    parts = [source.scheme, source.authority.replace(":", "-"), *source.path.strip("/").split("/")]
    name = "--".join(part for part in parts if part)
    safe = "".join(char if char.isascii() and (char.isalnum() or char in "-_.+=@") else "_" for char in name)
    return f"{safe[:100]}--{blake3(str(source).encode()).hexdigest(length=8)}"


def tree_revision(files: Iterable[FileEntry]) -> str:
    """The revision of a snapshot whose origin has none of its own: 40 hex digits over its files and their versions."""
    state = blake3(derive_key_context="weightcache 2026 tree revision")
    for entry in sorted(files, key=lambda entry: entry.path):
        state.update(f"{entry.path}\0{entry.version}\0{entry.size}\0".encode())
    return state.hexdigest(length=20)


def check_path(path: str) -> str:
    """``path`` itself if it may be a file's path within a snapshot; else FormatError. It can leave no directory."""
    parts = path.split("/")
    bad = not path or len(path.encode("utf-8", "surrogatepass")) > MAX_PATH or any(p in ("", ".", "..") for p in parts)
    if bad or any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in path):
        raise FormatError(f"{path[:200]!r} is not a path a snapshot may hold")
    return path


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """A snapshot as msgpack. The inverse of ``decode_snapshot``."""
    files = [[f.path, str(f.source), f.version, f.size, f.digest, f.ranged] for f in snapshot.files]
    fields = [_FORMAT, str(snapshot.source), snapshot.folder, snapshot.revision, files]
    return bytes(msgpack.packb([*fields, snapshot.resolved_at, snapshot.immutable, snapshot.single]))


def decode_snapshot(data: bytes) -> Snapshot:
    """Decode what ``encode_snapshot`` made; anything else raises FormatError. Every field is checked."""
    if len(data) > MAX_SNAPSHOT_BYTES:
        raise FormatError(f"snapshot of {len(data)} bytes: at most {MAX_SNAPSHOT_BYTES} are accepted")
    try:
        fields = msgpack.unpackb(data, strict_map_key=False, max_array_len=MAX_FILES + 1, max_str_len=16384)
        version, source, folder, revision, files, resolved_at, immutable, single = fields
        if version != _FORMAT or len(files) > MAX_FILES:
            raise FormatError(f"snapshot of format {version!r}: this version reads {_FORMAT}")
        entries = tuple(_entry(*file) for file in files)
        if len({entry.path for entry in entries}) != len(entries):
            raise FormatError("snapshot holds a path twice")
        # single components, so that nothing lands outside hub/
        for part in (folder, revision):
            if "/" in check_path(part):
                raise FormatError(f"{part[:200]!r} is not a directory's name")
        if type(resolved_at) not in (int, float) or not math.isfinite(resolved_at):
            raise FormatError("snapshot without a time")
        where = parse_source(source)
        return Snapshot(where, folder, revision, entries, float(resolved_at), immutable is True, single is True)
    except FormatError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever hostile bytes make a decoder raise
        raise FormatError(f"not a snapshot: {type(error).__name__}: {error}") from None


def _entry(path: Any, source: Any, version: Any, size: Any, digest: Any, ranged: Any) -> FileEntry:
    texts = (path, source, version, digest)
    if not all(isinstance(text, str) for text in texts) or type(size) is not int or not 0 <= size <= MAX_SIZE:
        raise FormatError("snapshot holds a malformed file")
    if len(version) > 1024 or len(digest) > 256 or not version:
        raise FormatError("snapshot holds a malformed version")
    return FileEntry(check_path(path), parse_source(source), version, size, digest, ranged is True)


def adopt(snapshot: Snapshot, source: Source, now: float) -> Snapshot:
    """What another host says that ``source`` is, with all that follows from the source itself worked out anew.

    Raises FormatError unless every file is one of that source. Its sizes, versions and digests stay that host's word.
    """
    revision = snapshot.revision if source.scheme == "hf" else tree_revision(snapshot.files)
    if snapshot.source != source or snapshot.revision != revision:
        raise FormatError("it is not of this source")
    below = source.path if source.is_tree else f"{source.path}/"
    for entry in snapshot.files:
        if source.scheme == "hf":
            inside = entry.path == source.path or entry.path.startswith(below)
            belongs = inside and entry.source == replace(source.at(revision), path=entry.path)
        else:
            belongs = entry.source == (source if snapshot.single else source.child(entry.path))
        if not belongs or (entry.version.startswith("sha256:") and entry.digest != entry.version):
            raise FormatError(f"it holds {entry.path[:200]!r}, which is no file of this source")
    if snapshot.single and len(snapshot.files) != 1:
        raise FormatError("it is one file, and is not")
    return replace(
        snapshot,
        folder=folder_name(source),
        resolved_at=min(snapshot.resolved_at, now),
        immutable=source.scheme == "hf" and source.revision == revision,
    )


def is_blob_id(name: Any) -> TypeGuard[bytes]:
    return isinstance(name, bytes) and len(name) == ID_BYTES
