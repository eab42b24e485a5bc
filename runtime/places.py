"""Where the tensors of a checkpoint will be: memory that is there before its bytes are.

A library's loading code is given these tensors in place of those of the file. It makes them the parameters of its
modules, as it would the file's; afterwards the bytes are brought to them. So nothing here knows a model, and a model
that did anything else with its tensors than keep them is found out by asking which tensors it holds.

On the CPU a tensor whose dtype is the file's lies in a private mapping of the file: it needs no memory, and its bytes
are there as soon as they are had. No page may be written to before all of it is had (see ``storage``), so whoever
holds such tensors waits for whole files.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from typing import Any, Protocol, Self

import torch

from weightcache.runtime.checkpoint import Stored
from weightcache.runtime.opened import Opened


class Place(Protocol):
    """A kind of memory."""

    def make(self, stored: Stored, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        """A tensor of the stored one's shape; whether the file's bytes need no moving to it."""


class DeviceMemory:
    """Memory of a device, from torch's own allocator: a tensor of it may go whenever nobody needs it any more."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def expect(self, size: int) -> None:
        """So many bytes will be asked for: one large allocation, which the allocator then cuts, is far cheaper."""
        if self.device.type != "cpu":
            torch.empty(size, dtype=torch.uint8, device=self.device)

    def make(self, stored: Stored, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        return torch.empty(stored.shape, dtype=dtype, device=self.device), False


class FilePages:
    """The CPU's memory, where it holds the files anyway."""

    def __init__(self) -> None:
        self._maps: dict[int, tuple[Opened, mmap.mmap]] = {}

    def make(self, stored: Stored, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        if dtype != stored.dtype or stored.begin == stored.end or stored.begin % dtype.itemsize:
            return torch.empty(stored.shape, dtype=dtype, device="cpu"), False
        return self.bytes_of(stored).view(dtype).reshape(stored.shape), True

    def bytes_of(self, stored: Stored) -> torch.Tensor:
        """The file's own bytes of a tensor, as they are there."""
        found = self._maps.get(id(stored.file))
        if found is None:
            with open(stored.file.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                found = stored.file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
            self._maps[id(stored.file)] = found
        return torch.frombuffer(found[1], dtype=torch.uint8, count=stored.end - stored.begin, offset=stored.begin)


class Arriving:
    """One tensor of a checkpoint on its way. ``tensor``: where it will be, once somebody has asked for it."""

    __slots__ = ("_place", "stored", "tensor", "there")

    def __init__(self, stored: Stored, place: Place) -> None:
        self.stored = stored
        self.tensor: torch.Tensor | None = None
        self.there = False  # the tensor is the file's own pages
        self._place = place

    def __getitem__(self, index: Any) -> Self:
        """transformers takes ``slice[...].to(device, dtype)`` of each tensor of a file: this stands in for both."""
        if index is not ...:
            raise NotImplementedError(f"{self.stored.name}: only all of it, not {index!r}, can be on its way")
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor, in the dtype it is to have; on the device it is to be on, whatever ``device``."""
        self.tensor, self.there = self._place.make(self.stored, dtype or self.stored.dtype)
        return self.tensor


def arrivals(stored: Iterable[Stored], place: Place) -> dict[str, Arriving]:
    return {tensor.name: Arriving(tensor, place) for tensor in stored}
