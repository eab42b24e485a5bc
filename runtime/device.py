"""The device layer: one small table of operations, and who provides them.

``Device`` is the table. ``Host`` is the CPU: its memory is filled by reading right into it. ``Accelerator`` is whatever
torch drives through streams and events: copies to it start from pinned memory, run beside everything else, and are
over when an event says so. ``runtime/emulated.py`` has one of ordinary memory and a thread, which behaves like it, so
that what can go wrong with a real one goes wrong in a test.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch

from weightcache.errors import ConfigError

DeviceName = str | int | torch.device | None
Device = DeviceName  # as the loader's arguments call it

MAX_REGISTER = 512 << 30  # bytes of one call: the driver fails above
READERS = 8  # threads that read for an accelerator: they are the depth of the I/O, so cores do not matter


class Event(Protocol):
    """A point in the order of what a device was given. torch.Event is one."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Return once the device has passed it; raises what went wrong before it."""


class Stream(Protocol):
    """Copies that a device makes one after the other, while the caller goes on. Usable from several threads."""

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Give the device a copy to make. ``source`` must stay as it is until an event after this has passed."""

    def record_event(self) -> Any:
        """An event after all that this stream was given so far."""

    def wait_event(self, event: Any, /) -> None:
        """What this stream is given from now on comes after ``event``."""


class Target(Protocol):
    """The table: what loading needs of a device. Safe to use from several threads.

    ``staged``: bytes go through pinned memory; if not, they are read right into the device's. ``readers``: threads that
    are to read for it at once.
    """

    name: torch.device
    staged: bool
    readers: int

    def enter(self) -> None:
        """To be called first in every thread that uses the device."""

    def allocate(self, size: int) -> torch.Tensor:
        """``size`` bytes of its memory, aligned for every dtype; not zeroed."""

    def pinned(self, size: int) -> torch.Tensor:
        """``size`` bytes (a power of two: torch rounds up to one) of host memory from which it copies by itself."""

    def stream(self) -> Stream:
        """A stream of its own."""

    def now(self) -> Any:
        """An event after all that the calling thread has given the device so far."""

    def after(self, event: Any) -> None:
        """What the calling thread gives the device from now on comes after ``event``."""

    def seconds(self, first: Any, last: Any) -> float:
        """The time from one event of a stream to another, once the device has passed both."""

    def register(self, memory: torch.Tensor) -> bool:
        """Pin existing host memory, until ``unregister``; False where the device cannot. For shared memory only."""

    def unregister(self, memory: torch.Tensor) -> None:
        """Undo ``register``."""


class Passed:
    """The event of a device that is never behind."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Host:
    """The CPU. Nothing is staged, so nothing is asynchronous."""

    name = torch.device("cpu")
    staged = False

    def __init__(self) -> None:
        self.readers = len(os.sched_getaffinity(0))  # reading is copying here: more threads than cores cost

    def enter(self) -> None:
        pass

    def allocate(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def pinned(self, size: int) -> torch.Tensor:
        return self.allocate(size)

    def stream(self) -> Stream:
        return _HostStream()

    def now(self) -> Passed:
        return Passed()

    def after(self, event: Passed) -> None:
        pass

    def seconds(self, first: Passed, last: Passed) -> float:
        return 0.0

    def register(self, memory: torch.Tensor) -> bool:
        return False

    def unregister(self, memory: torch.Tensor) -> None:
        pass


class _HostStream:
    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        into.copy_(source)

    def record_event(self) -> Passed:
        return Passed()

    def wait_event(self, event: Passed, /) -> None:
        pass


class Accelerator:
    """What torch drives by ``torch.accelerator``: CUDA, and whatever else has streams and events there.

    Written from the documentation; see the README for what has run on which hardware.
    """

    staged = True
    readers = READERS

    def __init__(self, device: torch.device) -> None:
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        self.name = torch.device(device.type, index)

    def enter(self) -> None:
        torch.accelerator.set_device_index(self.name)  # a thread begins on device 0

    def allocate(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.name)

    def pinned(self, size: int) -> torch.Tensor:
        # torch keeps what was pinned once for the next ring: pinning costs half a second a gigabyte.
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def stream(self) -> Stream:
        return _AcceleratorStream(torch.Stream(device=self.name))

    def now(self) -> torch.Event:
        return torch.accelerator.current_stream(self.name).record_event()

    def after(self, event: torch.Event) -> None:
        torch.accelerator.current_stream(self.name).wait_event(event)

    def seconds(self, first: torch.Event, last: torch.Event) -> float:
        return first.elapsed_time(last) / 1e3

    def register(self, memory: torch.Tensor) -> bool:
        if self.name.type != "cuda" or memory.nbytes > MAX_REGISTER:
            return False
        runtime = _cuda_runtime()
        if int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
            return True
        # A failure stays behind as the pending error, and the next kernel, which has no part in it, would raise it.
        runtime.cudaGetLastError()
        return False

    def unregister(self, memory: torch.Tensor) -> None:
        _cuda_runtime().cudaHostUnregister(memory.data_ptr())


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class _AcceleratorStream:
    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream
        self.wait_event = stream.wait_event

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        with self._stream:
            into.copy_(source, non_blocking=True)

    def record_event(self) -> torch.Event:
        return self._stream.record_event(torch.Event(device=self._stream.device, enable_timing=True))


def target_of(device: DeviceName | Target) -> Target:
    """The entry for a device as torch names it; an entry is its own. ConfigError: this torch has no such device."""
    if not isinstance(device, str | int | torch.device | None):
        return device
    try:
        name = torch.device("cpu") if device is None else torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"device {device!r}: torch knows none of that name; cpu or cuda:0, say, is expected"
        ) from None
    if name.type == "cpu":
        return Host()
    current = torch.accelerator.current_accelerator()
    if current is None or current.type != name.type:
        here = "there is none here" if current is None else f"the one here is {current.type!r}"
        raise ConfigError(f"device {str(name)!r}: it is not an accelerator of this torch; {here}")
    return Accelerator(name)


def device_name(device: DeviceName) -> Any:
    """``device`` as safetensors takes it, and with the index it would use: "cuda" is "cuda:0", None is "cpu".

    torch.device is accepted too. What is no device at all is left as it is, for safetensors to refuse.
    """
    if device is None:
        return "cpu"
    if isinstance(device, torch.device):
        device = str(device)
    if isinstance(device, str) and device in ("cuda", "musa", "npu", "xpu", "xla", "mlu", "hpu"):
        return f"{device}:0"
    return device


def to_device(tensor: torch.Tensor, device: str | int) -> torch.Tensor:
    """A copy of ``tensor`` on ``device``.

    Staged through memory of our own: a driver that copies straight from a file mapping faults it in page by page.
    """
    return tensor.clone(memory_format=torch.contiguous_format).to(device)
