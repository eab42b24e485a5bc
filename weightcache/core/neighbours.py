"""Who tells whom: in a large swarm a host's news of chunks goes to a bounded number of neighbours.

Theory of operation. All who load a blob stand on RINGS rings, on each at a place drawn from a hash of ring, member and
blob. A host's neighbours are the one before and the one behind it on each ring. So it has at most 2 * RINGS; both ends
of a pair agree that they are one, without a word; one ring alone joins everybody, and several, each in an order of its
own, let a chunk reach all in a number of steps that grows with the logarithm of the swarm. Who leaves closes the gap
behind itself: those whom it parted are neighbours now. Up to FEW others, everybody is everybody's neighbour.

A ``Crowd`` is a swarm as one host sees it. Hosts that see the same may share one: it knows nothing of its owner.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from xxhash import xxh3_64_intdigest

from weightcache.core.events import Peer
from weightcache.core.homes import Homes
from weightcache.core.reads import Reads

RINGS = 12
FEW = 63  # others that are all one's neighbours: so many tell each other everything


class Rings:
    """The members of one swarm, and who is next to whom."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob
        self._places: dict[Peer, list[tuple[int, Peer]]] = {}  # of each member, on each ring
        self._rings: list[list[tuple[int, Peer]]] = [[] for _ in range(RINGS)]
        self._near: dict[Peer, tuple[Peer, ...]] = {}  # as far as somebody asked

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: Peer) -> bool:
        return name in self._places

    def join(self, name: Peer) -> None:
        if name in self._places:
            return
        key = self._blob + name
        places = self._places[name] = [(xxh3_64_intdigest(key, ring), name) for ring in range(RINGS)]
        for ring, place in zip(self._rings, places, strict=True):
            insort(ring, place)
        self._changed(name)

    def quit(self, name: Peer) -> None:
        if name not in self._places:
            return
        self._changed(name)
        for ring, place in zip(self._rings, self._places.pop(name), strict=True):
            del ring[bisect_left(ring, place)]

    def near(self, name: Peer) -> tuple[Peer, ...]:
        """The neighbours of a member; the very same tuple as long as they are the same. Nobody's, if it is none."""
        found = self._near.get(name)
        if found is None:
            found = self._near[name] = self._others(name)
        return found

    def _others(self, name: Peer) -> tuple[Peer, ...]:
        if name not in self._places:
            return ()
        if len(self._places) <= FEW + 1:
            return tuple(other for other in self._places if other != name)
        return tuple(self._beside(name))

    def _beside(self, name: Peer) -> dict[Peer, None]:
        found: dict[Peer, None] = {}
        for ring, place in zip(self._rings, self._places[name], strict=True):
            at = bisect_left(ring, place)
            found[ring[at - 1][1]] = found[ring[(at + 1) % len(ring)][1]] = None
        found.pop(name, None)
        return found

    def _changed(self, name: Peer) -> None:
        """This member, who stands on the rings, has come or will go."""
        if len(self._places) <= FEW + 2:
            self._near.clear()
            return
        self._near.pop(name, None)
        for other in self._beside(name):
            self._near.pop(other, None)


class Crowd:
    """All who load one blob: their rings, the homes of its parts, and what they read. ``version`` changes when somebody
    comes or goes."""

    def __init__(self, blob: bytes) -> None:
        self.reads = Reads()
        self.version = 0
        self.rings = Rings(blob)
        self._blob = blob
        self._names: dict[Peer, None] = {}
        self._homes: Homes | None = None  # until somebody asks

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: Peer) -> bool:
        return name in self._names

    def join(self, name: Peer) -> None:
        if name not in self._names:
            self.version += 1
            self._names[name] = None
            self.rings.join(name)
            if self._homes is not None:
                self._homes.join(name)

    def quit(self, name: Peer) -> None:
        if name in self._names:
            self.version += 1
            del self._names[name]
            self.rings.quit(name)
            if self._homes is not None:
                self._homes.quit(name)

    def homes(self, parts: int) -> Homes:
        """The homes of the blob's parts: so many, by whoever's count."""
        if self._homes is None:
            self._homes = Homes(self._blob, parts)
            for name in self._names:
                self._homes.join(name)
        return self._homes
