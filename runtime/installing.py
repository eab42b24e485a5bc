"""``install``: safetensors, diffusers, transformers and peft take sources, without a change to whoever calls them.

Theory of operation. Only names are replaced, and only by what passes everything but a source on to the original (see
``patches``). Libraries that are imported already are patched at once, wherever they bound a name; those that come later
are patched as their modules are executed, by a finder at the head of ``sys.meta_path``. So nothing is imported for it,
a library that is missing is never missed, and ``uninstall`` can put back the very objects it found.

In child processes: a fork has what its parent has. Any other Python that inherits the environment finds
WEIGHTCACHE_INSTALL and, at the head of PYTHONPATH, the directory ``startup``, whose ``sitecustomize`` installs there,
too, and then makes room for the one it hides. A Python that ignores the environment (-E, -I) or has no site (-S) does
not; it may call ``install`` itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from weightcache.runtime.patches import LIBRARIES, Patches

VARIABLE = "WEIGHTCACHE_INSTALL"  # "1", or "hub": ids of a hub go through the cache, too
STARTUP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "startup")

_lock = threading.RLock()
_patches: Patches | None = None  # what is in force
_explicit: bool | None = None  # install()'s ``hub``; None: not installed that way
_blocks: list[bool] = []  # those of the ``installed`` blocks under way
_watcher: _Watcher | None = None
_environment: dict[str, str | None] | None = None  # as it was before


def install(*, hub: bool = False) -> None:
    """Let safetensors, and what diffusers, transformers and peft load by a name, take sources.

    From then on ``safetensors.safe_open`` (and so ``load_file`` and ``load_model``), under whatever name a module has
    bound it, and the ``from_pretrained``, ``from_single_file``, ``load_config``, ``load_lora_weights``,
    ``load_textual_inversion`` and ``load_ip_adapter`` of those libraries, imported yet or not, take ``s3://``,
    ``gs://``, ``hf://`` ... Local paths and ids of the hub mean what they meant, except with ``hub``: then an id such
    as "org/name" that is no local path is ``hf://org/name``. Child processes get the same. A library of a version
    that is not known is left alone, with a warning. Installing twice is installing once, with the last ``hub``.
    Thread-safe.
    """
    global _explicit
    with _lock:
        _explicit = hub
        _apply()


def uninstall() -> None:
    """Undo ``install``: every name is bound to the object it was bound to before. Inside an ``installed`` block: then.

    What somebody else has put over ours is left to him; what took our object elsewhere keeps one that passes on.
    """
    global _explicit
    with _lock:
        _explicit = None
        _apply()


@contextlib.contextmanager
def installed(*, hub: bool = False) -> Iterator[None]:
    """``install`` for as long as the block runs. Blocks may nest, and overlap in other threads: the last one undoes it.

    It is the whole process that is changed, not only this thread.
    """
    with _lock:
        _blocks.append(hub)
        _apply()
    try:
        yield
    finally:
        with _lock:
            _blocks.remove(hub)
            _apply()


def install_as_told() -> None:
    """What the environment variable WEIGHTCACHE_INSTALL says, if anything."""
    told = os.environ.get(VARIABLE, "")
    if told not in ("", "0"):
        install(hub=told == "hub")


def environment(*, hub: bool) -> dict[str, str]:
    """The variables with which a Python that starts is one in which ``install`` was called."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    rest = [entry for entry in entries if entry and entry != STARTUP]
    return {VARIABLE: "hub" if hub else "1", "PYTHONPATH": os.pathsep.join([STARTUP, *rest])}


def _forked() -> None:
    """In a child, nobody holds what another thread of the parent held."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_forked)


# -- below here, under the lock


def _apply() -> None:
    """Bring what is in force in line with what is asked for."""
    global _patches, _watcher
    asked = [*_blocks, *([] if _explicit is None else [_explicit])]
    if asked:
        if _patches is None:
            _patches = Patches()
            _watcher = _Watcher()
            sys.meta_path.insert(0, _watcher)  # first, so that no module slips between it and the scan
            _patches.scan()
        _patches.hub = any(asked)
        _set_environment(environment(hub=any(asked)))
    elif _patches is not None:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(_watcher)  # type: ignore[arg-type]
        _patches.undo()
        _patches = _watcher = None
        _reset_environment()


def _set_environment(values: dict[str, str]) -> None:
    global _environment
    if _environment is None:
        _environment = {name: os.environ.get(name) for name in values}
    os.environ.update(values)


def _reset_environment() -> None:
    """As it was; of a PYTHONPATH that somebody changed meanwhile, only our entry goes."""
    global _environment
    before, _environment = _environment or {}, None
    now = os.environ.get("PYTHONPATH")
    rest = [entry for entry in (now or "").split(os.pathsep) if entry != STARTUP]
    was = before.get("PYTHONPATH")
    if rest != [entry for entry in (was or "").split(os.pathsep) if entry and entry != STARTUP]:
        before["PYTHONPATH"] = os.pathsep.join(rest)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class _Watcher:
    """A finder that finds nothing itself, and has modules of the libraries patched right after they have been run."""

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in LIBRARIES or getattr(self._asking, "name", None) == name:
            return None
        self._asking.name = name  # another finder of this kind may ask all others in turn, and so us
        try:
            spec = self._ask(name, path, target)
        finally:
            self._asking.name = None
        loader: Any = spec.loader if spec is not None else None
        run = getattr(loader, "exec_module", None)
        if run is None:
            return spec

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the loader is as it was again
            run(module)
            with _lock:
                if _patches is not None:
                    _patches.patch(name)

        with contextlib.suppress(AttributeError):  # a loader with no room for it: the next scan finds its module
            loader.exec_module = exec_module
        return spec

    def _ask(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is not self and (find := getattr(finder, "find_spec", None)) is not None:
                spec: ModuleSpec | None = find(name, path, target)
                if spec is not None:
                    return spec
        return None
