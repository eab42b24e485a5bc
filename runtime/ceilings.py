"""What this machine can do, measured once (``python -m weightcache.runtime --ceilings``); reports compare with it.

Copying memory, reading the store's disk past the page cache, the fastest link that is up, and copying to the device.
The figures are kept beside the blobs; where nothing may be written there they are measured again by each process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from weightcache.config import load_config
from weightcache.runtime.device import target_of

NAME = "ceilings.json"
BLOCK = 8 << 20
MEMORY = 256 << 20  # bytes: beyond any cache
DISK = 64 << 20
LINKS = Path("/sys/class/net")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second; None: not here, or unknown."""

    memory: float | None
    disk: float | None
    link: float | None
    device: float | None

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)


@functools.cache
def ceilings() -> Ceilings:
    """This machine's, from the file; measured if it was never done, in less than three seconds."""
    folder = load_config().store
    try:
        return Ceilings(**json.loads((folder / NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return measure(folder)


def measure(folder: Path) -> Ceilings:
    """Measure, and keep the figures in ``folder``, whose disk is meant, if it may be written to."""
    found = Ceilings(memory_copy(), _disk(folder), link_speed(LINKS), _device())
    with contextlib.suppress(OSError):
        draft = folder / f"{NAME}.{os.getpid()}"
        draft.write_text(json.dumps(found.to_json()) + "\n")
        draft.replace(folder / NAME)
    return found


def memory_copy() -> float:
    """All cores together, from one place to another."""
    source, into = torch.ones(MEMORY, dtype=torch.uint8), torch.zeros(MEMORY, dtype=torch.uint8)
    cores = len(os.sched_getaffinity(0))

    def copy(first: int) -> None:
        for at in range(first * BLOCK, MEMORY, cores * BLOCK):
            into[at : at + BLOCK].copy_(source[at : at + BLOCK])

    return MEMORY / min(_together(cores, copy) for _ in range(3))


def _disk(folder: Path) -> float | None:
    """Reading what was just written, past the page cache."""
    memory = mmap.mmap(-1, BLOCK)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{NAME}.") as file:
            memory.write(os.urandom(BLOCK))
            for _ in range(DISK // BLOCK):
                file.write(memory)
            file.flush()
            os.fsync(file.fileno())
            direct = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:

        def read(first: int) -> None:
            buffer = mmap.mmap(-1, BLOCK)
            for at in range(first * BLOCK, DISK, 4 * BLOCK):
                os.preadv(direct, [buffer], at)

        return DISK / _together(4, read)
    finally:
        os.close(direct)


def link_speed(links: Path) -> float | None:
    """Of the fastest interface that is up and says its speed; virtual ones often do not."""
    speeds = []
    for link in links.glob("*"):
        with contextlib.suppress(OSError, ValueError):
            if (link / "operstate").read_text().strip() == "up":
                speeds.append(int((link / "speed").read_text()))
    fastest = max(speeds, default=-1)
    return fastest * 1e6 / 8 if fastest > 0 else None


def _device() -> float | None:
    """From pinned memory to the accelerator, if there is one."""
    current = torch.accelerator.current_accelerator()
    if current is None:
        return None
    target = target_of(current)
    pinned, into, stream = target.pinned(DISK), target.allocate(DISK), target.stream()
    seconds = []
    for _ in range(4):
        began = stream.record_event()
        stream.copy(into, pinned)
        ended = stream.record_event()
        ended.synchronize()
        seconds.append(target.seconds(began, ended))
    return DISK / min(seconds)


def _together(threads: int, work: Callable[[int], None]) -> float:
    """Seconds in which threads, numbered from 0, do their work."""
    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    began = time.perf_counter()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return time.perf_counter() - began
