"""A device of ordinary memory that behaves like an accelerator: a thread of its own makes the copies, in order.

``checked`` makes it as unkind as a real one may be at its worst, every time: a copy is made at the last moment, when
somebody waits for an event after it, and what it was made from is overwritten at once. So bytes that come from a
buffer too late or too early are wrong in the device's memory, where a comparison sees them.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

POISON = 0xA5


class Emulated:
    """An accelerator without hardware. It ends with its last stream's thread; ``close`` ends it sooner."""

    name = torch.device("cpu")
    staged = True

    def __init__(self, *, checked: bool = False, readers: int = 2) -> None:
        self.readers = readers
        self._checked = checked
        self._queues: list[_Queue] = []
        self._own = threading.local()

    def enter(self) -> None:
        self._own.entered = True

    def allocate(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def pinned(self, size: int) -> torch.Tensor:
        assert size & (size - 1) == 0, f"{size} bytes of pinned memory would take more"
        return self.allocate(size)

    def stream(self) -> EmulatedStream:
        queue = _Queue(self._checked)
        self._queues.append(queue)
        return EmulatedStream(self, queue)

    def now(self) -> EmulatedEvent:
        """The calling thread gives it nothing but by streams."""
        return EmulatedEvent(None)

    def after(self, event: EmulatedEvent) -> None:
        event.synchronize()

    def seconds(self, first: EmulatedEvent, last: EmulatedEvent) -> float:
        return last.at - first.at

    def register(self, memory: torch.Tensor) -> bool:
        return True

    def unregister(self, memory: torch.Tensor) -> None:
        pass

    def close(self) -> None:
        """End its threads. What they were given and have not done is never done."""
        while self._queues:
            self._queues.pop().close()

    def check(self) -> None:
        """Raise unless the calling thread has entered the device."""
        assert getattr(self._own, "entered", False), "the device was not set in this thread"


class EmulatedEvent:
    """A place in a queue; None: one that is passed."""

    def __init__(self, queue: _Queue | None) -> None:
        self.at = 0.0  # when the device passed it, in seconds
        self._queue = queue
        self._ticket = queue.add(self._pass) if queue is not None else 0

    def _pass(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return self._queue is None or self._queue.done >= self._ticket

    def synchronize(self) -> None:
        if self._queue is not None:
            self._queue.finish(self._ticket)


class EmulatedStream:
    """A stream of an Emulated."""

    def __init__(self, device: Emulated, queue: _Queue) -> None:
        self._device = device
        self.queue = queue

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        self._device.check()
        self.queue.add(lambda: self.make(into, source), source)

    def make(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """The copy itself, in the device's thread and no other: torch would wake a team for it."""
        assert into.nbytes == source.nbytes, f"{source.nbytes} bytes for a place of {into.nbytes}"
        ctypes.memmove(into.data_ptr(), source.data_ptr(), into.nbytes)

    def record_event(self) -> EmulatedEvent:
        return EmulatedEvent(self.queue)

    def wait_event(self, event: EmulatedEvent, /) -> None:
        self.queue.add(event.synchronize)


class _Queue:
    """Work that one thread does in the order it was given. After a failure nothing more is done, and waits raise it."""

    def __init__(self, checked: bool) -> None:
        self.done = 0
        self._given = 0
        self._checked = checked
        self._waited: list[int] = []  # somebody waits for so many: each of those who wait
        self._work: deque[tuple[Callable[[], object], torch.Tensor | None]] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="emulated device", daemon=True)
        self._thread.start()

    def add(self, work: Callable[[], object], source: torch.Tensor | None = None) -> int:
        """How much it has been given, with this."""
        with self._changed:
            self._work.append((work, source))
            self._given += 1
            if len(self._work) == 1:
                self._changed.notify_all()
            return self._given

    def finish(self, ticket: int) -> None:
        with self._changed:
            self._waited.append(ticket)
            if self._checked:
                self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self.done >= ticket or self._error is not None or self._closed)
            finally:
                self._waited.remove(ticket)
            if self._error is not None:
                raise self._error
            if self.done < ticket:
                raise RuntimeError("the device was closed")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _ready(self) -> bool:
        return self._closed or bool(self._work and (not self._checked or self.done < max(self._waited, default=0)))

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._waited and self.done >= min(self._waited):  # who waits for more sleeps on
                    self._changed.notify_all()
                self._changed.wait_for(self._ready)
                if self._closed:
                    return
                work, source = self._work.popleft()
            try:
                work()
                if self._checked and source is not None:
                    source.fill_(POISON)
            except BaseException as error:  # noqa: BLE001 - it is raised where the copy is waited for
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            self.done += 1
