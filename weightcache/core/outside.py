"""What lies outside the own datacenter: the origin, and the holders of other datacenters.

Theory of operation. Both are read alike: each chunk once a datacenter, by the host whose turn it is (turns.py), and
handed out from there. Which of the two goes first is policy. Where remote holders do, the origin is asked only for what
none of them that may be asked, or is merely busy, has; where the origin does, they are asked for what it does not give:
it cannot be read, has failed just now, or is not asked for that chunk any more.
"""

from __future__ import annotations

from collections.abc import Sequence

from weightcache.core.events import OfPeer, Reach
from weightcache.core.loads import Load
from weightcache.core.peers import Peers


class Outside:
    """The policy. ``prefer``: "local", and "origin" and "remote" in the order in which they are asked; without the
    latter nothing is ever asked of another datacenter."""

    def __init__(self, prefer: Sequence[str]) -> None:
        self._remote = "remote" in prefer
        self._remote_first = self._remote and prefer.index("remote") < prefer.index("origin")

    def hear(self, load: Load, slot: int, event: OfPeer) -> None:
        """What a peer of another datacenter says of a blob."""
        if self._remote:
            load.hear_from_afar(slot, event)

    def may_ask(self, load: Load, peers: Peers, now: float) -> int:
        """The chunks for which remote holders may be asked now, if they have them."""
        far = load.far
        if not (far.complete | far.partial) & peers.open:
            return 0
        held = load.missing if far.complete & peers.open else load.missing & far.held
        first = self._remote_first or load.origin is Reach.NONE or now < load.origin_rests_until
        return held if first else held & load.spent

    def waits(self, load: Load, chunk: int, usable: int) -> bool:
        """Whether a chunk is left to a remote holder that will soon be able to send it."""
        return self._remote_first and load.far.having(chunk) & usable != 0

    def kept(self, load: Load, usable: int) -> int:
        """Chunks that the origin is not asked for along with others."""
        if not self._remote_first or not (load.far.complete | load.far.partial) & usable:
            return 0
        return load.missing if load.far.complete & usable else load.far.held
