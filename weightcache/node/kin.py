"""Blobs on their way to this host at the same time that have chunks in common: each chunk is to come once.

To the planner, this host is two peers of itself. One has what came with another blob meanwhile, to be copied on the
disk. The other, SOON, says of a chunk that an earlier blob is bringing it: a busy peer is waited for, and SOON is
always busy. The later blob waits for the earlier one, never the other way, so nobody waits in a circle; when the
earlier one ends, with the chunk or without, SOON has it no more.
"""

from __future__ import annotations

from collections.abc import Iterable

from weightcache.core.bitmap import ChunkSet
from weightcache.core.events import Event, PeerGot, PeerHas
from weightcache.node.incoming import Incoming
from weightcache.node.swarm import Place

SOON = b"soon"  # no node has so short an id
SOON_SECONDS = 5.0  # for which SOON is not asked again; what has come by then is known at once


class Kin:
    """``incoming``: by blob, in the order in which they began; ``me``: this host's node id."""

    def __init__(self, incoming: dict[bytes, Incoming], me: bytes) -> None:
        self._incoming = incoming
        self._me = me

    def soon(self, coming: Incoming) -> ChunkSet:
        """The chunks of a blob that earlier ones are bringing."""
        found = ChunkSet(len(coming.manifest))
        for earlier in self._incoming.values():
            if earlier is coming:
                break
            for name in earlier.sought.keys() & coming.sought.keys():
                for chunk in coming.sought[name]:
                    found.add(chunk)
        return found

    def landed(self, name: bytes, place: Place) -> Iterable[Event]:
        """A chunk has come to ``place`` on this disk: who else can copy it."""
        for coming in self._incoming.values():
            if chunks := coming.found(name, place):
                yield PeerGot(self._me, coming.blob, chunks)

    def ended(self) -> Iterable[Event]:
        """A blob is on its way no more: what is left to wait for."""
        return [PeerHas(SOON, coming.blob, self.soon(coming)) for coming in self._incoming.values() if coming.sought]
