"""Which peers are left alone, until when, and why.

The planner rests a peer that fails to deliver chunks. What else a peer may do wrong shows elsewhere: it tells of a blob
what the origin contradicts, sends a snapshot that cannot be, or never answers. A peer that *lied* is asked nothing and
believed nothing for LIAR_REST seconds, wherever the lie was found; one that is *silent* is asked nothing for a while,
so that each load does not wait for it anew. Both outlast a reconnection.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from weightcache.core.planner import LIAR_REST
from weightcache.log import fields

log = logging.getLogger(__name__)

SILENT_REST = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class _Rest:
    name: str  # the peer's, for people
    why: str
    until: float
    lied: bool


class Trust:
    """By node id. ``on_lie(peer)`` is called when a peer was found to lie: what it said so far counts no more."""

    def __init__(self, on_lie: Callable[[bytes], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_lie = on_lie
        self._clock = clock
        self._rests: dict[bytes, _Rest] = {}

    def lied(self, peer: bytes, name: str, why: str) -> None:
        """The peer said or sent what no honest one does."""
        log.error("peer lied", extra=fields(peer=name, why=why))
        self._rests[peer] = _Rest(name, why, self._clock() + LIAR_REST, lied=True)
        self._on_lie(peer)

    def silent(self, peer: bytes, name: str, why: str) -> None:
        """The peer did not answer."""
        if not self.rest(peer):
            log.warning("peer silent", extra=fields(peer=name, why=why))
            self._rests[peer] = _Rest(name, why, self._clock() + SILENT_REST, lied=False)

    def pardon(self, peer: bytes) -> None:
        """It was another's fault."""
        self._rests.pop(peer, None)

    def rest(self, peer: bytes) -> float:
        """Seconds for which the peer is not to be asked."""
        found = self._rests.get(peer)
        return max(0.0, found.until - self._clock()) if found is not None else 0.0

    def is_liar(self, peer: bytes) -> bool:
        """Whether nothing that the peer says counts now."""
        return self.rest(peer) > 0 and self._rests[peer].lied

    def why(self, peer: bytes) -> str | None:
        return self._rests[peer].why if self.rest(peer) else None

    def reasons(self) -> list[str]:
        """A line for each peer that is left alone now, for reports."""
        now = self._clock()
        self._rests = {peer: found for peer, found in self._rests.items() if found.until > now}
        return [f"peer {found.name}: {found.why}; left alone" for found in self._rests.values()]
