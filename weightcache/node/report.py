"""What a load reports: bytes by source, seconds by stage, and why anything fell back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from weightcache.core.events import Via
from weightcache.node.spans import Span

MAX_FALLBACKS = 100  # reasons kept of one load


@dataclass(slots=True)
class Tally:
    """Bytes of one load by where they came from, and the reasons for what fell back."""

    local: int = 0  # on this host's disk already, or copied there
    origin: int = 0
    peers: dict[str, int] = field(default_factory=dict)  # by the peer's control address
    fallbacks: list[str] = field(default_factory=list)
    hashing: float = 0.0  # seconds, summed over chunks: some are hashed at the same time
    writing: float = 0.0

    def add(self, other: Tally) -> None:
        self.local += other.local
        self.origin += other.origin
        self.hashing += other.hashing
        self.writing += other.writing
        for peer, size in other.peers.items():
            self.peers[peer] = self.peers.get(peer, 0) + size
        for reason in other.fallbacks:
            self.note(reason)

    def count(self, where: str | Via, length: int, hashing: float, writing: float) -> None:
        """A chunk has come, from a peer (its address) or otherwise."""
        self.hashing += hashing
        self.writing += writing
        if isinstance(where, str):
            self.peers[where] = self.peers.get(where, 0) + length
        elif where is Via.ORIGIN:
            self.origin += length
        else:
            self.local += length

    def note(self, reason: str) -> None:
        """Keep a reason, once."""
        if reason not in self.fallbacks and len(self.fallbacks) < MAX_FALLBACKS:
            self.fallbacks.append(reason)

    def copy(self) -> Tally:
        return replace(self, peers=dict(self.peers), fallbacks=list(self.fallbacks))

    def since(self, earlier: Tally) -> Tally:
        """What came after ``earlier`` was copied from this."""
        peers = {peer: size - earlier.peers.get(peer, 0) for peer, size in self.peers.items()}
        return Tally(
            self.local - earlier.local,
            self.origin - earlier.origin,
            {peer: size for peer, size in peers.items() if size},
            self.fallbacks[len(earlier.fallbacks) :],
            self.hashing - earlier.hashing,
            self.writing - earlier.writing,
        )


@dataclass(slots=True)
class Ended:
    """The loads of a node that have ended, for its metrics. Whose client left before is in neither number."""

    done: int = 0
    failed: int = 0
    seconds: float = 0.0  # that those took which are done

    @contextmanager
    def failing(self) -> Iterator[None]:
        """A step of a load, whose failure is the load's."""
        try:
            yield
        except Exception:
            self.failed += 1
            raise


@dataclass(slots=True)
class Report:
    """One finished load, as ``pull --json`` prints it. ``path`` is the snapshot's directory, or its one file.

    ``first``: seconds until the first chunk was had, None if none came. ``coming``: when chunks came from "origin",
    "peers" and "local", in seconds after the load's start; a chunk comes from the moment it is asked for.
    """

    source: str
    revision: str
    path: str
    bytes_total: int
    here: int  # bytes that were on this disk when it began, if only in other files; ``nearby``: in peers' other files
    nearby: int
    tally: Tally
    seconds: float
    stages: dict[str, float]  # seconds spent in "resolve", "plan", "transfer", "link"
    first: float | None
    coming: dict[str, list[Span]]

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "revision": self.revision,
            "path": self.path,
            "bytes_total": self.bytes_total,
            "bytes_here": self.here,
            "bytes_nearby": self.nearby,
            "bytes_by_source": {"local": self.tally.local, "peer": self.tally.peers, "origin": self.tally.origin},
            "seconds": round(self.seconds, 6),
            "stages": {stage: round(seconds, 6) for stage, seconds in self.stages.items()},
            "transfer": {
                "first": None if self.first is None else round(self.first, 6),
                "hashing": round(self.tally.hashing, 6),
                "writing": round(self.tally.writing, 6),
                **{name: [[round(at, 4) for at in span] for span in spans] for name, spans in self.coming.items()},
            },
            "fallbacks": self.tally.fallbacks,
        }
