"""The planner's vocabulary: what happens to it (events), and what it decides (actions).

Both the daemon and the simulator speak it; neither a socket nor a clock occurs in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum

from weightcache.core.bitmap import ChunkSet
from weightcache.core.layout import ChunkPlan


class Via(Enum):
    """Where a request goes that goes to no peer."""

    ORIGIN = "origin"
    LOCAL = "local"


class Reach(StrEnum):
    """How the origin of a blob can be read."""

    NONE = "none"
    RANGED = "ranged"
    STREAM = "stream"  # from the first byte to the last, by one reader


class Kind(StrEnum):
    """Why a request failed. The first three are the peer's lies; they cost it the rest of LIAR_REST."""

    MISMATCH = "mismatch"
    LENGTH = "length"
    GARBAGE = "garbage"
    AUTH = "auth"  # another node answers, or one with too many connections
    REFUSED = "refused"
    RESET = "reset"
    STALLED = "stalled"
    MISSING = "missing"
    UNKNOWN = "unknown"
    BUSY = "busy"
    UNAVAILABLE = "unavailable"  # the origin, for now
    FATAL = "fatal"  # the origin's last word, or the disk's


# What no honest peer does.
LIES = frozenset({Kind.MISMATCH, Kind.LENGTH, Kind.GARBAGE})

Peer = bytes
Where = Peer | Via


@dataclass(frozen=True, slots=True)
class LoadAdded:
    """This host wants ``blob``. ``local``: missing chunks whose bytes lie elsewhere on its disk.

    ``holders``: what peers have of it, as ``PeerHas`` would say; ``readers``: who loads it, too, as ``PeerReads``.
    """

    blob: bytes
    plan: ChunkPlan
    had: ChunkSet
    rank: int
    origin: Reach
    attempts: int = 5
    local: Sequence[int] = ()
    holders: Sequence[tuple[Peer, ChunkSet | None]] = ()
    readers: Sequence[tuple[Peer, Sequence[int]]] = ()


@dataclass(frozen=True, slots=True)
class LoadRemoved:
    blob: bytes


@dataclass(frozen=True, slots=True)
class PeerMet:
    """``peer`` is there; said before anything of what it has. ``remote``: of another datacenter."""

    peer: Peer
    remote: bool


@dataclass(frozen=True, slots=True)
class PeerHas:
    """``peer`` states what it has of ``blob``: all (None), or a set that replaces what it stated before."""

    peer: Peer
    blob: bytes
    chunks: ChunkSet | None


@dataclass(frozen=True, slots=True)
class PeerGot:
    """``peer`` has some more chunks of ``blob``."""

    peer: Peer
    blob: bytes
    chunks: Sequence[int]


@dataclass(frozen=True, slots=True)
class PeerReads:
    """``peer`` loads ``blob``, too, and has begun to read these chunks from the origin (none: it merely loads)."""

    peer: Peer
    blob: bytes
    chunks: Sequence[int]


@dataclass(frozen=True, slots=True)
class PeerQuits:
    """``peer`` loads ``blob`` no more. What it has of it, it still has."""

    peer: Peer
    blob: bytes


@dataclass(frozen=True, slots=True)
class PeerLeft:
    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerPardoned:
    """What ``peer`` failed with was another's fault."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Got:
    """A chunk of ``request`` arrived, was hashed, and is written."""

    request: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Failed:
    """What is left of ``request`` will not come. ``wait``: seconds that the other end asked for."""

    request: int
    kind: Kind
    detail: str = ""
    wait: float = 0.0
    error: str = "LoadFailed"  # the class of errors.py that a fatal one becomes


@dataclass(frozen=True, slots=True)
class Congested:
    """This host's disk is behind (``on``), or has caught up: nothing is asked for in between."""

    on: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of the last ``Wake`` has come."""


OfPeer = PeerHas | PeerGot | PeerReads | PeerQuits  # what one says of a blob
Event = LoadAdded | LoadRemoved | OfPeer | PeerMet | PeerLeft | PeerPardoned | Got | Failed | Congested | Tick


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask ``via`` for ``chunks`` of ``blob``: one, or of the origin a contiguous run, or all that its stream brings.

    That a peer is silent the planner notices. A read of the origin or of the disk must end by itself, in Got or Failed.
    """

    request: int
    blob: bytes
    via: Where
    chunks: tuple[int, ...]
    whole: bool = False  # the origin's stream, from the first byte


@dataclass(frozen=True, slots=True)
class Cancel:
    request: int


@dataclass(frozen=True, slots=True)
class Blame:
    """Something failed, and how long the one who failed is left alone (seconds): for the report and the log."""

    blob: bytes
    via: Where
    kind: Kind
    detail: str
    rest: float


@dataclass(frozen=True, slots=True)
class Done:
    blob: bytes


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The load cannot be finished: ``error`` names a class of errors.py, ``message`` is one line."""

    blob: bytes
    error: str
    message: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a Tick at ``at`` (the planner's time), unless another Wake follows."""

    at: float


Action = Fetch | Cancel | Blame | Done | GiveUp | Wake
