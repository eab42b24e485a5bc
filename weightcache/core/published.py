"""A published manifest: what the chunks of one version of an object are, kept where the next to load it looks.

It lies beside the object, as ``NAME.weightcache``, or in the fleet's directory. Signed by nothing: it is a claim, which
names source, version and size so that nobody takes it for another version's, and every chunk is hashed against it as
it comes. What the object itself contradicts is left aside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import msgpack

from weightcache.core.ids import chunk_id
from weightcache.core.layout import CUT, ChunkPlan
from weightcache.core.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest, encode_manifest
from weightcache.core.snapshot import FileEntry
from weightcache.core.source import Source
from weightcache.errors import FormatError, SourceError

SUFFIX = ".weightcache"
MAX_PUBLISHED_BYTES = MAX_MANIFEST_BYTES + 65536
WORTH = CUT  # bytes: of a smaller file nothing is published, and nobody looks
_KIND = "weightcache manifest"
_FORMAT = 1


def is_worth(entry: FileEntry) -> bool:
    """Whether a manifest of this file can be published at all: it is large enough, and tells its versions apart."""
    return entry.size >= WORTH and not entry.version.startswith("once:")


def beside(source: Source) -> Source:
    """Where the manifest of an object lies that is published beside it."""
    return replace(source, path=source.path + SUFFIX)


def without_published(files: Iterable[FileEntry]) -> list[FileEntry]:
    """The files of a tree but for what was published beside them: that is no part of a snapshot."""
    found = list(files)
    names = {entry.path for entry in found}
    return [entry for entry in found if entry.path.removesuffix(SUFFIX) not in names - {entry.path}]


def encode_published(entry: FileEntry, manifest: Manifest) -> bytes:
    """What is published of a file whose chunks are all known: the same bytes whoever publishes it."""
    bare = Manifest(manifest.blob, manifest.plan, bytes(manifest.ids))
    fields = [_KIND, _FORMAT, entry.source.public, entry.version, entry.size, encode_manifest(bare)]
    return bytes(msgpack.packb(fields))


def decode_published(data: bytes, entry: FileEntry) -> Manifest:
    """The manifest in what was published, if it is one of this very version of the file; else FormatError says why."""
    if len(data) > MAX_PUBLISHED_BYTES:
        raise FormatError(f"{len(data)} bytes, at most {MAX_PUBLISHED_BYTES} are accepted")
    try:
        kind, form, source, version, size, encoded = msgpack.unpackb(data, max_array_len=16)
    except Exception as error:  # noqa: BLE001 - whatever hostile bytes make a decoder raise
        raise FormatError(f"no manifest ({type(error).__name__})") from None
    if kind != _KIND or form != _FORMAT or not isinstance(source, str) or not isinstance(encoded, bytes):
        raise FormatError("no manifest that this version reads")
    if version != entry.version or size != entry.size:
        raise FormatError(f"it is of another version ({str(version)[:80]}, {str(size)[:20]} bytes)")
    return fitting(encoded, entry)


def differs(place: str, there: bytes, entry: FileEntry) -> SourceError:
    """The error for a place where something else is published already."""
    try:
        decode_published(there, entry)
        what = "it says otherwise of this very version"
    except FormatError as error:
        what = str(error)
    return SourceError(f"{place} is there already: {what}; replace it with --force")


def fitting(encoded: bytes, entry: FileEntry) -> Manifest:
    """A whole manifest of this very version of the file; else FormatError says why it is not."""
    manifest = decode_manifest(encoded)
    if manifest.blob != entry.blob or manifest.size != entry.size:
        raise FormatError("it is of another object")
    if not manifest.complete:
        raise FormatError("it does not cover the whole object")
    manifest.checked = False  # by whom? This host has yet to see for itself
    return manifest


def check_head(manifest: Manifest, plan: ChunkPlan, head: bytes) -> None:
    """Hold a manifest against the file's plan and its first bytes. Raises FormatError when it is not this file's."""
    if list(manifest.plan.starts) != list(plan.starts):
        raise FormatError("its chunks do not follow from the object's header")
    for index, (offset, length) in enumerate(plan):
        if offset + length > len(head):
            break
        if manifest.id(index) != chunk_id(head[offset : offset + length]):
            raise FormatError("the object's header is another one")
