"""Every error weightcache raises, one tree.

    WeightcacheError
    ├── ConfigError            a setting that is unknown, malformed, or refused
    ├── FormatError            bytes that are not what they claim to be (header, manifest, snapshot)
    ├── SourceError            a source that cannot be used as written
    │   ├── SourceNotFound     the origin answers: no such bucket, repository, object
    │   ├── SourceDenied       credentials refused, or the source is not allow-listed
    │   └── SourceChanged      the object changed underneath a load
    ├── OriginUnavailable      the origin could not be reached, or kept failing
    ├── LoadFailed             no source is left for some chunk
    ├── StoreError             the store cannot do it
    │   ├── StoreFull          no room, and nothing that may be evicted
    │   ├── StoreInUse         another process holds the store
    │   └── BlobCorrupt        bytes on disk are not what was written, and no repair was possible
    ├── ProtocolError          a peer broke the protocol
    │   └── AuthError          a peer does not know the cluster key
    ├── DaemonError            the daemon cannot be reached or cannot start
    └── UnknownBlob            nothing of that name is in the store

A message is one line: it names the thing, says what is wrong, and the way out. Errors cross process borders as
``(class name, message)`` and come out as the same class.
"""

from __future__ import annotations

__all__ = [
    "AuthError",
    "BlobCorrupt",
    "ConfigError",
    "DaemonError",
    "FormatError",
    "LoadFailed",
    "OriginUnavailable",
    "ProtocolError",
    "SourceChanged",
    "SourceDenied",
    "SourceError",
    "SourceNotFound",
    "StoreError",
    "StoreFull",
    "StoreInUse",
    "UnknownBlob",
    "WeightcacheError",
]


class WeightcacheError(Exception):
    """Base of all errors of weightcache. ``exit_code`` is what the command line exits with."""

    exit_code = 1


class ConfigError(WeightcacheError):
    """A setting that is unknown, malformed, or refused."""

    exit_code = 2


class FormatError(WeightcacheError):
    """Bytes that are not what they claim to be."""

    exit_code = 3


class SourceError(WeightcacheError):
    """A source that cannot be used as written."""

    exit_code = 2


class SourceNotFound(SourceError):
    """The origin answers that there is no such bucket, repository or object."""

    exit_code = 4


class SourceDenied(SourceError):
    """The origin refuses the credentials, or the configuration refuses the source."""

    exit_code = 5


class SourceChanged(SourceError):
    """The object changed underneath a load."""

    exit_code = 6


class OriginUnavailable(WeightcacheError):
    """The origin could not be reached, or kept failing after bounded retries.

    ``retry_after``: the seconds it asked to be left alone for, where it said so (lost on a process border).
    """

    exit_code = 7
    retry_after: float | None = None


class LoadFailed(WeightcacheError):
    """No source is left for some chunk of a blob."""

    exit_code = 7


class StoreError(WeightcacheError):
    """The store cannot do what was asked."""

    exit_code = 8


class StoreFull(StoreError):
    """No room on the disk or under the capacity, and nothing that may be evicted."""


class StoreInUse(StoreError):
    """Another process holds the store."""


class BlobCorrupt(StoreError):
    """Bytes on disk are not what was written, and no source could repair them."""


class ProtocolError(WeightcacheError):
    """A peer broke the protocol."""

    exit_code = 9


class AuthError(ProtocolError):
    """A peer does not know the cluster key."""


class DaemonError(WeightcacheError):
    """The daemon cannot be reached, or cannot start."""

    exit_code = 10


class UnknownBlob(WeightcacheError):
    """Nothing of that name is in the store."""

    exit_code = 4


def _tree(root: type[WeightcacheError]) -> dict[str, type[WeightcacheError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def to_wire(error: BaseException) -> tuple[str, str]:
    """An error as ``(class name, one-line message)``; a foreign one keeps its own name in the message."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, WeightcacheError):
        return type(error).__name__, message
    return "WeightcacheError", f"{type(error).__name__}: {message}"


def from_wire(name: str, message: str) -> WeightcacheError:
    """The error that ``to_wire`` described; an unknown name gives the base class."""
    return _tree(WeightcacheError).get(name, WeightcacheError)(message)
