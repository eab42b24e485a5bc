"""How a cold start looks in a terminal: bars while it runs, tables when it is over."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from weightcache.tools.coldstart_measures import STAGES, Curve, NodeRun, Run, middle, summary
from weightcache.tools.coldstart_run import Result, Watcher
from weightcache.tools.coldstart_settings import Role, rate_text
from weightcache.tools.show import columns, duration, human, percent, plain

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Json = dict[str, Any]


class Quiet:
    """Nobody looks on."""

    def begin(self, title: str, roles: Sequence[Role], size: int) -> None: ...

    def moved(self, name: str, curve: Curve) -> None: ...

    def ended(self, node: NodeRun) -> None: ...

    def say(self, text: str) -> None: ...


class Bars:
    """A bar a node, below a line that says what goes on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._line = progress.add_task("", total=None, said=None)
        self._tasks: dict[str, TaskID] = {}

    def say(self, text: str) -> None:
        self._progress.update(self._line, description=text, visible=True)

    def begin(self, title: str, roles: Sequence[Role], size: int) -> None:
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self.say(title)
        self._tasks = {
            role.name: self._progress.add_task(
                f"  {role.name}", total=size or None, said=role.what, completed=size if role.kind != "cold" else 0
            )
            for role in roles
        }

    def moved(self, name: str, curve: Curve) -> None:
        _, local, peers, origin = curve.told
        parts = [("disk", local), ("peers", peers), ("origin", origin)]
        said = ", ".join(f"{source} {human(size)}" for source, size in parts if size)
        self._progress.update(self._tasks[name], completed=curve.had, said=said)

    def ended(self, node: NodeRun) -> None:
        said = f"failed: {plain(node.error)}" if node.error else f"done in {duration(node.seconds or 0.0)}"
        self._progress.update(self._tasks[node.name], said=said)


@contextlib.contextmanager
def watching() -> Iterator[Watcher]:
    """Bars on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield Quiet()
        return
    from rich.console import RenderableType
    from rich.progress import BarColumn, DownloadColumn, ProgressColumn, Task, TextColumn
    from rich.text import Text

    from weightcache.tools.progress import live

    class OfNodes(ProgressColumn):
        """A column that the line above the bars does not have."""

        def __init__(self, column: ProgressColumn) -> None:
            super().__init__()
            self._column = column

        def render(self, task: Task) -> RenderableType:
            return self._column(task) if task.fields["said"] is not None else Text()

    columns = (BarColumn(24), DownloadColumn(), TextColumn("{task.fields[said]}", markup=False))
    with live(TextColumn("{task.description}", markup=False), *map(OfNodes, columns)) as progress:
        yield Bars(progress)


# -- when it is over


def final(result: Result) -> str:
    """The headline, the nodes of the middle round, and what a reader must know."""
    run = middle(result.runs)
    parts = [headline(result), nodes(run)]
    waterfalls = stages(run)
    parts += [waterfalls] if waterfalls else []
    parts += [f"note: {note}" for note in result.notes]
    parts += [f"FAILED {plain(failure)}" for failure in result.failures]
    return "\n\n".join(parts)


def headline(result: Result) -> str:
    head = summary(result.runs, result.alone)
    settings = result.settings
    said = [f"{plain(result.source)}, {human(result.size)}, on {len(result.runs[0].nodes)} nodes"]
    where = "network namespaces" if result.namespaces else "loopback" if result.files else "a fleet that is there"
    if settings.link is not None or settings.origin_link is not None:
        said.append(f"links {rate_text(settings.link)}, origin {rate_text(settings.origin_link)}, {where}")
    else:
        said.append(where)
    lines = ["; ".join(said)]
    if head["seconds"] is not None:
        line = f"last node after {duration(head['seconds'])}"
        if head["distance"] is not None:
            line += f", {head['distance']:.2f} x the bound of {duration(head['bound'])}"
        lines.append(line)
    if head["egress_multiple"] is not None:
        lines.append(f"origin sent {head['egress_multiple']:.3f} x the object's size")
    if head["speed_up"] is not None:
        times = head["without_peers_egress_multiple"]
        lines.append(
            f"{head['speed_up']:.2f} x as fast as without peers ({duration(head['without_peers'])}"
            + (f", origin {times:.2f} x)" if times is not None else ")")
        )
    if head["rounds"] > 1:
        lines.append(f"medians of {head['rounds']} rounds; the tables are of the middle one")
    return "\n".join(lines)


def nodes(run: Run) -> str:
    rows = []
    for node in run.nodes:
        by, share = node.bytes_by_source(), node.line_share()
        took = duration(node.seconds) if node.seconds is not None else "-"
        rows.append(
            (
                node.name, took, *(human(by[name]) if by[name] else "-" for name in ("local", "peers", "origin")),
                human(node.sent) if node.sent else "-", percent(share, 1) if share is not None else "-",
                f"{node.seconds / node.least:.2f}" if node.seconds is not None and node.least else "-",
                "; ".join(filter(None, (node.what, node.error))),
            )
        )  # fmt: skip
    head = ("NODE", "TIME", "DISK", "PEERS", "ORIGIN", "SENT", "OF LINE", "x BOUND", "")
    return columns(head, rows, "TIME,DISK,PEERS,ORIGIN,SENT,OF LINE,x BOUND")


def stages(run: Run) -> str:
    """Seconds at work by stage; from origin and peers: while chunks were coming."""
    rows = []
    for node in run.nodes:
        spent = {name: seconds for name, _, seconds in node.waterfall()}
        if spent:
            rows.append((node.name, *(duration(spent[name]) if name in spent else "-" for name in STAGES)))
    head = ("STAGE", *(name.upper() for name in STAGES))
    return columns(head, rows, ",".join(head[1:])) if rows else ""
