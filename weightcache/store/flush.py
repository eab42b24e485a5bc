"""The dirty budget: how many bytes may wait in memory for the disk before no more are fetched.

Theory of operation. Once the dirty pages of the whole machine pass the kernel's limit, whoever writes is made to
wait, and all loads fall to the disk's speed at once, the daemon's own index with them. So what lands is counted until
it is on the disk. From half of the budget on, a thread has the kernel write the oldest ranges out
(``sync_file_range`` starts that without waiting) and waits for them in order; at the whole budget ``full`` turns
true, and the planner asks for nothing until half of it is free again. Not from the first byte on: pages on their way
to the disk make writers some 20% slower (``python -m bench dirty``). A store on tmpfs has nothing to write back: its
ranges are done at once.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from weightcache.store.files import flush_range, start_flush

_LEAST = 256 << 20
_STATISTICS = Path("/proc/vmstat")


def default_budget() -> int:
    """Half of what the kernel lets be dirty now, in bytes: the other half is for whoever else writes on this host."""
    (pages,) = re.findall(r"^nr_dirty_threshold (\d+)$", _STATISTICS.read_text(), re.MULTILINE)
    return max(_LEAST, int(pages) * mmap.PAGESIZE // 2)


class Landing:
    """One blob that is being written. Its descriptor, now this one's, closes when it is over and on the disk."""

    __slots__ = ("fd", "over", "ranges")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.over = False  # nothing more will land
        self.ranges = 0  # that are not on the disk

    def close_unused(self) -> None:
        if self.over and not self.ranges and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


Range = tuple[Landing, int, int]  # with offset and length


class Flusher:
    """Counts what landed until the disk has it. ``changed(full)`` is called, from any thread, when ``full`` changes.

    ``budget``: in bytes; None: the kernel's word, asked anew for each blob, since it follows the free memory.
    """

    def __init__(self, budget: int | None, changed: Callable[[bool], None]) -> None:
        self._given = budget
        self._budget = budget or default_budget()
        self._changed = changed
        self._queue: deque[Range] = deque()  # not started
        self._started: deque[Range] = deque()
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._ranges = 0  # in either queue, or being finished
        self._due = 0  # of them: written out however small the backlog
        self.dirty = 0  # bytes
        self.full = False

    def begin(self, fd: int) -> Landing:
        """A blob is going to be written, by this descriptor. Quick."""
        with self._work:
            self._budget = self._given or default_budget()
            self._set_full()  # where it has grown, perhaps nothing wakes the thread that would say so
        return Landing(fd)

    def landed(self, landing: Landing, offset: int, length: int) -> None:
        """Bytes were written. Quick."""
        with self._work:
            self._queue.append((landing, offset, length))
            landing.ranges += 1
            self._ranges += 1
            self.dirty += length
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
                self._thread.start()
            self._set_full()
            if self._awake():
                self._work.notify()

    def ended(self, landing: Landing) -> None:
        """A blob has come, or will not: write out all there is, so that it can be evicted. Quick."""
        with self._work:
            landing.over = True
            landing.close_unused()
            self._due = self._ranges
            self._work.notify()

    def _awake(self) -> bool:
        """Whether the thread has something to do."""
        return self._closed or self._due > 0 or self.dirty > self._budget // 2

    def _set_full(self) -> None:
        full = self.dirty >= self._budget or (self.full and self.dirty > self._budget // 2)
        if full != self.full:
            self.full = full
            self._changed(full)

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(self._awake)
                if self._closed:
                    return
                fresh = list(self._queue)
                self._queue.clear()
            for landing, offset, length in fresh:
                start_flush(landing.fd, offset, length)
            self._started.extend(fresh)
            self._finish(*self._started.popleft())

    def _finish(self, landing: Landing, offset: int, length: int) -> None:
        flush_range(landing.fd, offset, length)
        with self._work:
            landing.ranges -= 1
            landing.close_unused()
            self.dirty -= length
            self._ranges -= 1
            self._due = max(0, self._due - 1)
            self._set_full()

    def close(self) -> None:
        """Count no more; what is under way goes on in the kernel."""
        with self._work:
            self._closed = True
            self._work.notify()
        if self._thread is not None:
            self._thread.join(1.0)
        for landing, _, _ in (*self._queue, *self._started):
            landing.over, landing.ranges = True, 0
            landing.close_unused()
