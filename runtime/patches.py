"""What is put in the place of the libraries' own names, and what it does with a source.

``safetensors.safe_open`` becomes a class that opens sources by ours and everything else by theirs; ``load_file`` and
``load_model`` of safetensors call it by that name, so they need no patch of their own. Methods that load by a name
(``from_pretrained`` and its kin) first bring a source here, and are then called with its real path, on which they
do what they always do; it is leased until they return.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from weightcache.core.source import SCHEMES

# Libraries, each with the versions [from, below) whose methods are known here.
LIBRARIES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "safetensors": ((0, 4), (1,)),
    "transformers": ((4, 40), (6,)),
    "diffusers": ((0, 30), (1,)),
    "peft": ((0, 10), (1,)),
}
METHODS = (
    "from_pretrained",
    "from_single_file",
    "load_config",
    "load_lora_weights",
    "lora_state_dict",
    "load_textual_inversion",
    "load_ip_adapter",
)
# What their parameter for a path or an id is called.
PARAMETERS = {
    *("model_id", "path", "retriever_name_or_path"),
    *("pretrained_model_name", "pretrained_model_path", "pretrained_model_or_path", "pretrained_model_name_or_path"),
    *("pretrained_model_name_or_path_or_dict",),
    *("pretrained_model_link_or_path", "pretrained_model_link_or_path_or_dict"),
}
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_remote(value: object) -> bool:
    """Whether a name is a source, and not a path that merely holds "://"."""
    scheme, separator, _ = value.partition("://") if isinstance(value, str) else ("", "", "")
    return bool(separator) and scheme.lower() in SCHEMES


class Patches:
    """Everything that is replaced in this process. Not for several threads at once.

    ``hub``: ids of the hub go through the cache, too. ``active``: False once it is undone: a library may have copied
    what it found in the place of its own (transformers makes each AutoModel's method of another's code).
    """

    def __init__(self) -> None:
        self.hub = False
        self.active = True
        self._methods: dict[tuple[type, str], tuple[Any, Any]] = {}  # what was there, and what is there now
        self._opener: tuple[Any, Any] | None = None
        self._refused: dict[str, bool] = {}

    def scan(self) -> None:
        """Patch all of the libraries that has been imported, and whoever bound names of theirs."""
        for name in list(sys.modules):
            if name.partition(".")[0] in LIBRARIES:
                self.patch(name)
        if self._opener is not None:
            _rebind(list(sys.modules.values()), *self._opener)

    def patch(self, name: str) -> None:
        """Patch a module of one of the libraries, if it is there."""
        module = sys.modules.get(name)
        library = name.partition(".")[0]
        if not isinstance(module, ModuleType) or self._is_refused(library):
            return
        if library == "safetensors":
            self._patch_opener(module)
        elif ".dummy_" not in name:  # stand-ins for what is not installed
            for found in list(vars(module).values()):
                if isinstance(found, type) and found.__module__ == name:
                    self._patch_methods(found)

    def undo(self) -> None:
        """Put everything back."""
        self.active = False
        for (owner, name), (before, now) in self._methods.items():
            if vars(owner).get(name) is now:
                setattr(owner, name, before)
        self._methods.clear()
        if self._opener is not None:
            theirs, now = self._opener
            _rebind(list(sys.modules.values()), now, theirs)
            self._opener = None

    def _is_refused(self, library: str) -> bool:
        if library not in self._refused:
            version = _version(library)
            low, high = LIBRARIES[library]
            known = version is not None and low <= version < high
            self._refused[library] = not known
            if not known:
                shown = ".".join(map(str, version)) if version else "unknown"
                said = f"weightcache does not know version {shown} of {library}, and leaves it as it is"
                warnings.warn(said, RuntimeWarning, stacklevel=2)
        return self._refused[library]

    def _patch_opener(self, module: ModuleType) -> None:
        theirs = vars(module).get("safe_open")
        if self._opener is None:
            if module.__name__ != "safetensors" or not isinstance(theirs, type):
                return
            self._opener = theirs, _opener(theirs, self)
        _rebind([module], *self._opener)

    def _patch_methods(self, owner: type) -> None:
        for name in METHODS:
            raw = vars(owner).get(name)
            function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
            if (owner, name) in self._methods or not inspect.isfunction(function):
                continue
            if (where := _parameter(function, bound=not isinstance(raw, staticmethod))) is None:
                continue
            wrapper: Any = self._wrap(function, *where)
            if isinstance(raw, classmethod | staticmethod):
                wrapper = type(raw)(wrapper)
            setattr(owner, name, wrapper)
            self._methods[owner, name] = raw, wrapper

    def _wrap(self, function: Callable[..., Any], parameter: str, at: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            value = kwargs.get(parameter, args[at] if len(args) > at else None)
            values: list[Any] = value if isinstance(value, list) else [value]
            if not self.active or not any(map(self._is_ours, values)):
                return function(*args, **kwargs)
            from weightcache.runtime.directories import bring  # only who has a source pays for it

            with ExitStack() as held:
                owner = args[0] if args and isinstance(args[0], type) else type(args[0]) if args else None
                found = [
                    held.enter_context(bring(each, function, owner, kwargs)) if self._is_ours(each) else each
                    for each in values
                ]
                given = found if isinstance(value, list) else found[0]
                if parameter in kwargs:
                    kwargs[parameter] = given
                else:
                    args = (*args[:at], given, *args[at + 1 :])
                return function(*args, **kwargs)

        return call

    def _is_ours(self, value: object) -> bool:
        if is_remote(value):
            # A page of a hub is a name that the libraries know, too.
            return not str(value).lower().startswith(("https://huggingface.co/", "https://hf.co/"))
        is_id = self.hub and isinstance(value, str) and _ID.fullmatch(value)
        return bool(is_id) and not os.path.exists(str(value))


def _opener(theirs: Any, patches: Patches) -> type:
    """The class in the place of ``safetensors.safe_open``."""

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            from weightcache.runtime.loader import safe_open as ours

            return isinstance(instance, (theirs, ours))

    class safe_open(metaclass=Meta):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            if patches.active and is_remote(kwargs.get("filename", args[0] if args else None)):
                from weightcache.runtime.loader import safe_open as ours

                return ours(*args, **kwargs)
            return theirs(*args, **kwargs)

    safe_open.__doc__ = theirs.__doc__
    safe_open.__qualname__ = theirs.__qualname__
    return safe_open


def _rebind(modules: Sequence[ModuleType], old: Any, new: Any) -> None:
    """Wherever one of the modules has a name for ``old``, let it mean ``new``. The extension module keeps its own."""
    for module in modules:
        name = getattr(module, "__name__", "")
        if not isinstance(module, ModuleType) or name.startswith(("weightcache.", "safetensors._")):
            continue
        for name in [name for name, value in list(vars(module).items()) if value is old]:
            setattr(module, name, new)


def _parameter(function: Callable[..., Any], *, bound: bool) -> tuple[str, int] | None:
    """Name and position of what a method takes a path or an id by; None if it does not say.

    The first argument is the owner, whether the signature shows it or not: that of a copy of a bound method does not.
    """
    names = [name for name in inspect.signature(function).parameters if not bound or name not in ("cls", "self")]
    return next(((name, at + bound) for at, name in enumerate(names) if name in PARAMETERS), None)


def _version(library: str) -> tuple[int, ...] | None:
    from importlib import metadata

    try:
        found = re.match(r"\d+(?:\.\d+)*", metadata.version(library))
    except metadata.PackageNotFoundError:
        return None
    return tuple(map(int, found[0].split("."))) if found else None
