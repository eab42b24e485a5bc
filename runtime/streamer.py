"""Moves bytes of files to memory of a device, many at once, and says in order what has arrived.

Theory of operation. The caller names pieces: bytes of a file, and where they go. His thread packs them into *blocks* of
at most one buffer (small neighbours together, large ones in parts) and hands out as many as the ring has buffers. A
thread of the run takes a block and

    waits until its bytes are had       (holding nothing: this may take as long as the network does)
    takes a buffer of the ring          (waiting until the device has passed the event after its last use)
    reads the bytes into it             (``preadv``: a file that was cut short is an error, where a mapping would fault)
    gives the copies to the stream      (after an event of the caller's stream, where the memory was allocated)
    records an event, and gives the buffer back

while the caller takes the blocks in order: what his stream is given from there on comes after the block's event.
Memory of the CPU needs no copy after the read, so there a block is read right into its place, without the ring.

A run that ends early (an error, a consumer who leaves, Ctrl-C) hands out nothing more and returns when no read and no
copy into the caller's memory is under way. Threads that still wait for bytes leave when those come, or when the file
is closed; they hold no buffer and touch nothing.

Ctrl-C raises in the caller's thread at any call or return (see ``waiting``). So what he holds there is taken by
``with`` on a lock itself, which is one step, and a run asks which threads touch memory, not which he began.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch

from weightcache.core.layout import CUT
from weightcache.errors import FormatError
from weightcache.runtime.device import DeviceName, Event, Stream, Target, target_of
from weightcache.runtime.opened import Opened
from weightcache.runtime.report import LoadReport
from weightcache.runtime.ring import Ring
from weightcache.waiting import take

BUFFERS = 8  # at most; two for each reader, as more would only leave the processor's cache
BUFFER_BYTES = 8 << 20
PARTS = 512  # of a block: the kernel takes 1,024 in one read
CLOSED = "the streamer is closed"


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [begin, end) of ``file`` go to ``into``: uint8, one-dimensional, contiguous, on the device, as long."""

    file: Opened
    begin: int
    end: int
    into: torch.Tensor


@dataclass(slots=True)
class _Read:
    """A range of the file without gaps, and the places its bytes go to, one after the other."""

    begin: int
    end: int
    parts: list[torch.Tensor]


@dataclass(slots=True)
class _Block:
    """What one thread brings at once. ``ends``: the pieces that are whole with it."""

    file: Opened
    reads: list[_Read] = field(default_factory=list)
    size: int = 0
    parts: int = 0
    ends: list[int] = field(default_factory=list)
    fd: int = -1
    fence: Any = None  # after what the caller's stream still did with the memory
    given: float = 0.0  # when the device was given the copies
    started: Event | None = None
    passed: Event | None = None
    error: BaseException | None = None
    brought: bool = False
    over: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)  # has something when it is

    def add(self, begin: int, into: torch.Tensor) -> None:
        end = begin + into.nbytes
        if self.reads and self.reads[-1].end == begin:
            self.reads[-1].end = end
            self.reads[-1].parts.append(into)
        else:
            self.reads.append(_Read(begin, end, [into]))
        self.size += into.nbytes
        self.parts += 1


class Streamer:
    """Brings bytes to one device through one ring, for as long as it is open.

    ``device``: as torch names it, or an entry of the device layer. ``buffers`` (by default as many as
    the device's readers need) of ``buffer_bytes`` (a power of two) each bound the host's memory, and what is on its way
    at once. ``report``: who is told what was done.
    """

    def __init__(
        self,
        device: DeviceName | Target = "cpu",
        *,
        buffers: int | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        report: LoadReport | None = None,
    ) -> None:
        self.device = target_of(device)
        self.device.enter()
        self.report = report or LoadReport()
        # A thread reads one block while the device or the caller is at another; more would only be memory that waits.
        self._buffers = buffers or min(BUFFERS, 2 * self.device.readers)
        self._buffer_bytes = buffer_bytes
        self._ring = Ring(self.device, self._buffers, buffer_bytes) if self.device.staged else None
        self._stream = self.device.stream()
        self._runs: set[_Run] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what is under way: whoever waits for it gets a ValueError. May be called from any thread, and again."""
        with self._lock:
            self._closed = True
            runs = list(self._runs)
        for run in runs:
            run.stop()

    def copy(self, pieces: Iterable[Piece]) -> Iterator[int]:
        """The index of each piece, in order, once its bytes are there for what the calling thread does next.

        Pieces are taken, in the calling thread, only as far ahead as the ring allows. Raises the WeightcacheError of a
        load whose bytes will not come, FormatError for a file that is too short, OSError, and what the device raises.
        """
        run = _Run(self.device, self._stream, self._ring, self._buffers, self.report)
        with self._lock:
            if self._closed:
                raise ValueError(CLOSED)
            self._runs.add(run)
        try:
            yield from run.results(_blocks(pieces, self._buffer_bytes))
        finally:
            run.end()
            with self._lock:
                self._runs.discard(run)


def _blocks(pieces: Iterable[Piece], most: int) -> Iterator[_Block]:
    """``pieces`` packed, in order. What arrives apart is packed apart: another file, a tensor with its own chunks."""
    block: _Block | None = None
    for index, piece in enumerate(pieces):
        if not _fits(piece):
            raise ValueError(f"piece {index}: {piece.end - piece.begin} contiguous bytes of memory are expected")
        large = piece.end - piece.begin >= CUT  # it may arrive after what precedes it: they are different chunks
        if block is not None and (large or block.file is not piece.file):
            yield block
            block = None
        at = 0
        while at < piece.into.nbytes:
            if block is not None and (block.size == most or block.parts == PARTS):
                yield block
                block = None
            block = block or _Block(piece.file)
            length = min(most - block.size, piece.into.nbytes - at)
            whole = length == piece.into.nbytes  # most tensors are small, and a view of one takes its time
            block.add(piece.begin + at, piece.into if whole else piece.into[at : at + length])
            at += length
        block = block or _Block(piece.file)  # of no bytes
        block.ends.append(index)
    if block is not None:
        yield block


def _fits(piece: Piece) -> bool:
    into = piece.into
    flat = into.dtype == torch.uint8 and into.dim() == 1 and into.is_contiguous()
    return flat and into.nbytes == piece.end - piece.begin


class _Run:
    """One call of ``copy``: its threads, and the blocks that are on their way, oldest first."""

    def __init__(self, device: Target, stream: Stream, ring: Ring | None, ahead: int, report: LoadReport) -> None:
        self._device = device
        self._stream = stream
        self._ring = ring
        self._ahead = ahead
        self._report = report
        self._jobs: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._pending: deque[_Block] = deque()
        self._copied: deque[_Block] = deque()  # whose copies nobody has seen the end of
        self._descriptors: dict[int, int] = {}
        self._threads = 0  # begun
        self._moving = [threading.Lock() for _ in range(device.readers)]  # by a thread while it reads or copies
        self._mutex = threading.Lock()
        self._stopped = False

    # -- in the caller's thread

    def results(self, blocks: Iterator[_Block]) -> Iterator[int]:
        while True:
            while len(self._pending) < self._ahead and (block := next(blocks, None)) is not None:
                self._submit(block)
            if not self._pending:
                return
            block = self._pending[0]
            take(block.over)
            if block.error is not None:
                raise block.error
            if block.passed is not None:
                self._device.after(block.passed)
            with self._mutex:
                self._pending.popleft()
            self._forget(block)
            yield from block.ends

    def _submit(self, block: _Block) -> None:
        block.fence = self._device.now()
        descriptor = self._descriptors.get(id(block.file))
        if descriptor is None:
            descriptor = self._descriptors[id(block.file)] = os.open(block.file.path, os.O_RDONLY | os.O_CLOEXEC)
        block.fd = descriptor
        with self._mutex:
            if self._stopped:
                raise ValueError(CLOSED)
            self._pending.append(block)
            self._jobs.put(block)
        if self._threads < self._device.readers:
            moving = self._moving[self._threads]
            self._threads += 1
            threading.Thread(target=self._work, args=(moving,), name=f"reader {self._threads}", daemon=True).start()

    def _forget(self, block: _Block) -> None:
        """Close its file unless more of it is on its way: a snapshot may have more files than may be open."""
        if block.started is not None:
            self._copied.append(block)
        while self._copied and (passed := self._copied[0].passed) is not None and passed.query():
            self._tell(self._copied.popleft())
        if all(other.file is not block.file for other in self._pending):
            os.close(self._descriptors.pop(id(block.file)))

    def _tell(self, block: _Block) -> None:
        assert block.passed is not None
        seconds = self._device.seconds(block.started, block.passed)
        self._report.spend("copy", block.given, block.given + seconds, block.size, "device")

    def end(self) -> None:
        """Stop, and let go of everything."""
        self.stop()
        for block in self._copied:
            if block.passed is not None and block.passed.query():
                self._tell(block)
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    # -- in any thread

    def stop(self) -> None:
        """Hand out nothing more; return when nothing is read or copied into the caller's memory any more."""
        with self._mutex:
            self._stopped = True
            pending = list(self._pending)
        for moving in self._moving:
            self._jobs.put(None)
            with moving:
                pass
        for block in (*self._copied, *pending):
            if block.passed is not None:
                with contextlib.suppress(Exception):  # whoever waits for that block is told
                    block.passed.synchronize()
        for block in pending:
            if not block.brought:
                block.error = ValueError(CLOSED)
            block.over.put(None)

    # -- in threads of its own

    def _work(self, moving: threading.Lock) -> None:
        self._device.enter()
        while (block := self._jobs.get()) is not None:
            try:
                self._await(block)
                with moving:
                    if self._stopped:
                        return
                    self._bring(block)
                    block.reads.clear()  # nor may a tensor end in this thread when the interpreter does
                    block.brought = True
            except BaseException as error:  # noqa: BLE001 - it is raised where the block is waited for
                block.error, block.brought = error, True
            block.over.put(None)

    def _await(self, block: _Block) -> None:
        began = time.perf_counter()
        for read in block.reads:
            block.file.wait(read.begin, read.end)
        self._report.spend("wait", began, time.perf_counter())

    def _bring(self, block: _Block) -> None:
        if self._ring is None:
            self._fill(block, [read.parts for read in block.reads])
        else:
            self._by_ring(block, self._ring)

    def _by_ring(self, block: _Block, ring: Ring) -> None:
        slot = ring.take()
        try:
            at, places = 0, []
            for read in block.reads:
                places.append([slot.memory[at : at + read.end - read.begin]])
                at += read.end - read.begin
            self._fill(block, places)
            self._stream.wait_event(block.fence)
            block.given = time.perf_counter()
            block.started = self._stream.record_event()
            try:
                at = 0
                for part in (part for read in block.reads for part in read.parts):
                    self._stream.copy(part, slot.memory[at : at + part.nbytes])
                    at += part.nbytes
            finally:  # some copies may be under way, though another one was refused
                block.passed = self._stream.record_event()
        finally:
            ring.give(slot, block.passed)

    def _fill(self, block: _Block, places: list[list[torch.Tensor]]) -> None:
        """Read the block's bytes into host memory."""
        for read, into in zip(block.reads, places, strict=True):
            reading = _Reading(block.fd, [part.numpy() for part in into], read.begin, block.file.path)
            began = time.perf_counter()
            hot = reading.cached()
            read_at = time.perf_counter()
            if hot:
                self._report.spend("read", began, read_at, hot)
            if reading.into:
                cold = reading.rest()
                self._report.spend("disk", read_at, time.perf_counter(), cold)


class _Reading:
    """Fills ``into`` with what follows offset ``at`` of a file."""

    def __init__(self, fd: int, into: list[Any], at: int, path: str) -> None:
        self.into = into
        self._fd = fd
        self._at = at
        self._path = path

    def cached(self) -> int:
        """Read what the page cache has, and say how much; what it has not is left.

        The kernel itself tells: ``mincore``, which answers the same, lies under some cgroups.
        """
        try:
            return self._read(os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # a filesystem that cannot tell: in memory, or far away
                raise
            return self.rest()

    def rest(self) -> int:
        """Read all that is left. Raises FormatError when the file ends before."""
        total = 0
        while self.into:
            got = self._read(0)
            if not got:
                raise FormatError(
                    f"{self._path}: it ends at byte {self._at}, before its tensors do: it was truncated while open"
                )
            total += got
        return total

    def _read(self, flags: int) -> int:
        got = left = os.preadv(self._fd, self.into, self._at, flags)
        self._at += got
        while self.into and left >= self.into[0].nbytes:
            left -= self.into[0].nbytes
            del self.into[0]
        if left:
            self.into[0] = self.into[0][left:]
        return got
