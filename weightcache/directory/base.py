"""Who is alive: the interface that every way of finding peers has.

A directory tells addresses and promises nothing: who answers there is what the handshake finds out. Losing a
directory costs news, never a running load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Member:
    """A peer's control address, and its node id if the directory knows it."""

    host: str
    port: int
    node_id: bytes | None = None


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
