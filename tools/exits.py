"""What a command exits with, and how it tells of a failure: a line on stderr or, with --json, an object on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback

from weightcache import errors
from weightcache.errors import WeightcacheError, to_wire
from weightcache.tools.show import plain

USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell says it
BROKEN_PIPE = 141
TERMINATED = 143


def codes() -> dict[int, list[type[WeightcacheError]]]:
    """The errors that end a command with each code, in the order of the codes."""
    found: dict[int, list[type[WeightcacheError]]] = {}
    for name in errors.__all__:
        kind: type[WeightcacheError] = getattr(errors, name)
        found.setdefault(kind.exit_code, []).append(kind)
    return dict(sorted(found.items()))


def summary() -> str:
    """The codes for ``--help``: one line each."""
    lines = [f"{code:>3}  {', '.join(kind.__name__ for kind in kinds)}" for code, kinds in codes().items()]
    return "\n".join(["  0  done", *lines, f"{INTERRUPTED:>3}  Ctrl-C"])


def tell(error: BaseException, *, as_json: bool, **facts: object) -> int:
    """Report a failure and return the code to exit with. ``facts`` go before it in the JSON object."""
    name, message = to_wire(error)
    if isinstance(error, OSError) and error.strerror:  # a full disk under what is printed, say: nothing is wrong inside
        message = f"{error.filename or 'input or output'}: {error.strerror}; --log-level debug shows where"
    elif not isinstance(error, WeightcacheError):
        message = f"internal error: {message}; --log-level debug shows where"
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        traceback.print_exception(error, file=sys.stderr)
    say(name, message, as_json=as_json, **facts)
    return error.exit_code if isinstance(error, WeightcacheError) else WeightcacheError.exit_code


def say(name: str, message: str, *, as_json: bool, **facts: object) -> None:
    """One failure, where the reader looks for it."""
    with contextlib.suppress(OSError):  # the way to the reader may be what failed
        if as_json:
            print(json.dumps({**facts, "error": name, "message": message}), flush=True)
        else:
            print(f"weightcache: error: {plain(message)}", file=sys.stderr, flush=True)
