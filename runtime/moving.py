"""Bytes of a checkpoint to tensors that are there already, by a streamer; cast where a tensor's dtype is another.

A tensor that is cast comes in parts, each to a little memory of its device that a later part uses again: the largest
tensor may be a tenth of its model. A memory is filled again only after the cast out of it: both are the work of the
thread that takes the pieces, and the streamer's copies come after what that thread gave the device before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from weightcache.core.layout import CUT
from weightcache.runtime.checkpoint import Stored
from weightcache.runtime.report import LoadReport
from weightcache.runtime.streamer import BUFFER_BYTES, Piece


@dataclass(frozen=True, slots=True)
class _Part:
    """What becomes of a piece of ``size`` bytes. ``staging``: the memory it comes to first, when it is cast."""

    stored: Stored
    size: int
    into: torch.Tensor
    staging: torch.Tensor | None = None
    last: bool = True  # of its tensor


class Moving:
    """The pieces of one run of a streamer. ``given``: how many there are so far."""

    def __init__(self, report: LoadReport) -> None:
        self.given = 0
        self._report = report
        self._parts: dict[int, _Part] = {}
        self._spare: list[torch.Tensor] = []  # memory of BUFFER_BYTES

    def pieces(self, stored: Stored, tensor: torch.Tensor) -> Iterator[Piece]:
        """What brings one tensor. Each piece, when it is there, is to be told by ``arrived``."""
        into, size = tensor.detach(), stored.end - stored.begin
        if not into.is_contiguous() or not size:
            yield self._piece(_Part(stored, size, into, _memory(size, into.device)), 0)
        elif into.dtype == stored.dtype:
            yield self._piece(_Part(stored, size, into.view(-1).view(torch.uint8)), 0)
        else:
            into, item = into.view(-1), stored.dtype.itemsize
            for at in range(0, size, BUFFER_BYTES):
                end = min(at + BUFFER_BYTES, size)
                staging = self._staging(end - at, into.device)
                yield self._piece(_Part(stored, end - at, into[at // item : end // item], staging, end == size), at)

    def _staging(self, size: int, device: torch.device) -> torch.Tensor:
        if size < CUT:  # of which many are on their way at once
            return _memory(size, device)
        return self._spare.pop() if self._spare else _memory(BUFFER_BYTES, device)

    def _piece(self, part: _Part, at: int) -> Piece:
        self._parts[self.given] = part
        self.given += 1
        begin = part.stored.begin + at
        return Piece(part.stored.file, begin, begin + part.size, _come_to(part))

    def arrived(self, index: int) -> bool:
        """Piece ``index`` is there; whether its tensor is whole with it."""
        part = self._parts.pop(index)
        if part.staging is not None:
            with self._report.stage("cast", part.size):
                part.into.copy_(_come_to(part).view(part.stored.dtype).reshape(part.into.shape))
            if part.staging.nbytes == BUFFER_BYTES:
                self._spare.append(part.staging)
        if part.last:
            self._report.landed(part.stored.end - part.stored.begin)
        return part.last


def _come_to(part: _Part) -> torch.Tensor:
    """The memory that gets a part's bytes."""
    return part.into if part.staging is None else part.staging[: part.size]


def _memory(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)
