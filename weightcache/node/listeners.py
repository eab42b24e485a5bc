"""Who wants news of which blob, and who of them is told what this host gets: its neighbours, in a large swarm.

While this host loads a blob, too, it stands on the rings of those that load it (core/neighbours.py) and tells what it
gets to its neighbours there, and to whoever wants it in other datacenters. Otherwise it tells all.
"""

from __future__ import annotations

from collections.abc import Iterable

from weightcache.core.neighbours import FEW, Rings


class Listeners:
    """For the host ``me``. Peers are named by their ids."""

    def __init__(self, me: bytes) -> None:
        self._me = me
        self._all: dict[bytes, dict[bytes, None]] = {}  # by blob
        self._rings: dict[bytes, Rings] = {}  # by blob: this datacenter's, and this host while it loads
        self._told: dict[bytes, tuple[bytes, ...]] = {}  # by blob: the neighbours that know what this host has

    def __contains__(self, blob: bytes) -> bool:
        return blob in self._all

    def add(self, blob: bytes, peer: bytes, *, remote: bool) -> None:
        """It wants news, and is told right now what there is."""
        self._all.setdefault(blob, {})[peer] = None
        if not remote:
            self._ring(blob).join(peer)
            self._told[blob] = self._near(blob)

    def drop(self, blob: bytes, peer: bytes) -> None:
        if (peers := self._all.get(blob)) is not None:
            peers.pop(peer, None)
            if not peers:
                del self._all[blob]
            self._quit(blob, peer)

    def drop_all(self, peer: bytes) -> list[bytes]:
        """It wants no news any more; of which blobs it did."""
        blobs = [blob for blob, peers in self._all.items() if peer in peers]
        for blob in blobs:
            self.drop(blob, peer)
        return blobs

    def load(self, blob: bytes) -> None:
        """This host begins to load a blob, or has already."""
        if self._me not in (rings := self._ring(blob)):
            rings.join(self._me)
            self._told[blob] = self._near(blob)

    def unload(self, blob: bytes) -> None:
        self._quit(blob, self._me)
        self._told.pop(blob, None)

    def are_many(self, blob: bytes) -> bool:
        """Whether more want news than are neighbours."""
        return len(self._all.get(blob, ())) > FEW

    def all(self, blob: bytes) -> Iterable[bytes]:
        return list(self._all.get(blob, ()))

    def neighbours(self, blob: bytes) -> Iterable[bytes]:
        """Who is told what this host gets."""
        rings = self._rings.get(blob)
        if rings is None or self._me not in rings:
            return self.all(blob)
        near = rings.near(self._me)
        strangers = [peer for peer in self._all.get(blob, ()) if peer not in rings]
        return [*near, *strangers]

    def new(self, blob: bytes) -> list[bytes]:
        """The neighbours that have become such since this was asked last: they have yet to hear what there is."""
        before, now = self._told.get(blob, ()), self._near(blob)
        if now is before:
            return []
        self._told[blob] = now
        return [peer for peer in now if peer not in before]

    def _near(self, blob: bytes) -> tuple[bytes, ...]:
        rings = self._rings.get(blob)
        return rings.near(self._me) if rings is not None else ()

    def _ring(self, blob: bytes) -> Rings:
        return self._rings.setdefault(blob, Rings(blob))

    def _quit(self, blob: bytes, peer: bytes) -> None:
        if (rings := self._rings.get(blob)) is not None:
            rings.quit(peer)
            if not len(rings):
                del self._rings[blob]
