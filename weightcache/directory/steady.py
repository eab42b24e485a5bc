"""A view that does not believe a sudden loss: when many peers vanish at once, it is likelier that the directory did.

Whoever believes to be alone reads from the origin, and a fleet of those is a storm. So while more than half of the
members seen lately are gone, they are kept; each is let go once it has not been seen for ``hold`` seconds.
"""

from __future__ import annotations

import asyncio
import logging

from weightcache.directory.base import Changed, Directory, Member, View
from weightcache.log import fields

log = logging.getLogger(__name__)

HOLD = 30.0  # seconds
MANY = 4  # members; a smaller view is believed whatever it loses


class SteadyView:
    """The rule itself, without a clock: ``now`` is any seconds that never run backwards."""

    def __init__(self, hold: float = HOLD) -> None:
        self._hold = hold
        self._seen: View = frozenset()
        self._gone: dict[Member, float] = {}  # who was seen lately but is not now, and until when that counts
        self.view: View = frozenset()

    def update(self, seen: View, now: float) -> View:
        """What to believe, now that ``seen`` is what the directory says."""
        self._gone.update(dict.fromkeys(self._seen - seen, now + self._hold))
        self._seen = seen
        return self.look(now)

    def look(self, now: float) -> View:
        """What to believe, now that time has passed."""
        gone = {member: until for member, until in self._gone.items() if now < until and member not in self._seen}
        lately = len(self._seen) + len(gone)
        sudden = lately >= MANY and 2 * len(gone) > lately
        self._gone = gone
        # Who was let go before the loss grew sudden does not come back.
        self.view = self._seen | (self.view & gone.keys()) if sudden else self._seen
        return self.view

    @property
    def kept(self) -> View:
        """Who is in the view though the directory no longer says so."""
        return self.view - self._seen

    @property
    def due(self) -> float | None:
        """When ``look`` may answer otherwise if no update comes first; None: never."""
        return min(self._gone.values()) if self.kept else None


class SteadyDirectory:
    """Any directory, its view made steady."""

    def __init__(self, inner: Directory, hold: float = HOLD) -> None:
        self.inner = inner
        self._steady = SteadyView(hold)
        self._told: View = frozenset()
        self._changed: Changed | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, me: Member, changed: Changed) -> None:
        self._changed = changed
        await self.inner.start(me, self._update)

    async def close(self) -> None:
        self._changed = None
        if self._timer is not None:
            self._timer.cancel()
        await self.inner.close()

    def view(self) -> View:
        return self._told

    def _update(self, seen: View) -> None:
        kept_before = self._steady.kept
        self._steady.update(seen, asyncio.get_running_loop().time())
        if self._steady.kept and not kept_before:
            log.warning("many peers vanished at once, kept a while", extra=fields(count=len(self._steady.kept)))
        self._settle()

    def _look(self) -> None:
        self._steady.look(asyncio.get_running_loop().time())
        self._settle()

    def _settle(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self._steady.due
        self._timer = asyncio.get_running_loop().call_at(due, self._look) if due is not None else None
        if self._steady.view != self._told and self._changed is not None:
            self._told = self._steady.view
            self._changed(self._told)
