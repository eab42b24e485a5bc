"""Standard streams that are closed, full, or read no more: each ends a command with a code, and without a traceback."""

from __future__ import annotations

import os
import sys

from weightcache.tools import exits


def reopen() -> None:
    """What is opened next must not get the number of a standard stream that whoever started us has closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def give_up() -> int:
    """Who read our output has seen enough. What is still buffered must not fail once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exits.BROKEN_PIPE


def settle() -> None:
    """What standard output has refused, and was told of, must not fail once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        give_up()
