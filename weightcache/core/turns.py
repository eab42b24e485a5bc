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
be about to start, and is not held back once any of these has ended.
"""

from __future__ import annotations

from collections.abc import Iterable

from weightcache.core.bits import members
from weightcache.core.events import Peer, Reach
from weightcache.core.homes import Homes
from weightcache.core.layout import CHUNK, ChunkPlan

ORIGIN_READ = CHUNK  # bytes that one ranged read brings: a chunk, or a run of smaller neighbours
SETTLE = 0.25  # seconds of idling before something is taken over: news of who reads what takes a moment
DOUBLING = 0.5  # seconds in which the reach of an idle host doubles
LOOK = 0.1  # seconds between two looks at what could be taken over
FIRST_READS = 2  # at once, by a host that is alone
QUICK = 0.3  # seconds: reads that take longer are not made faster by more of them
READ_SECONDS = 1.0  # believed of a read before any has ended
PATIENCE, LATE = 2.0, 4.0  # seconds, and times as long as reads take, after which a read counts as nobody's


class Turns:
    """For one blob. Chunks and slots of peers are sets of bits."""

    def __init__(self, me: Peer, blob: bytes, plan: ChunkPlan, origin: Reach) -> None:
        self._me = me
        self._blob = blob
        self._plan = plan
        self._origin = origin
        self._width = 1
        self._ended = False  # whether any read of this host has
        self._seconds = READ_SECONDS  # that a read takes
        self._names: dict[int, Peer] = {}  # by slot: those that load the blob, too
        self._joined = 0  # their slots
        self._seated = 0  # those of them that may be asked: the members
        self._homes: Homes | None = None  # until there is somebody else
        self._parts: list[int] = []  # the chunks of each
        self._home_parts = 0  # parts whose home is here,
        self._own = 0  # and their chunks
        self._readers: dict[int, tuple[int, float]] = {}  # chunk -> slot of who reads it, and since when
        self._read = 0  # such chunks
        self._idle: float | None = None  # since when there is nothing of its own left to read
        self._reach = 0  # chunks that may be taken over
        self.look = float("-inf")  # when it is worth asking again although nothing has happened

    # -- news

    def join(self, slot: int, name: Peer) -> bool:
        """A peer loads the blob, too; whether that is news."""
        if slot in self._names:
            return False
        self._names[slot] = name
        self._joined |= 1 << slot
        return True

    def quit(self, slot: int) -> Peer | None:
        """It does not any more: it has all, gave up, or left. Its name, if it did."""
        if slot not in self._names:
            return None
        self._seat(self._seated & ~(1 << slot))
        self._forget(self._read_by(slot))
        self._joined &= ~(1 << slot)
        return self._names.pop(slot)

    def reads(self, slot: int, chunks: Iterable[int], now: float) -> None:
        """It has begun to read these from the origin."""
        for chunk in chunks:
            if 0 <= chunk < len(self._plan):
                self._readers[chunk] = slot, now
                self._read |= 1 << chunk

    def got(self, slot: int, chunks: Iterable[int], now: float) -> None:
        """It has these, perhaps by reading them."""
        for chunk in chunks if self._readers else ():
            reader, since = self._readers.get(chunk, (None, now))
            if reader == slot:
                self._forget([chunk])
                self._learn(now - since)
                if self._origin is Reach.STREAM:  # what comes behind it has been waiting for it
                    self.reads(slot, self._read_by(slot), now)

    def took(self, seconds: float) -> None:
        """A read of this host has ended well."""
        self._learn(seconds)
        self._ended = True
        self._width += 1 if seconds < QUICK else -1
        self._width = max(1, self._width)

    # -- decisions

    @property
    def shared(self) -> bool:
        """Whether others may read for this host."""
        return self._seated != 0

    def at_once(self, streams: int) -> int:
        """How many reads may be in flight, of at most ``streams``."""
        if self._origin is Reach.STREAM:
            return 1
        self._width = min(self._width, streams)
        if self._joined:
            return self._width
        return streams if self._ended else min(streams, FIRST_READS)

    def mine(self, wanted: int, unheld: int, usable: int, now: float) -> int:
        """Of the ``wanted`` chunks those that this host may read now. ``unheld``: those that perhaps no peer can give;
        ``usable``: slots of peers that may be asked."""
        self._seat(self._joined & usable)
        if not self._seated:
            return wanted
        own = wanted & self._own & ~self._read
        if own & unheld or not unheld:
            self._idle = None
            return own
        if self._idle is None:
            self._idle, self._reach, self.look = now, 0, now + SETTLE
        elif now >= self.look:
            assert self._homes is not None
            self.look = now + LOOK
            self._give_up_reads(now)
            self._reach = self._chunks(self._homes.reach(2.0 ** min((now - self._idle) / DOUBLING, 64.0)))
        return wanted & (self._own | self._reach) & ~self._read

    # -- books

    def _seat(self, seated: int) -> None:
        changed = seated ^ self._seated
        if not changed:
            return
        if self._homes is None:
            self._parts = [(1 << len(self._plan)) - 1] if self._origin is Reach.STREAM else parts(self._plan)
            self._homes = Homes(self._me, self._blob, len(self._parts))
        for slot in members(changed):
            if seated >> slot & 1:
                self._homes.join(self._names[slot])
            else:
                self._homes.quit(self._names[slot])  # what it reads may come all the same
        self._seated = seated
        self._own ^= self._chunks(self._homes.mine ^ self._home_parts)
        self._home_parts = self._homes.mine

    def _chunks(self, some: int) -> int:
        found = 0
        for part in members(some):
            found |= self._parts[part]
        return found

    def _give_up_reads(self, now: float) -> None:
        """What has been read for so long is read by nobody."""
        since = now - PATIENCE - LATE * self._seconds
        self._forget([chunk for chunk, (_, began) in self._readers.items() if began < since])

    def _read_by(self, slot: int) -> list[int]:
        return [chunk for chunk, (reader, _) in self._readers.items() if reader == slot]

    def _forget(self, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            del self._readers[chunk]
            self._read &= ~(1 << chunk)

    def _learn(self, seconds: float) -> None:
        self._seconds += 0.3 * (seconds - self._seconds)


def parts(plan: ChunkPlan) -> list[int]:
    """Neighbouring chunks that one read brings, as sets: the same on every host."""
    found: list[int] = []
    room = 0
    for chunk in range(len(plan)):
        _, length = plan.span(chunk)
        if length > room:
            found.append(0)
            room = ORIGIN_READ
        found[-1] |= 1 << chunk
        room -= length
    return found
