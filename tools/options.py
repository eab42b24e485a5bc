"""Options that are settings: made from ``config.settings()``, so that each is named and documented in one place.

A command takes ``config`` and ``as_json`` and nothing more of this: ``command`` adds --config, --log-level, --json and
an option for each setting that matters, reads them, and sets logging up.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from weightcache import log
from weightcache.config import Setting, load_config, settings

# Options are given once a value, so those of lists have a name in the singular.
_SPELLINGS = {"peers": "--peer", "origin.file_roots": "--file-root"}
_METAVARS = {
    "store": "DIR",
    "socket": "PATH",
    "listen": "HOST:PORT",
    "advertise": "HOST",
    "peers": "HOST:PORT",
    "discover": "HOW",
    "cluster_key_file": "FILE",
    "datacenter": "NAME",
    "prefer": "PLACE",
    "capacity": "SIZE",
    "peer_streams": "N",
    "peer_bandwidth": "SIZE",
    "serve_bandwidth": "SIZE",
    "dirty_budget": "SIZE",
    "fresh": "SECONDS",
    "metrics": "HOST:PORT",
    "origin.allow": "PREFIX",
    "origin.file_roots": "DIR",
    "origin.streams": "N",
    "origin.bandwidth": "SIZE",
    "origin.manifests": "BOOL",
    "origin.attempts": "N",
    "origin.timeout": "SECONDS",
}
_HERE = ("store", "socket")  # what tells a command which daemon or store is meant

Command = Callable[..., None]


def spelling(setting: Setting) -> str:
    """How a setting is written on the command line."""
    return _SPELLINGS.get(setting.key, "--" + setting.key.replace(".", "-").replace("_", "-"))


def parse_size(text: str) -> int:
    """Bytes, written as the setting ``capacity`` is. For an option's ``parser``."""
    read = next(setting.read for setting in settings() if setting.key == "capacity")
    try:
        return int(read(text))
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None


def command(app: typer.Typer, name: str, *, daemon: bool = False, rest: bool = False) -> Callable[[Command], Command]:
    """Register a function as a command. ``daemon``: it takes every setting, and logs what goes on.

    ``rest``: its arguments are a command of their own, with options of their own.
    """
    offered = [setting for setting in settings() if daemon or setting.key in _HERE]
    keys = {setting.key.replace(".", "_"): setting.key for setting in offered}
    common = [_config_file(), *(_setting(setting) for setting in offered), _log_level("info" if daemon else "warning")]

    def register(function: Command) -> Command:
        @functools.wraps(function)
        def run(config_file: str | None, log_level: str, **given: Any) -> None:
            log.configure(log_level, as_json=None if daemon else False)
            # An option that may be repeated is an empty list when it was not given at all; empty text is a value.
            overrides = {key: None if (value := given.pop(name)) == [] else value for name, key in keys.items()}
            if rest and config_file is not None:
                os.environ["WEIGHTCACHE_CONFIG"] = os.path.abspath(config_file)  # of the program that is run, too
            function(config=load_config(overrides, config_file), **given)

        own = [parameter for parameter in _signature(function) if parameter.name not in ("config", "as_json")]
        parameters = [*own, _json(), *common]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, context_settings={"allow_interspersed_args": not rest})(run)
        return function

    return register


def _signature(function: Command) -> list[inspect.Parameter]:
    found = inspect.signature(function, eval_str=True).parameters.values()
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in found]


def _option(name: str, kind: Any, default: object, *spellings: str, **about: Any) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(*spellings, **about)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _setting(setting: Setting) -> inspect.Parameter:
    many = isinstance(setting.default, tuple)
    doc = setting.doc + ("; may be repeated" if many else "")
    if setting.default not in (None, ()):
        default = ", ".join(setting.default) if isinstance(setting.default, tuple) else setting.default
        doc += f" [default: {default}]"
    return _option(
        setting.key.replace(".", "_"),
        list[str] | None if many else str | None,
        None,
        spelling(setting),
        help=doc,
        metavar=_METAVARS.get(setting.key, "VALUE"),
        show_default=False,
    )


def _config_file() -> inspect.Parameter:
    doc = "TOML file with settings [default: ~/.config/weightcache/config.toml, if there is one]"
    return _option("config_file", str | None, None, "--config", help=doc, metavar="FILE", show_default=False)


def _log_level(default: str) -> inspect.Parameter:
    doc = f"{', '.join(log.LEVELS)} [default: {default}]"
    return _option("log_level", str, default, "--log-level", help=doc, metavar="LEVEL", show_default=False)


def _json() -> inspect.Parameter:
    return _option("as_json", bool, False, "--json", help="print JSON, for programs", show_default=False)
