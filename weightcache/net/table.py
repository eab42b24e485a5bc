"""What a sender must know of a blob, as a memory file: a large blob's tables do not fit a channel message.

length of the manifest u64 (little-endian) | manifest | which chunks are had, as bits
"""

from __future__ import annotations

import struct

from weightcache.core.bitmap import ChunkSet
from weightcache.core.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest, encode_manifest
from weightcache.errors import FormatError
from weightcache.net.memory_file import memory_file, read_memory_file

_LENGTH = struct.Struct("<Q")


def write_table(manifest: Manifest, had: ChunkSet) -> int:
    """A memory file that ``read_table`` reads: a descriptor, the caller's to close or to send."""
    encoded = encode_manifest(manifest)
    return memory_file(_LENGTH.pack(len(encoded)), encoded, had.encode())


def read_table(fd: int) -> tuple[Manifest, ChunkSet]:
    """The manifest and the chunks had. Raises FormatError. Does not close ``fd``."""
    data = read_memory_file(fd, 2 * MAX_MANIFEST_BYTES)
    if len(data) < _LENGTH.size:
        raise FormatError(f"blob table of {len(data)} bytes")
    (length,) = _LENGTH.unpack_from(data)
    manifest = decode_manifest(data[_LENGTH.size : _LENGTH.size + length])
    return manifest, ChunkSet.decode(data[_LENGTH.size + length :], len(manifest))
