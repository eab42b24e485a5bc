"""The ring: a few pinned buffers through which any amount of bytes goes to a device.

A buffer that is given back is not free yet: the device may still be reading it. Who takes it next waits for the event
after the last copy out of it. That wait is all that keeps one tensor's bytes out of another's.
"""

from __future__ import annotations

import queue
from typing import Any

import torch

from weightcache.runtime.device import Event, Target


class Slot:
    """One buffer. ``passed``: the event after the last copy out of it."""

    __slots__ = ("memory", "passed", "view")

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.view: Any = memory.numpy()
        self.passed: Event | None = None


class Ring:
    """``count`` buffers of ``size`` bytes each, a power of two. Thread-safe."""

    def __init__(self, device: Target, count: int, size: int) -> None:
        if size <= 0 or size & (size - 1):
            raise ValueError(f"a buffer of {size} bytes: a power of two is expected")
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()  # oldest first: it is the likeliest to be free
        for _ in range(count):
            self._free.put(Slot(device.pinned(size)))

    def take(self) -> Slot:
        """A buffer that may be written to, once there is one. Raises what went wrong with the last copy out of it."""
        slot = self._free.get()
        try:
            if slot.passed is not None:
                slot.passed.synchronize()
                slot.passed = None
        except BaseException:
            self._free.put(slot)
            raise
        return slot

    def give(self, slot: Slot, passed: Event | None) -> None:
        """Give a buffer back; it is free when the device has passed the event."""
        slot.passed = passed
        self._free.put(slot)
