"""Which chunk next, and from whom: the choice among what might be asked for. It asks nobody and books nothing.

Of the chunks that some usable peer has, a host takes those that it is its turn to spread (scatter.py), from random
places within. Among a chunk's holders one is drawn, in proportion to rate / (bytes owed + length) and to how little
else is to be had from it: who alone has much should not be asked for what others have, too. The origin is asked for
what no usable peer has, when it is this host's turn to read (turns.py). A header comes first: workers wait for it. One
choice looks at a bounded number of chunks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

from weightcache.core.bits import members, members_from_anywhere
from weightcache.core.events import Reach, Via, Where
from weightcache.core.layout import CHUNK
from weightcache.core.loads import Load
from weightcache.core.outside import Outside
from weightcache.core.peers import NEVER, Peers

HEADER = 1  # the first chunk, as a set: a worker waits for it before anything else
CHUNKS_SEEN = 16  # looked at in vain before a turn is given up
EAGER_LEAST, EAGER_MOST = 0.005, 1.0  # seconds, bounds of what a chunk takes this host: idle for so long, it is eager


Question = tuple[Where, list[int]]  # whom to ask, and for which chunks


class Choice:
    """``again``: when it is worth asking once more although nothing has happened."""

    def __init__(self, peers: Peers, outside: Outside, draw: random.Random) -> None:
        self._peers = peers
        self._outside = outside
        self._random = draw
        self.again = NEVER

    def of_peers(self, load: Load, wanted: int, now: float, *, thorough: bool) -> Question | None:
        """A chunk of the ``wanted``, and who should be asked for it."""
        peers = self._peers
        if not (load.complete & peers.open or wanted & load.held):
            return None
        holders = load.complete | load.partial
        alone = load.scatter.alone  # then nobody's uplink is everybody's queue
        held = load.held if alone else load.held_by(peers.askable(load.partial))
        some = wanted if load.complete & peers.open else wanted & held
        seen = None if thorough else CHUNKS_SEEN if peers.askable(holders) else 1
        for chunk in islice(self._in_turn(load, some, now), seen):
            if askable := peers.askable(load.having(chunk)):
                load.scatter.idle = None
                demand = None if alone else load.demand
                return peers.sample(askable, load.length(chunk), self._random, demand), [chunk]
        return None

    def _in_turn(self, load: Load, wanted: int, now: float) -> Iterator[int]:
        scatter = load.scatter
        if scatter.alone or not wanted:
            yield from members(wanted & HEADER)
            yield from members_from_anywhere(wanted & ~HEADER, self._random)
            return
        if scatter.idle is None:
            scatter.idle = now
        step = min(EAGER_MOST, max(EAGER_LEAST, CHUNK / self._peers.rate))
        eager = int((now - scatter.idle) / step + 1e-6)
        self.again = min(self.again, scatter.idle + (eager + 1) * step)
        for waves in (0, eager) if eager else (0,):
            for some in scatter.turn(wanted, load.levels, load.complete.bit_count(), waves):
                yield from members_from_anywhere(some, self._random)

    def looks_outside(self, load: Load, wanted: int) -> bool:
        """Whether any of the ``wanted`` chunks is perhaps to be had from no peer of the own datacenter."""
        usable = self._peers.open | self._peers.busy
        if not load.complete & usable and (load.partial & ~usable or wanted & ~load.held):
            return True
        load.turns.rest()
        return False

    def of_outside(
        self, load: Load, wanted: int, now: float, *, origin: bool, far: int, thorough: bool
    ) -> Question | None:
        """A chunk of the ``wanted`` that it is this host's turn to read, from the ``origin`` if that may be asked, or,
        if it is one of ``far``, from another datacenter."""
        peers = self._peers
        usable = peers.open | peers.busy
        left_alone = wanted & load.held if load.partial & ~usable else 0
        wanted = load.turns.mine(wanted & ~load.spent | wanted & far, wanted & ~load.held | left_alone, usable, now)
        if load.turns.look > now:
            self.again = min(self.again, load.turns.look)
        # What failed is tried again in order: soon it is known whether it can be had at all.
        orders = [members(wanted & load.tried), members(wanted & HEADER)]
        orders += [members_from_anywhere(wanted & some, self._random) for some in (~load.held, left_alone)]
        for order in orders:
            for chunk in islice(order, None if thorough else CHUNKS_SEEN):
                if load.holders[chunk] & usable:
                    continue
                if far >> chunk & 1 and (askable := peers.askable(load.far.having(chunk))):
                    return peers.sample(askable, load.length(chunk), self._random), [chunk]
                if origin and not load.spent >> chunk & 1 and not self._outside.waits(load, chunk, usable):
                    return Via.ORIGIN, self._run(load, chunk, wanted, usable)
        return None

    def _run(self, load: Load, chunk: int, wanted: int, usable: int) -> list[int]:
        """``chunk`` and the neighbours that only the origin has, as far as one read goes."""
        if load.origin is Reach.STREAM:  # all of it passes by anyway
            return list(members(load.missing & ~load.local))
        return load.run(chunk, wanted & ~load.spent & ~self._outside.kept(load, usable), usable)
