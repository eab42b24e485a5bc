"""Devices that do not keep the rules, so that tests see what the rules are for."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from weightcache.runtime.emulated import Emulated, EmulatedEvent, EmulatedStream


class Rash(EmulatedEvent):
    """An event that nobody waits for who is to write to a buffer again."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Careless(Emulated):
    """The ring's wait is removed; what the caller's stream does still comes after the copies."""

    def __init__(self) -> None:
        super().__init__(checked=True)

    def stream(self) -> EmulatedStream:
        stream = super().stream()
        stream.record_event = lambda: Rash(stream.queue)  # type: ignore[method-assign]
        return stream

    def after(self, event: EmulatedEvent) -> None:
        EmulatedEvent.synchronize(event)


class Early(Emulated):
    """Buffers are given back with an event from before their copies."""

    def __init__(self) -> None:
        super().__init__(checked=True)
        self.made: dict[EmulatedEvent, EmulatedEvent] = {}

    def stream(self) -> EmulatedStream:
        stream = super().stream()
        first = EmulatedEvent(stream.queue)

        def record() -> EmulatedEvent:
            early = EmulatedEvent(None)
            self.made[early] = EmulatedEvent(stream.queue)
            return early

        first.synchronize()
        stream.record_event = record  # type: ignore[method-assign]
        return stream

    def after(self, event: EmulatedEvent) -> None:
        self.made[event].synchronize()


class Failing(Emulated):
    """Its copy number ``fails`` goes wrong."""

    def __init__(self, fails: int) -> None:
        super().__init__()
        self.fails = fails

    def stream(self) -> EmulatedStream:
        stream = super().stream()
        real, left = stream.make, [self.fails]

        def make(into: torch.Tensor, source: torch.Tensor) -> None:
            left[0] -= 1
            if not left[0]:
                raise RuntimeError("the device has fallen off the bus")
            real(into, source)

        stream.make = make  # type: ignore[method-assign]
        return stream


class Small(Emulated):
    """It has memory for so many bytes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def allocate(self, size: int) -> torch.Tensor:
        self.room -= size
        if self.room < 0:
            raise torch.OutOfMemoryError("out of memory")
        return super().allocate(size)


def readers() -> Iterable[threading.Thread]:
    """The threads of runs that are not over."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader ")]


def over(device: object) -> None:
    """A test is done with a device: nobody reads for it any more."""
    if isinstance(device, Emulated):
        device.close()
    nobody_reads()


def nobody_reads() -> None:
    """Once the runs that are over have let go: one that waits for bytes leaves when it hears that there are none."""
    for reader in readers():
        reader.join(10)
    assert not list(readers())
