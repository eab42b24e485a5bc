"""The ring: a few pinned buffers through which any amount of bytes goes to a device.

A buffer that is given back is not free yet: the device may still be reading it. Who takes it next waits for the event
after the last copy out of it. That wait is all that keeps one tensor's bytes out of another's.
"""

from __future__ import annotations

import threading

import torch

from weightcache.runtime.device import Event, Target


class Slot:
    """One buffer. ``passed``: the event after the last copy out of it."""

    __slots__ = ("memory", "passed")

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.passed: Event | None = None

    @property
    def free(self) -> bool:
        return self.passed is None or self.passed.query()


class Ring:
    """``count`` buffers of ``size`` bytes each, a power of two. Thread-safe."""

    def __init__(self, device: Target, count: int, size: int) -> None:
        if size <= 0 or size & (size - 1):
            raise ValueError(f"a buffer of {size} bytes: a power of two is expected")
        self._given = threading.Condition()
        self._slots = [Slot(device.pinned(size)) for _ in range(count)]  # not in use, oldest first

    def take(self) -> Slot:
        """A buffer that may be written to, once there is one. Raises what went wrong with the last copy out of it."""
        with self._given:
            self._given.wait_for(lambda: self._slots)
            # The latest that is free may still be in the processor's cache; if none is, the oldest will be first.
            free = (at for at in range(len(self._slots) - 1, -1, -1) if self._slots[at].free)
            slot = self._slots.pop(next(free, 0))
        try:
            if slot.passed is not None:
                slot.passed.synchronize()
                slot.passed = None
        except BaseException:
            self.give(slot, slot.passed)
            raise
        return slot

    def give(self, slot: Slot, passed: Event | None) -> None:
        """Give a buffer back; it is free when the device has passed the event."""
        slot.passed = passed
        with self._given:
            self._slots.append(slot)
            self._given.notify()
