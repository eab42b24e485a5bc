"""Waits of a main thread that Ctrl-C ends.

Python runs a signal's handler between two of its own steps. So a wait must not be made of Python's steps that take a
lock (those of Condition, Event and Future: interrupted between having it and owing its release, they keep it), and
must not be for ever: a signal that comes just before the thread goes to sleep is only seen when it wakes.
"""

from __future__ import annotations

import queue
from typing import TypeVar

SECONDS = 1.0  # of a sleep

T = TypeVar("T")


def take(channel: queue.SimpleQueue[T]) -> T:
    """What ``channel`` has next, once it has something."""
    while True:
        try:
            return channel.get(timeout=SECONDS)
        except queue.Empty:
            continue
