"""Streaming a file's tensors to memory: by us, by the bound, and by others.

The bound is two threads that copy the same bytes from a mapping to a buffer and from there to memory that is there
already, and do nothing else. Next to it is what a loader needs besides: memory of the tensors' own, each turn in a
process that is new (``owned.py``). Everybody reads the same tensors, from a file that is in the page cache.
"""

from __future__ import annotations

import contextlib
import mmap
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file as safetensors_load_file
from safetensors.torch import save_file

from bench import rivals, rounds, sd15
from bench.hosts import MB
from bench.rounds import Contender, timed
from bench.run import Run
from bench.standing import ROOT, Standing
from bench.table import Column, Table, at_least, at_most
from weightcache.core.layout import parse_header
from weightcache.runtime.device import Target
from weightcache.runtime.emulated import Emulated
from weightcache.runtime.opened import LocalFile
from weightcache.runtime.streamer import BUFFER_BYTES, Piece, Streamer

ABOUT = (
    "'to memory that is there' is the device: allocated and touched before, in this process. The others: tensors that "
    "the caller keeps, in a process that loads for the first time. The loaders' own formats (tensorizer, flashpack) "
    "hold the same tensors. No accelerator here."
)
BOUND = "bound: two threads, mapping -> ring -> memory that is there"
OURS = "weightcache, to memory that is there"
RING = "weightcache, by the ring, to an emulated device"
OWN = "weightcache stream_file, own memory"
BUFFER = 8 << 20
COLUMNS = (rounds.SPEED, Column("ratio", "of bound", "{:.2f}"), Column("cpu_receiving", "CPU s/GB", "{:.2f}"))


class Memory:
    """The device: as many bytes as the file has, there before the turn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.bytes = torch.zeros(self.size, dtype=torch.uint8)

    def check(self) -> None:
        """Raise unless the file's bytes are in it; then make them wrong for the next turn."""
        found = torch.from_file(str(self.path), size=self.size, dtype=torch.uint8)
        if not torch.equal(self.bytes, found):
            raise rounds.Unavailable("the bytes are wrong")
        self.bytes.fill_(0)


class Kept(Emulated):
    """A device that keeps for the next ring what was pinned for the last one, as torch does for a real one."""

    def __init__(self) -> None:
        super().__init__(readers=1)  # which with its own are two threads, as the bound has
        self._pinned = deque(torch.zeros(BUFFER_BYTES, dtype=torch.uint8) for _ in range(2))

    def pinned(self, size: int) -> torch.Tensor:
        assert size == BUFFER_BYTES, f"a buffer of {size} bytes"
        self._pinned.rotate()
        return self._pinned[0]


def two_threads(memory: Memory) -> None:
    """The bound."""
    into = memory.bytes.numpy()
    with open(memory.path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        source = np.frombuffer(mapped, np.uint8)

        def copy(first: int, source: Any) -> None:
            buffer = np.empty(BUFFER, np.uint8)
            for at in range(first * BUFFER, memory.size, 2 * BUFFER):
                length = min(BUFFER, memory.size - at)
                np.copyto(buffer[:length], source[at : at + length])
                np.copyto(into[at : at + length], buffer[:length])

        threads = [threading.Thread(target=copy, args=(number, source)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        del source, threads  # or the mapping could not be closed


def by_ring(memory: Memory, device: Kept) -> None:
    by_streamer(memory, device)
    device.close()  # its thread


def by_streamer(memory: Memory, device: str | Target) -> None:
    """The file's tensors to where they belong in the device's memory."""
    with open(memory.path, "rb") as opened:
        begin = opened.read(8)
        begin += opened.read(int.from_bytes(begin, "little"))
    header = parse_header(begin)
    memory.bytes.numpy()[: len(begin)] = np.frombuffer(begin, np.uint8)
    file = LocalFile(str(memory.path))

    def pieces() -> Iterator[Piece]:
        for tensor in header.tensors:
            yield Piece(file, tensor.begin, tensor.end, memory.bytes[tensor.begin : tensor.end])

    with Streamer(device) as streamer:
        for _ in streamer.copy(pieces()):
            pass


def convert(path: Path) -> tuple[Path, Path]:
    """The same tensors in the formats of tensorizer and flashpack."""
    from flashpack.serialization import pack_to_file
    from tensorizer import TensorSerializer

    tensors = safetensors_load_file(path)
    tensorized, packed = path.with_suffix(".tensors"), path.with_suffix(".flashpack")
    serializer = TensorSerializer(str(tensorized))
    serializer.write_state_dict(tensors)
    serializer.close()
    pack_to_file(tensors, str(packed), None)
    return tensorized, packed


@contextlib.contextmanager
def owned(name: str, size: int, way: str, path: Path, tiny: Path, *needs: str) -> Iterator[Contender]:
    """Each turn is a process of its own, which has loaded a tiny file before it begins."""
    with contextlib.ExitStack() as running:
        workers: list[Standing] = []

        def clear() -> None:
            running.close()
            workers.clear()

        def prepare() -> None:
            rivals.module(*needs)
            workers.append(running.enter_context(Standing("bench.owned", way)))
            workers[0].ask(tiny)

        def pids() -> list[int]:
            return workers[0].pids() if workers else []

        yield Contender(name, size, lambda: workers[0].seconds(path), clear, prepare, receiving=pids)


def stream(run: Run) -> Table:
    """Everybody, in turns."""
    path = run.folder / "sd15.safetensors"
    size = sd15.write_file(path, small=run.quick)
    tiny = run.folder / "tiny.safetensors"
    save_file({"tiny": torch.ones(1 << 20)}, tiny)
    tensorized, packed = convert(path)
    small_tensorized, small_packed = convert(tiny)
    memory = Memory(path)
    device = Kept()

    def into_memory(name: str, move: Callable[[], None]) -> Contender:
        return Contender(name, size, lambda: timed(move), memory.check, fresh=False)

    memory.bytes.copy_(torch.from_file(str(path), size=size, dtype=torch.uint8))  # what the first check finds
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        others = [
            enter(owned(OWN, size, "ours", path, tiny)),
            enter(owned("safetensors pread", size, "safetensors", path, tiny)),
            enter(owned("Run:ai streamer", size, "runai", path, tiny, "runai_model_streamer", "humanize")),
            enter(owned("fastsafetensors, nogds", size, "fastsafetensors", path, tiny, "fastsafetensors")),
            enter(owned("tensorizer, own format", size, "tensorizer", tensorized, small_tensorized, "tensorizer")),
            enter(owned("flashpack, reading, own format", size, "flashpack", packed, small_packed, "flashpack")),
        ]
        contenders = [
            into_memory(BOUND, lambda: two_threads(memory)),
            into_memory(OURS, lambda: by_streamer(memory, "cpu")),
            into_memory(RING, lambda: by_ring(memory, device)),
            *others,
        ]
        title = f"a file shaped as SD 1.5, {size / MB:.0f} MB, to memory"
        table = rounds.compare("stream", title, ABOUT, contenders, run)
    table.columns = COLUMNS
    for name in (OURS, RING):
        table.expect(at_least(0.8, f"of the bound: {name}"), name, "speed", BOUND)
    for rival in others[1:]:
        table.expect(at_least(1, f"times {rival.name}"), OWN, "speed", rival.name)
    table.facts["MB that streaming held beyond the file's pages, at most"] = beyond = _beyond(path)
    row = next(row for row in table.rows if row.name == RING)
    row.values["beyond"] = beyond
    table.expect(at_most(64 + 64, "MB of host memory beyond mapped pages: ring + 64"), RING, "beyond")
    return table


def _beyond(path: Path) -> float:
    """MB of anonymous memory that a process had more of, at most, while it streamed a file and kept nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.beyond", str(path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return float(done.stdout)
