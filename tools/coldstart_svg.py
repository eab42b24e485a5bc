"""The pictures of a cold start's report: SVG, drawn by hand. Colours are classes, which the page gives a meaning."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from weightcache.tools.coldstart_measures import NodeRun, Point, Run
from weightcache.tools.show import duration

WIDTH = 1000
LEFT, RIGHT, TOP, BOTTOM = 150, 76, 26, 40  # around a chart's area: names, figures, markers, the axis
MOST = 24  # nodes that are drawn by themselves
_NAME = 18  # characters of a name that fit
GAP_STAGES = ("resolve", "plan", "first", "moving", "tail", "link", "device")

Bars = Sequence[tuple[str, float, float]]  # class, begin, end


class Picture:
    """A chart over time: ``x`` places seconds, and what is added is drawn in order."""

    def __init__(self, height: float, seconds: float, title: str, top: float = TOP) -> None:
        self.height = height
        self.top = top
        self._title = title
        self._step, self._most = ticks(seconds)
        self._parts: list[str] = []

    def x(self, seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(seconds, self._most) / self._most

    def add(self, part: str) -> None:
        self._parts.append(part)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>')

    def bar(self, kind: str, begin: float, end: float, y: float, height: float, about: str) -> None:
        """A rectangle over time, never too thin to be seen, that says what it is when pointed at."""
        left = self.x(begin)
        width = max(1.0, self.x(end) - left)
        self.add(
            f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}">'
            f"<title>{escape(about)}</title></rect>"
        )

    def marker(self, seconds: float, text: str) -> None:
        """A dashed line at a moment."""
        x = self.x(seconds)
        late = x > WIDTH * 0.75
        self.add(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{self.top - 8}" y2="{self.top + self.height}" class="marker"/>')
        self.text(x + (-5 if late else 5), self.top - 10, text, "strong", "end" if late else "start")

    def svg(self) -> str:
        bottom = self.top + self.height
        axis = []
        for number in range(round(self._most / self._step) + 1):
            at = number * self._step
            x = self.x(at)
            axis.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{self.top}" y2="{bottom}" class="grid"/>')
            axis.append(f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{at:g}</text>')
        axis.append(f'<text x="{LEFT - 14}" y="{bottom + 18:.1f}" text-anchor="end">seconds</text>')
        body = "".join([*axis, *self._parts])
        return (
            f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM - 12:.0f}" role="img" aria-label="{escape(self._title)}">'
            f"<title>{escape(self._title)}</title>{body}</svg>"
        )


def ticks(most: float) -> tuple[float, float]:
    """The step between an axis' marks, 1, 2 or 5 times a power of ten, and its end: four to ten steps."""
    step = 1e-3
    factors = (2, 2.5, 2)
    number = 0
    while most > 8 * step:
        step *= factors[number % 3]
        number += 1
    count = max(1, -(-most // step))
    return step, count * step


def progress(run: Run, alone: Run | None) -> str:
    """What share of the object each node has over time, with peers and without."""
    lines = [(run, "with")] + ([(alone, "without")] if alone is not None else [])
    seconds = max(_end(one) for one, _ in lines)
    picture = Picture(260, seconds, "Share of the object that each node has, over time")
    bottom = picture.top + picture.height
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - share * picture.height
        picture.add(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        picture.text(LEFT - 10, y + 4, f"{share:.0%}", "", "end")
    for one, kind in reversed(lines):
        for node in one.nodes:
            if node.curve:
                picture.add(_line(picture, node, one.size, kind))
    if run.least is not None:
        picture.marker(run.least, f"bound {duration(run.least)}")
    return picture.svg()


def _line(picture: Picture, node: NodeRun, size: int, kind: str) -> str:
    bottom = picture.top + picture.height
    points = [(node.began, 0.0), *((at, sum(parts) / size) for at, *parts in node.curve)]
    path = " ".join(f"{picture.x(at):.1f},{bottom - share * picture.height:.1f}" for at, share in points)
    return f'<polyline points="{path}" class="line {kind}"><title>{escape(_about(node))}</title></polyline>'


def lanes(run: Run) -> str:
    """A lane for each node: what it had over time, by source."""
    nodes = drawn([node for node in run.nodes if node.curve])
    lane = 40 if len(nodes) <= 10 else 26
    picture = Picture(lane * len(nodes), _end(run), "What each node had over time, by source")
    for number, node in enumerate(nodes):
        low = picture.top + (number + 1) * lane - 4
        picture.text(LEFT - 10, low - lane / 2 + 8, name(node), "strong", "end")
        for part in _areas(picture, node, run.size, low, lane - 8):
            picture.add(part)
        picture.add(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{low:.1f}" y2="{low:.1f}" class="floor"/>')
        picture.text(WIDTH - RIGHT + 10, low - lane / 2 + 8, _took(node))
    if run.least is not None:
        picture.marker(run.least, f"bound {duration(run.least)}")
    return picture.svg()


def _areas(picture: Picture, node: NodeRun, size: int, low: float, height: float) -> list[str]:
    """Origin at the bottom, then peers, then what was here."""
    layers = (("origin", 3, ()), ("peers", 2, (3,)), ("local", 1, (2, 3)))
    areas = []
    for kind, own, below in layers:
        if not node.curve[-1][own]:
            continue

        def y(point: Point, columns: tuple[int, ...]) -> float:
            return low - height * sum(point[column] for column in columns) / size

        over = [f"{picture.x(point[0]):.1f},{y(point, (own, *below)):.1f}" for point in node.curve]
        under = [f"{picture.x(point[0]):.1f},{y(point, below):.1f}" for point in reversed(node.curve)]
        about = f"{node.name}: {node.curve[-1][own] / size:.0%} from {kind}"
        areas.append(f'<polygon points="{" ".join(over + under)}" class="{kind}"><title>{about}</title></polygon>')
    return areas


_ROWS = (("resolve", "plan", "link", "device"), ("origin", "local"), ("peers",), ("hash", "write"))
_THIN = 9


def waterfalls(run: Run) -> str:
    """Four rows a node: steps in turn; the origin's chunks; peers' chunks; hashing and writing."""
    nodes = drawn([node for node in run.nodes if node.report is not None and node.waterfall()])
    lane = len(_ROWS) * _THIN + 12
    seconds = max((node.seconds or 0.0 for node in nodes), default=1.0)
    picture = Picture(lane * len(nodes), seconds, "Each node's stages, from its own start")
    for number, node in enumerate(nodes):
        high = picture.top + number * lane + 6
        picture.text(LEFT - 10, high + lane / 2 - 2, name(node), "strong", "end")
        found = {kind: (spans, spent) for kind, spans, spent in node.waterfall()}
        for row, kinds in enumerate(_ROWS):
            for bars, about in _row(found, kinds):
                for kind, begin, end in bars:
                    picture.bar(kind, begin, end, high + row * _THIN, _THIN - 1, f"{node.name}: {about}")
        picture.text(WIDTH - RIGHT + 10, high + lane / 2 - 2, _took(node))
        low = high + lane - 6
        picture.add(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{low:.1f}" y2="{low:.1f}" class="floor"/>')
    return picture.svg()


def _row(found: dict[str, tuple[list[tuple[float, float]], float]], kinds: Sequence[str]) -> list[tuple[Bars, str]]:
    """The bars of some stages. What hashed and wrote is put end to end: both go on all the time, a little at a time."""
    rows: list[tuple[Bars, str]] = []
    shift = 0.0
    for kind in kinds:
        spans, spent = found.get(kind, ([], 0.0))
        rows.append(([(kind, begin + shift, end + shift) for begin, end in spans], f"{kind} {duration(spent)}"))
        shift = spent if kind == "hash" else shift
    return rows


def gaps(run: Run) -> str:
    """Above the bound: where each node's seconds went."""
    assert run.least is not None
    nodes = drawn([node for node in run.nodes if node.report and node.seconds is not None and node.least is not None])
    lane = 24
    seconds = max((node.seconds or 0.0 for node in nodes), default=1.0)
    picture = Picture(lane * len(nodes), max(seconds, run.least), "The bound, and what each node took above it")
    for number, node in enumerate(nodes):
        high = picture.top + number * lane + 4
        picture.text(LEFT - 10, high + 12, name(node), "strong", "end")
        least = node.least or run.least
        gap = node.gap()
        at = least + min(0.0, gap["moving"])  # faster than the bound of the others: it is not this node's
        picture.bar("bound", 0, at, high, lane - 8, f"{node.name}: bound {duration(least)}")
        for kind in GAP_STAGES:
            if gap[kind] > 0:
                picture.bar(kind, at, at + gap[kind], high, lane - 8, f"{node.name}: {kind} {duration(gap[kind])}")
                at += gap[kind]
        picture.text(WIDTH - RIGHT + 10, high + 12, f"{(node.seconds or 0.0) / least:.2f} x")
    picture.marker(run.least, f"bound {duration(run.least)}")
    return picture.svg()


def drawn(nodes: list[NodeRun]) -> list[NodeRun]:
    """The nodes that there is room for: the slowest ones, in their order."""
    if len(nodes) <= MOST:
        return nodes
    slow = sorted(nodes, key=lambda node: -(node.seconds or float("inf")))[:MOST]
    return [node for node in nodes if any(node is one for one in slow)]


def name(node: NodeRun) -> str:
    """What fits beside a bar: the end of a long name."""
    shown = node.name if len(node.name) <= _NAME else "…" + node.name[1 - _NAME :]
    return shown


def _took(node: NodeRun) -> str:
    return duration(node.seconds) if node.seconds is not None else ("killed" if node.killed else "failed")


def _about(node: NodeRun) -> str:
    return f"{node.name}: {_took(node)}" + (f" ({node.what})" if node.what else "")


def _end(run: Run) -> float:
    ends = [node.ended or (node.curve[-1][0] if node.curve else 0.0) for node in run.nodes]
    return max([*ends, run.least or 0.0, 0.01])
