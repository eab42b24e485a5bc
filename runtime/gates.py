"""A module whose weights are still arriving: whoever uses it waits for them, and only then.

While it waits the module is of a subclass of its class, and has nothing added to it: no hook, no attribute. Every use
goes through the subclass' ``__getattribute__``. What pipelines ask before they use a module (its config, dtype and
device; names with an underscore, but for the weights themselves) is answered at once; anything else, be it ``forward``,
``encode``, ``to``, ``parameters`` or a child module, waits for all of the module's weights. Once they are there the
module gets its class back, so that torch.compile and graphs see a plain one.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from weightcache.errors import LoadFailed, WeightcacheError

_AT_ONCE = {"config", "training", "name_or_path"}
_WEIGHTS = {"_parameters", "_buffers", "_modules", "__reduce_ex__", "__reduce__", "__deepcopy__", "__getstate__"}


class Gate:
    """Shut until ``open`` or ``fail``, which is for good. Thread-safe."""

    def __init__(self) -> None:
        self._passed = threading.Event()
        self._error: BaseException | None = None
        self._pid = os.getpid()

    @property
    def shut(self) -> bool:
        return not self._passed.is_set()

    def open(self) -> None:
        self._passed.set()

    def fail(self, error: BaseException) -> None:
        """Whoever waits, and whoever comes later, gets ``error``. The first call counts."""
        if self.shut:
            self._error = error
            self._passed.set()

    def wait(self) -> None:
        """Return once it is open; raise what it failed with."""
        if self.shut and os.getpid() != self._pid:  # nobody would ever open it here
            raise LoadFailed("forked while weights were arriving: only the parent has them; wait(pipe) before the fork")
        self._passed.wait()
        if isinstance(self._error, WeightcacheError):
            raise type(self._error)(*self._error.args)  # of its own: several threads may raise it at once
        if self._error is not None:
            raise self._error


def guard(module: torch.nn.Module, gate: Gate) -> None:
    """Have whoever uses ``module`` wait at ``gate``, until ``release``."""
    plain = type(module)
    known = {name: getattr(module, name) for name in ("dtype", "device") if hasattr(module, name)}

    def ask(self: torch.nn.Module, name: str) -> Any:
        if name in known:
            return known[name]
        if name in _WEIGHTS or not (name.startswith("_") or name in _AT_ONCE):
            gate.wait()
        return plain.__getattribute__(self, name)

    names = {"__getattribute__": ask, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    waiting = type.__new__(type(plain), plain.__name__, (plain,), {**names, "__doc__": plain.__doc__, "_plain": plain})
    object.__setattr__(module, "__class__", waiting)


def release(module: torch.nn.Module) -> None:
    """Make a guarded module plain again. To be called before its gate is opened."""
    plain = type(module).__dict__.get("_plain")
    if plain is not None:
        object.__setattr__(module, "__class__", plain)
