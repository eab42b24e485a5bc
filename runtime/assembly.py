"""A snapshot as a directory that libraries can read, though most of it is still arriving."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from weightcache.openfile import OpenFile, OpenSnapshot

# What holds weights; anything else is read by whoever puts a pipeline together.
_HEAVY = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".pb", ".h5", ".gguf", ".flashpack"}


def is_heavy(name: str) -> bool:
    return PurePosixPath(name).suffix in _HEAVY


def await_files(files: Iterable[OpenFile]) -> None:
    """Return once all bytes of these files are had."""
    for file in files:
        file.wait(0, file.size)


@contextlib.contextmanager
def readable(snapshot: OpenSnapshot) -> Iterator[Path]:
    """A directory with all of the snapshot's files: its own, if that is complete, or one of links for the while.

    A file in it may be opened once its bytes are had.
    """
    real = Path(snapshot.directory)
    if all(_is(real / file.name, file.path) for file in snapshot.files):
        yield real
        return
    with tempfile.TemporaryDirectory(prefix="weightcache-") as folder:
        for file in snapshot.files:
            link = Path(folder) / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.path)
        yield Path(folder)


def _is(path: Path, file: str) -> bool:
    try:
        return os.path.samefile(path, file)
    except FileNotFoundError:
        return False


def rename(component: Any, read_from: Path, real: Path) -> None:
    """Where a component remembers the directory it was read from, have it remember the one that stays."""
    if read_from == real:
        return

    def better(value: Any) -> Any:
        is_there = isinstance(value, str) and value.startswith(str(read_from))
        return str(real) + value[len(str(read_from)) :] if is_there else value

    config: Any = getattr(component, "config", None)
    if hasattr(component, "register_to_config"):
        component.register_to_config(_name_or_path=better(config.get("_name_or_path")))
    for remembered in (component, config, getattr(component, "init_kwargs", None)):
        entries = remembered if type(remembered) is dict else getattr(remembered, "__dict__", {})
        for key, value in entries.items():
            if better(value) is not value:
                entries[key] = better(value)


@contextlib.contextmanager
def unquestioned() -> Iterator[None]:
    """Without the warning of diffusers that it does not know a module it is given: this one is what it would make."""
    log = logging.getLogger("diffusers.pipelines.pipeline_loading_utils")

    def known(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("You have passed a non-standard module")

    log.addFilter(known)
    try:
        yield
    finally:
        log.removeFilter(known)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles. It would go through all that lives in the process, hundreds of milliseconds with
    these libraries, because modules are many objects: next to none of which are garbage.
    """
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()
