"""Brings the bytes of several modules to their tensors, one module after the other, in a thread of its own.

In the order of their use: text encoders, denoisers, VAE. A module that nobody holds any more is left out, and when that
goes for all of them, or on ``cancel``, whatever still arrives is given up. An error goes to every module that is not
whole by then.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from weightcache.errors import WeightcacheError
from weightcache.openfile import OpenSnapshot
from weightcache.runtime.assembly import is_heavy
from weightcache.runtime.device import Target
from weightcache.runtime.gates import Gate, guard, release
from weightcache.runtime.moving import Moving
from weightcache.runtime.places import Arriving, FilePages
from weightcache.runtime.report import LoadReport
from weightcache.runtime.streamer import Piece, Streamer

REPORT_SECONDS = 5.0  # that a load which is over here is waited for to be over in the daemon
END_SECONDS = 5.0  # that the thread gets at the interpreter's end


@dataclass(slots=True)
class Part:
    """One module and what it waits for."""

    name: str
    module: weakref.ref[torch.nn.Module]
    tensors: list[Arriving]
    gate: Gate = field(default_factory=Gate)
    _turning: threading.Lock = field(default_factory=threading.Lock)

    def guard(self) -> None:
        """From here on its users wait, if there is anything to wait for."""
        with self._turning:
            if self.gate.shut and (module := self.module()) is not None:
                guard(module, self.gate)

    def whole(self) -> None:
        """It has all of its weights: whoever waits goes on with a plain module."""
        self.tensors = []  # whose memory is the module's now
        with self._turning:
            if (module := self.module()) is not None:
                release(module)
            self.gate.open()


class Bringing:
    """The thread, and its end. ``pages``: where tensors of the files' own pages are; None: none are."""

    def __init__(
        self,
        snapshot: OpenSnapshot,
        target: Target,
        pages: FilePages | None,
        report: LoadReport,
    ) -> None:
        self.parts: list[Part] = []
        self._snapshot = snapshot
        self._target = target
        self._pages = pages
        self._report = report
        self._used: set[str] = set()  # paths of the files that hold the parts' tensors
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="weightcache pipeline", daemon=True)

    def add(self, name: str, module: torch.nn.Module, tensors: list[Arriving]) -> None:
        """One module more, before the start."""
        me = weakref.ref(self)

        def dropped(_: object) -> None:
            if (bringing := me()) is not None:
                bringing.dropped()

        self.parts.append(Part(name, weakref.ref(module, dropped), tensors))

    def start(self) -> None:
        _under_way.add(self)
        self._thread.start()

    def wait(self) -> None:
        """Return once every module is whole; raise the first error."""
        for part in self.parts:
            part.gate.wait()
        self._thread.join()

    def cancel(self) -> None:
        """Give up what is not there yet. Does not wait."""
        self._cancelled = True
        self._snapshot.close()

    def end(self) -> None:
        """Cancel, and wait a little: a thread that still copies must not outlive the interpreter."""
        self.cancel()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(END_SECONDS)

    def _run(self) -> None:
        self._target.enter()
        try:
            self._used = {arriving.stored.file.path for part in self.parts for arriving in part.tensors}
            for part in self._pages_come() if self._pages is not None else self._bytes_come():
                part.whole()
            self._report.came(self._snapshot.report(0.0 if self._more() else REPORT_SECONDS))
        except BaseException as error:  # noqa: BLE001 - it is raised where a module is used
            for part in self.parts:
                part.gate.fail(error)
        finally:
            for part in self.parts:
                part.tensors = []
            self._snapshot.close()
            self._report.finish()

    def _more(self) -> bool:
        """Whether the snapshot has large files that nobody waits for."""
        return any(is_heavy(file.name) and file.path not in self._used for file in self._snapshot.files)

    def dropped(self) -> None:
        """A module is gone; if it was the last one, nobody waits for anything."""
        if all(part.module() is None for part in self.parts):
            self.cancel()

    def _wanted(self) -> Iterator[Part]:
        """The parts, as long as anybody waits for them."""
        for part in self.parts:
            if self._cancelled:
                raise WeightcacheError(f"{part.name}: the load was cancelled")
            if part.module() is not None:
                yield part

    # -- the files' own pages

    def _pages_come(self) -> Iterator[Part]:
        assert self._pages is not None
        for part in self._wanted():
            began = time.perf_counter()
            last = {id(arriving.stored.file): arriving.stored for arriving in part.tensors}  # each file's
            for stored in last.values():
                stored.file.wait(0, stored.end)
            self._report.spend("wait", began, time.perf_counter())
            for arriving in part.tensors:
                if not arriving.there:
                    self._copy(self._pages, arriving)
                self._report.landed(arriving.stored.end - arriving.stored.begin)
            yield part

    def _copy(self, pages: FilePages, arriving: Arriving) -> None:
        stored, tensor = arriving.stored, arriving.tensor
        if tensor is None or not tensor.numel():
            return
        with self._report.stage("cast", stored.end - stored.begin):
            flat = pages.bytes_of(stored)
            if stored.begin % stored.dtype.itemsize:
                flat = flat.clone()
            tensor.copy_(flat.view(stored.dtype).reshape(stored.shape))

    # -- memory of the device

    def _bytes_come(self) -> Iterator[Part]:
        moving = Moving(self._report)
        left: list[tuple[Part, int]] = []  # how many pieces there are when a part has all of its own

        def pieces() -> Iterator[Piece]:
            for part in self._wanted():
                for arriving in part.tensors:
                    if self._cancelled:
                        raise WeightcacheError(f"{part.name}: the load was cancelled")
                    assert arriving.tensor is not None
                    yield from moving.pieces(arriving.stored, arriving.tensor)
                left.append((part, moving.given))

        with Streamer(self._target, report=self._report) as streamer:
            for index in streamer.copy(pieces()):
                moving.arrived(index)
                while left and left[0][1] <= index + 1:
                    yield self._settled(left.pop(0)[0])
        for part, _ in left:  # without a tensor of their own
            yield self._settled(part)

    def _settled(self, part: Part) -> Part:
        """What other threads give the device from now on finds the bytes there, whatever stream they use."""
        event = self._target.now()
        event.synchronize()
        return part


_under_way: weakref.WeakSet[Bringing] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for bringing in list(_under_way):
        bringing.end()
