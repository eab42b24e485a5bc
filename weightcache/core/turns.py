"""Whose turn it is to read what from the origin, so that a swarm reads each chunk once.

Theory of operation. Everyone in a swarm wants every chunk, and tells at once what it has got: so a host reads only the
chunks whose *home* it is (homes.py) and takes the others from whoever has them. Chunks go to homes in *parts*, each as
much as one read brings; a blob that can only be streamed is one part. What a member said it has begun to read is left
to it, whoever is its home: that is how a host that started earlier keeps what it has under way, and how members with
different views of the swarm read little twice.

A home may be slow, or see others than we do. A host with nothing left to read of its own therefore takes over what
nobody reads: first what it would be the second to read, then ever more, until after some DOUBLINGs it would read
anything; so few take over the same part, and no part waits forever. A read that has brought nothing for several times
as long as reads take here counts as nobody's.

Reads at once: the origin is shared, and a chunk is worth most to the swarm when it is whole. One read at first, one
more after each that was quick, one less after each that was slow. A host that is alone begins with a few, as others may
be about to start, and is not held back once any of these has ended. In a swarm of more members than should read at once
the parts are read in order, READING bytes at a time: who has ended says so, too, and the homes of the next begin. What
is taken over there is what the line waits for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from operator import attrgetter

from weightcache.core.bits import between, members
from weightcache.core.events import Peer, Reach
from weightcache.core.homes import Homes
from weightcache.core.layout import ChunkPlan
from weightcache.core.neighbours import Crowd

ORIGIN_READ = 8 << 20  # bytes that one ranged read brings: a chunk, or a run of smaller neighbours
SETTLE = 0.25  # seconds of idling before something is taken over: news of who reads what takes a moment
DOUBLING = 0.5  # seconds in which the reach of an idle host doubles
LOOK = 0.1  # seconds between two looks at what could be taken over
FIRST_READS = 2  # at once, by a host that is alone
QUICK = 0.3  # seconds: reads that take longer are not made faster by more of them
READ_SECONDS = 1.0  # believed of a read before any has ended
READING = 64 * ORIGIN_READ  # bytes that a large swarm reads at once
PATIENCE, LATE = 2.0, 4.0  # seconds, and times as long as reads take, after which a read counts as nobody's


class Turns:
    """For one blob. Chunks and slots of peers are sets of bits."""

    def __init__(self, me: Peer, crowd: Crowd, plan: ChunkPlan, origin: Reach) -> None:
        crowd.join(me)
        self._me = me
        self._crowd = crowd
        self._plan = plan
        self._origin = origin
        self._width = 1
        self._ended = False  # whether any read of this host has
        self._seconds = READ_SECONDS  # that a read takes
        self._names: dict[int, Peer] = {}  # by slot: those that load the blob, too
        self._joined = 0  # their slots
        self._seen = -1, 0  # the crowd's version, and those in it that may not be asked: what follows is of then
        self._homes: Homes | None = None  # until there is somebody else
        self._absent: list[Peer] = []  # who is no member for now
        self._home_parts = 0  # parts whose home is here,
        self._own = 0  # and their chunks
        self._reads = crowd.reads
        self._idle: float | None = None  # since when there is nothing of its own left to read
        self.waits = False  # whether parts stand in line: nothing of a later load is read before them
        self._head = 0  # the first chunk in the line, as a set
        self._reach = 0  # chunks that may be taken over
        self.look = float("-inf")  # when it is worth asking again although nothing has happened

    # -- news

    def join(self, slot: int, name: Peer) -> None:
        """A peer loads the blob, too."""
        self._names[slot] = name
        self._joined |= 1 << slot
        self._crowd.join(name)

    def quit(self, slot: int) -> None:
        """It does not any more: it has all, gave up, or left."""
        if (name := self._names.pop(slot, None)) is not None:
            self._joined &= ~(1 << slot)
            self._reads.quit(name)
            self._crowd.quit(name)

    def reads(self, slot: int, chunks: Iterable[int], now: float) -> None:
        """It has begun to read these from the origin."""
        self._reads.begin(self._names[slot], [chunk for chunk in chunks if 0 <= chunk < len(self._plan)], now)

    def got(self, slot: int, chunks: Iterable[int], now: float) -> None:
        """It has these, perhaps by reading them."""
        name = self._names.get(slot)
        if name is None or not self._reads.under_way:
            return
        for chunk in chunks:
            since = self._reads.since(name, chunk)
            if since is not None:
                self._reads.forget([chunk])
                self._learn(now - since)
                if self._origin is Reach.STREAM:  # what comes behind it has been waiting for it
                    self._reads.begin(name, self._reads.of(name), now)

    def took(self, seconds: float) -> None:
        """A read of this host has ended well."""
        self._learn(seconds)
        self._ended = True
        self._width += 1 if seconds < QUICK else -1
        self._width = max(1, self._width)

    # -- decisions

    def rest(self) -> None:
        """Peers have all that is wanted."""
        self._idle, self.waits = None, False

    def part(self, chunk: int) -> range:
        """The chunks that one read can bring, ``chunk`` among them."""
        return self._parts[bisect_right(self._parts, chunk, key=attrgetter("start")) - 1]

    @property
    def members(self) -> int:
        """How many load the blob, this host among them."""
        return len(self._crowd)

    @property
    def shared(self) -> bool:
        """Whether others may read for this host."""
        return len(self._crowd) - len(self._absent) > 1

    def at_once(self, streams: int) -> int:
        """How many reads may be in flight, of at most ``streams``."""
        if self._origin is Reach.STREAM:
            return 1
        self._width = min(self._width, streams)
        if len(self._crowd) > 1:
            return self._width
        return streams if self._ended else min(streams, FIRST_READS)

    def mine(self, wanted: int, unheld: int, usable: int, now: float) -> int:
        """Of the ``wanted`` chunks those that this host may read now. ``unheld``: those that perhaps no peer can give;
        ``usable``: slots of peers that may be asked."""
        self._seat(self._joined & ~usable)
        if not self.shared:
            return wanted
        line, most = unheld & ~self._reads.under_way, readers(self._plan, self._parts)
        self.waits = len(self._crowd) > most and line != 0 and self._origin is Reach.RANGED
        room = most - len(self._reads.readers) if self.waits else len(self._plan)
        own = _first(wanted & self._own & ~self._reads.under_way, line, room)
        if own & unheld:
            self._idle = None
            return own
        if self.waits and (room <= 0 or line & -line != self._head):
            self._head, self._idle = line & -line, None  # it is full, or moves: nobody is missed
        if self._idle is None:
            self._idle, self._reach, self.look = now, 0, now + SETTLE
        elif now >= self.look:
            self.look = now + LOOK
            self._reads.give_up(now - PATIENCE - LATE * self._seconds)  # read by nobody
            self._reach = self._chunks(self._within(2.0 ** min((now - self._idle) / DOUBLING, 64.0)))
        return _first(wanted & (self._own | self._reach) & ~self._reads.under_way, line, room)

    # -- books

    @cached_property
    def _parts(self) -> list[range]:
        return [range(len(self._plan))] if self._origin is Reach.STREAM else parts(self._plan)

    def _seat(self, absent: int) -> None:
        """Whose share is it now? ``absent``: slots of those that may not be asked."""
        if self._seen == (self._crowd.version, absent):
            return
        self._seen = self._crowd.version, absent
        self._absent = [name for slot in members(absent) if (name := self._names[slot]) in self._crowd]
        if not self.shared and self._homes is None:
            return
        if self._homes is None:
            self._homes = self._crowd.homes(len(self._parts))
        mine = self._homes.share(self._me)
        if self._absent:
            mine |= self._homes.inherited(self._me, self._absent)
        self._own ^= self._chunks(mine ^ self._home_parts)
        self._home_parts = mine

    def _within(self, rank: float) -> int:
        """The parts of which this host is among the first ``rank`` members."""
        assert self._homes is not None
        everybody = len(self._homes)
        return self._homes.reach(self._me, rank * everybody / max(1, everybody - len(self._absent)))

    def _chunks(self, some: int) -> int:
        found = 0
        for part in members(some):
            found |= between(self._parts[part])
        return found

    def _learn(self, seconds: float) -> None:
        self._seconds += 0.3 * (seconds - self._seconds)


def readers(plan: ChunkPlan, parts: Sequence[range]) -> int:
    """How many members of a swarm should read at once."""
    return max(1, READING * len(parts) // max(1, plan.size))


def _first(some: int, line: int, room: int) -> int:
    """Of ``some`` chunks those that are among the first ``room`` in the line."""
    if room >= line.bit_count():
        return some
    found = 0
    for chunk in members(some):
        if (line & ((1 << chunk) - 1)).bit_count() >= room:
            break
        found |= 1 << chunk
    return found


def parts(plan: ChunkPlan) -> list[range]:
    """Neighbouring chunks that one read brings: the same on every host."""
    firsts, room = [], 0
    for chunk, length in enumerate(plan.lengths(0, len(plan))):
        if length > room:
            firsts.append(chunk)
            room = ORIGIN_READ
        room -= length
    return [range(first, end) for first, end in pairwise([*firsts, len(plan)])]
