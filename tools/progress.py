"""What moves in a terminal while one waits: on stderr, and only if that is a terminal. rich is imported only then."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from weightcache.tools.show import already, human, plain

if TYPE_CHECKING:
    from rich.progress import Progress

Json = dict[str, Any]
MAX_NAME = 28  # characters of a source beside its bar

Listener = Callable[[Json], None]


@contextlib.contextmanager
def pulling() -> Iterator[Callable[[str], Listener]]:
    """A bar a source: ``pulling()(source)`` gives what is to hear of the load's events."""
    if not sys.stderr.isatty():
        yield lambda source: _deaf
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(16),
        TextColumn("{task.fields[files]}", markup=False),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[sources]}", markup=False),
    )
    with live(*columns) as progress:
        yield lambda source: _Bar(progress, source)


@contextlib.contextmanager
def publishing(source: str) -> Iterator[Listener]:
    """A bar over the bytes that have to be here, then over the manifests."""
    if not sys.stderr.isatty():
        yield _deaf
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(16),
        DownloadColumn(),
        TextColumn("{task.fields[state]}", markup=False),
    )
    with live(*columns) as progress:
        task = progress.add_task(_tail(plain(source)), total=None, state="asking")
        files = done = 0

        def hear(event: Json) -> None:
            nonlocal files, done
            match event["event"]:
                case "publishing" | "progress":
                    files = event.get("files", files)
                    state = "reading" if event["done"] < event["total"] else ""
                    progress.update(task, total=event["total"], completed=event["done"], state=state)
                case "file":
                    done += 1
                    progress.update(task, completed=progress.tasks[0].total, state=f"{done}/{files} manifests")

        yield hear


@contextlib.contextmanager
def verifying() -> Iterator[Listener]:
    """One bar over the blobs that are read again."""
    if not sys.stderr.isatty():
        yield _deaf
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    with live(TextColumn("reading"), BarColumn(None), MofNCompleteColumn(), TextColumn("blobs")) as progress:
        task = progress.add_task("", total=None)

        def hear(event: Json) -> None:
            if event["event"] == "verifying":
                progress.update(task, total=event["blobs"])
            elif event["event"] == "blob":
                progress.advance(task)

        yield hear


def _deaf(event: Json) -> None:
    """Nobody looks."""


@contextlib.contextmanager
def live(*columns: Any) -> Iterator[Progress]:
    """Bars of such columns on stderr, gone when the block ends."""
    from rich.console import Console
    from rich.progress import Progress

    real = sys.stderr
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        # Bars are drawn below what is logged meanwhile, which goes where rich has put stderr.
        handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
        for handler in handlers:
            handler.setStream(sys.stderr)
        try:
            yield progress
        finally:
            for handler in handlers:
                handler.setStream(real)


class _Bar:
    """One source's bar."""

    def __init__(self, progress: Progress, source: str) -> None:
        self._progress = progress
        self._task = progress.add_task(_tail(plain(source)), total=None, files="", sources="asking")
        self._sizes: list[int] = []
        self._had: list[int] = []

    def __call__(self, event: Json) -> None:
        match event["event"]:
            case "snapshot":
                self._sizes = [file["size"] for file in event["files"]]
                self._had = [sum(end - begin for begin, end in file["had"]) for file in event["files"]]
                total = sum(self._sizes)
                known = already(event["here"], event["nearby"], total)
                self._progress.update(self._task, total=total, sources=known)
            case "had":
                self._had[event["file"]] += sum(end - begin for begin, end in event["ranges"])
            case "progress":
                self._progress.update(self._task, sources=_sources(event["bytes_by_source"]))
        whole = sum(had >= size for had, size in zip(self._had, self._sizes, strict=True))
        files = f"{whole}/{len(self._sizes)} files" if len(self._sizes) > 1 else ""
        self._progress.update(self._task, completed=sum(self._had), files=files)


def _tail(name: str) -> str:
    """The end of a long name, which tells it from its neighbours."""
    return name if len(name) <= MAX_NAME else "…" + name[1 - MAX_NAME :]


def _sources(by: Json) -> str:
    peers = by["peer"]
    parts = [(f"{len(peers)} peer{'s' * (len(peers) > 1)}", sum(peers.values())), ("origin", by["origin"])]
    return ", ".join(f"{name} {human(size)}" for name, size in [("disk", by["local"]), *parts] if size)
