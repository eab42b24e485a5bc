"""A bandwidth cap: when may more be asked for."""

from __future__ import annotations

BURST = 0.1  # seconds' worth that may be asked ahead


class Pace:
    """At most ``rate`` bytes a second over time; None: as much as there is."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self.free_at = float("-inf")  # when what was asked for so far is paid for

    def open(self, now: float) -> bool:
        """Whether more may be asked for."""
        return self.free_at - BURST <= now  # in the very words of ``opens_at``: a sum would be rounded another way

    def spend(self, size: int, now: float) -> None:
        if self._rate is not None:
            self.free_at = max(now, self.free_at) + size / self._rate

    def opens_at(self, now: float) -> float:
        """When it opens; infinity when it is open."""
        return self.free_at - BURST if not self.open(now) else float("inf")
