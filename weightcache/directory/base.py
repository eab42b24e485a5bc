"""Who is alive: the interface that every way of finding peers has.

A directory tells addresses and promises nothing: who answers there is what the handshake finds out. Losing a
directory costs news, never a running load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Member:
    """A peer's control address, and its node id and datacenter ("": not told) if the directory knows them."""

    host: str
    port: int
    node_id: bytes | None = None
    datacenter: str = ""


View = frozenset[Member]
Changed = Callable[[View], None]


class Directory(Protocol):
    """The peers there are. A view leaves oneself out where the directory can tell; who connects finds out anyway."""

    async def start(self, me: Member, changed: Changed) -> None:
        """Announce ``me`` and keep calling ``changed`` with the whole view, on the event loop, whenever it differs.

        Returns once there has been a first look around, or a few seconds were not enough for one.
        Raises ConfigError if what was configured cannot work on this host.
        """

    async def close(self) -> None:
        """Take the announcement back, and call ``changed`` no more. Also after a failed start, or twice."""

    def view(self) -> View:
        """Who is believed to be alive now."""


@runtime_checkable
class Registry(Protocol):
    """What a directory may be able to do besides: tell who holds a blob, and keep for all what one host has learned.

    None of it raises for want of the directory. What is read back is bounded in size and no more than somebody's word.
    """

    @property
    def trouble(self) -> str:
        """Why it cannot be asked now, in one line; empty while it can."""

    def announce(self, blobs: Iterable[bytes], *, complete: bool) -> None:
        """This host holds blobs from now on: all or (not ``complete``) some of each. Told soon, many at once, and
        again for as long as this host lives, until ``withdraw``."""

    def withdraw(self, blobs: Iterable[bytes]) -> None:
        """It does not any more."""

    async def holders(self, blob: bytes, limit: int) -> list[Member]:
        """Up to ``limit`` living peers that hold a blob, complete ones first, random among equals; never oneself."""

    async def teach(self, name: str, data: bytes) -> bool:
        """Keep ``data`` (at most MAX_TAUGHT bytes) for all under ``name``, see below; whether that worked."""

    async def learned(self, name: str) -> bytes | None:
        """What was taught under ``name``, if one who knows the cluster key taught it; its time starts anew."""


MAX_TAUGHT = 32 << 20  # bytes


def snapshot_name(source: str) -> str:
    """What an encoded snapshot of a source is taught under. ``source`` without a query: that may be a secret."""
    return f"snapshot:{source}"


def manifest_name(blob: bytes) -> str:
    """What an encoded manifest is taught under."""
    return f"manifest:{blob.hex()}"
