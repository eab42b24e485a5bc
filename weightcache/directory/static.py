"""Peers from a list that an operator wrote: always believed."""

from __future__ import annotations

from collections.abc import Iterable

from weightcache.config import parse_address
from weightcache.directory.base import Changed, Member, View


class StaticDirectory:
    """The daemons at ``peers`` (HOST:PORT each). The same list may be given to every host: oneself is left out."""

    def __init__(self, peers: Iterable[str]) -> None:
        self._view: View = frozenset(Member(*parse_address(peer)) for peer in peers)

    async def start(self, me: Member, changed: Changed) -> None:
        self._view -= {Member(me.host, me.port)}
        if self._view:
            changed(self._view)

    async def close(self) -> None:
        pass

    def view(self) -> View:
        return self._view
