"""What is remembered of a pipeline that was loaded here, for as long as the pipeline lives."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from weightcache.runtime.bringing import Bringing
from weightcache.runtime.report import LoadReport


@dataclass(slots=True)
class Held:
    """One tensor of a module: where it is, and which bytes of which file it has."""

    tensor: weakref.ref[torch.Tensor]
    dtype: torch.dtype  # in the file
    source: str
    path: str  # the file's real one: another version's is another one
    begin: int
    end: int


@dataclass(slots=True, weakref_slot=True)
class Loaded:
    """``held``: by component, then by the tensor's name in the file; what was loaded the fast way."""

    report: LoadReport
    bringing: Bringing | None = None
    held: dict[str, dict[str, Held]] = field(default_factory=dict)


_loaded: weakref.WeakKeyDictionary[Any, Loaded] = weakref.WeakKeyDictionary()


def remember(pipe: Any, loaded: Loaded) -> None:
    _loaded[pipe] = loaded


def recall(pipe: Any) -> Loaded | None:
    """None: it was not loaded here."""
    return _loaded.get(pipe)


def report_of(pipe: Any) -> LoadReport:
    """The report of the load that gave this pipeline; it is whole once ``wait(pipe)`` returns. KeyError: of none."""
    return _loaded[pipe].report


def wait(pipe: Any) -> None:
    """Return once all weights of a pipeline are there; raise what its load failed with."""
    loaded = _loaded.get(pipe)
    if loaded is not None and loaded.bringing is not None:
        loaded.bringing.wait()
