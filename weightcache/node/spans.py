"""When something was under way: the pieces of a load's time in which chunks were coming from somewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

GAP = 0.005  # seconds without anything that are no gap
MAX_SPANS = 128  # then gaps are bridged, whatever their length

Span = tuple[float, float]  # [begin, end), seconds on one clock


@dataclass(slots=True)
class Spans:
    """Spans, ascending and apart. What overlaps is one."""

    spans: list[Span] = field(default_factory=list)

    def add(self, begin: float, end: float) -> None:
        """Add a span that ends no earlier than all before it."""
        while self.spans and (begin <= self.spans[-1][1] + GAP or len(self.spans) >= MAX_SPANS):
            begin = min(begin, self.spans.pop()[0])
        self.spans.append((begin, end))


def joined(parts: Iterable[Spans], since: float) -> list[Span]:
    """All of them together, as seconds after ``since``; what was before it is cut off."""
    whole = Spans()
    for begin, end in sorted((span for part in parts for span in part.spans), key=lambda span: span[1]):
        if end > since:
            whole.add(max(begin, since) - since, end - since)
    return whole.spans
