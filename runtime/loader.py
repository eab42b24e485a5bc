"""``load_file``, ``load_model``, ``safe_open``: what safetensors offers, of files that may still be arriving.

Theory of operation. safetensors itself opens the file as soon as its header is had (the file has its full size from the
start), so arguments, headers and names are judged by safetensors, in its own words. It gives each tensor's dtype and
shape in the order of their offsets, and it has checked that they tile the file: so their sizes tell where each lies.

From there on the bytes are ours: a tensor waits for the chunks it lies in, and is made over our own mapping (or read),
so that it is aligned, keeps the lease, and comes before the rest of the file. What we cannot make, safetensors
makes, once the whole file is had.

A missing local file, a bad header, a name that is not there: the exceptions of safetensors. When a source cannot be
loaded, its WeightcacheError comes out as it is, here or from whichever call waits for the bytes: callers that answer
(OSError, SafetensorError) by trying a pickle instead must not do so because a network failed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, Self

import safetensors
import torch

from weightcache.core.layout import DTYPE_BITS, MAX_HEADER
from weightcache.runtime.device import Device, device_name, to_device
from weightcache.runtime.frameworks import TORCH, framework_named
from weightcache.runtime.opened import Opened, open_source
from weightcache.runtime.storage import Mapped, Read, Storage


class _Place(NamedTuple):
    """Where one tensor lies in the file, and what it is; ``dtype`` is the framework's own."""

    begin: int
    end: int
    dtype: Any
    shape: list[int]


def load_file(
    filename: str | os.PathLike[str], device: Device = "cpu", *, backend: str = "mmap", **options: Any
) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file or source, by name, in the order of their offsets.

    Like ``safetensors.torch.load_file``; arguments and errors are those of ``safe_open``.
    """
    with safe_open(filename, "pt", device, backend=backend, **options) as file:
        return file.get_tensors()


def load(data: bytes, **options: Any) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file given as its bytes, by name; they own copies of them.

    Like ``safetensors.torch.load``, which it is: bytes in memory come from no source. ``options`` are handed on.
    """
    from safetensors.torch import load as theirs

    return theirs(data, **options)


def load_model(
    model: torch.nn.Module,
    filename: str | os.PathLike[str],
    strict: bool = True,
    device: Device = "cpu",
    *,
    backend: str = "mmap",
    **options: Any,
) -> tuple[set[str], list[str]]:
    """Load a safetensors file or source into ``model``; of tensors that the model shares, one in the file is enough.

    Like ``safetensors.torch.load_model``. Returns the names of the model's tensors that the file lacks, and of the
    file's that the model lacks; with ``strict``, RuntimeError if there are any. A tensor that both have, in another
    shape, is torch's RuntimeError. Other arguments and errors are those of ``safe_open``.
    """
    from safetensors.torch import _remove_duplicate_names

    tensors = load_file(filename, device, backend=backend, **options)
    shared = _remove_duplicate_names(model.state_dict(), preferred_names=list(tensors))
    keys = model.load_state_dict(tensors, strict=False)
    missing, unexpected = set(keys.missing_keys), keys.unexpected_keys
    for others in shared.values():
        for name in others:
            if name in missing:
                missing.remove(name)
            else:
                unexpected.append(name)
    if strict and (missing or unexpected):
        error = f"Error(s) in loading state_dict for {type(model).__name__}:"
        for said, names in (("Missing", missing), ("Unexpected", unexpected)):
            if names:
                error += f"\n    {said} key(s) in state_dict: " + ", ".join(f'"{name}"' for name in sorted(names))
        raise RuntimeError(error)
    return missing, unexpected


class safe_open:
    """An open safetensors file or source. Like ``safetensors.safe_open``; safe to use from several threads.

    ``framework``: "pt", "np", or another that safetensors knows. ``device``: a torch.device will do, too. ``backend``:
    "mmap" gives CPU tensors over a private mapping, read lazily; "pread" gives each memory of its own. ``options`` are
    handed on to safetensors. What is taken from the handle may outlive it.

    Raises what safetensors raises of the same file, and WeightcacheError when a source cannot be loaded.
    """

    __slots__ = ("__weakref__", "_device", "_first", "_framework", "_real", "_starts", "_storage")

    _storage: Storage | None  # None: closed
    _starts: dict[str, int] | None  # the offset in the file of each tensor's bytes, once one is looked for

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        device: Device = "cpu",
        *,
        backend: str = "mmap",
        **options: Any,
    ) -> None:
        self._device = device_name(device)
        opened = open_source(filename)
        try:
            fd = _descriptor(opened)
            try:
                size = os.fstat(fd).st_size
                self._first, self._starts = _await_header(fd, size, opened), None
                # By descriptor: the file behind a path may be replaced, and both must mean the same one.
                path = f"/proc/self/fd/{fd}"
                self._real: Any = safetensors.safe_open(path, framework, self._device, backend=backend, **options)
                self._framework = framework_named(framework)
                self._storage = Mapped(fd, size, opened) if backend == "mmap" else Read(fd, size, opened)
            finally:
                os.close(fd)
        except BaseException:
            opened.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the handle. Tensors and slices taken from it remain good."""
        self._real.__exit__(exc_type, exc_value, traceback)
        self._storage = None

    def __getattr__(self, name: str) -> Any:
        """What a newer safetensors adds is its own, and finds the whole file."""
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._real, name)
        if self._storage is not None:
            self._storage.wait(0, self._storage.size)
        return found

    def keys(self) -> list[str]:
        """The tensors' names, sorted."""
        return self._real.keys()  # type: ignore[no-any-return]

    def offset_keys(self) -> list[str]:
        """The tensors' names, in the order of their offsets."""
        return self._real.offset_keys()  # type: ignore[no-any-return]

    def metadata(self) -> dict[str, str] | None:
        """The header's ``__metadata__``."""
        return self._real.metadata()  # type: ignore[no-any-return]

    def get_tensor(self, name: str) -> Any:
        """One tensor, as soon as its chunks are had."""
        storage, _, place = self._find(name)
        if place is None:
            storage.wait(0, storage.size)
            return self._real.get_tensor(name)
        return self._finish(self._make(storage, *place))

    def get_tensors(self) -> dict[str, Any]:
        """Every tensor by name, in the order of their offsets."""
        storage, tensors = self._storage, {}
        for name, kind, shape, span in _spans(self._real, self._first):  # nothing has to be looked up
            assert storage is not None  # it would have raised
            dtype = self._framework.dtypes.get(kind)
            if span is None or dtype is None:
                tensors[name] = self.get_tensor(name)
            else:
                tensors[name] = self._finish(self._make(storage, *span, dtype, shape))
        return tensors

    def get_slice(self, name: str) -> Slice:
        """One tensor, to be indexed; nothing is read or waited for yet."""
        storage, real, place = self._find(name)
        if place is not None and self._framework is TORCH and isinstance(storage, Mapped):
            return Slice(real, lambda index: self._finish(self._make(storage, *place)[index]))
        begin, end = (place.begin, place.end) if place is not None else (0, storage.size)

        def take(index: Any) -> Any:  # safetensors' own slicing, which is not quite that of numpy
            storage.wait(begin, end)
            return real[index]

        return Slice(real, take)

    def _find(self, name: str) -> tuple[Storage, Any, _Place | None]:
        """The storage, safetensors' own slice of ``name``, and its place; None: it is safetensors' to make.

        Raises unless the handle is open and the name is there.
        """
        storage = self._storage  # first: another thread may close the handle
        real = self._real.get_slice(name)
        assert storage is not None  # it would have raised
        if self._starts is None:
            # No more than that: taking one of 10,000 tensors must not make 10,000 objects of each.
            self._starts = {name: span[0] for name, _, _, span in _spans(self._real, self._first) if span}
        kind, start = real.get_dtype(), self._starts.get(name)
        dtype = self._framework.dtypes.get(kind)
        if dtype is None or start is None:
            return storage, real, None
        shape = real.get_shape()
        return storage, real, _Place(start, start + _length(kind, shape), dtype, shape)

    def _make(self, storage: Storage, begin: int, end: int, dtype: Any, shape: list[int]) -> Any:
        """The tensor of the bytes [begin, end), on the host."""
        if begin == end:
            return self._framework.empty(shape, dtype)
        buffer, offset = storage.take(begin, end, dtype.itemsize)
        return self._framework.over(buffer, offset, (end - begin) // dtype.itemsize, dtype, shape)

    def _finish(self, tensor: Any) -> Any:
        return tensor if self._device == "cpu" else to_device(tensor, self._device)


class Slice:
    """One tensor of an open file, read when it is indexed. It keeps the file's bytes, not the handle, open."""

    __slots__ = ("_real", "_take")

    def __init__(self, real: Any, take: Callable[[Any], Any]) -> None:
        self._real = real
        self._take = take

    def get_shape(self) -> list[int]:
        """The whole tensor's shape."""
        return self._real.get_shape()  # type: ignore[no-any-return]

    def get_dtype(self) -> str:
        """The tensor's dtype, as safetensors names it."""
        return self._real.get_dtype()  # type: ignore[no-any-return]

    def __getitem__(self, index: Any) -> Any:
        """The part that ``index`` names, once the tensor's chunks are had."""
        return self._take(index)


def _descriptor(opened: Opened) -> int:
    try:
        return os.open(opened.path, os.O_RDONLY)
    except (OSError, ValueError) as error:  # all one to safetensors, whose error this is
        raise FileNotFoundError(f"No such file or directory: {opened.path}") from error


def _await_header(fd: int, size: int, opened: Opened) -> int:
    """Wait for the header, and no more; the offset at which tensor data begins, if the header is good."""
    opened.wait(0, min(8, size))
    try:
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
    except IsADirectoryError:
        return 0  # safetensors has its own error for it
    if length <= MAX_HEADER:
        opened.wait(0, min(8 + length, size))
    return 8 + length


def _spans(real: Any, begin: int) -> Iterator[tuple[str, str, list[int], tuple[int, int] | None]]:
    """Each tensor's name, dtype, shape and bytes [begin, end) of the file, in their order; the first is at ``begin``.

    None from a dtype on that is newer than we are: where it ends is safetensors' to say.
    """
    known = True
    for name in real.offset_keys():
        entry = real.get_slice(name)
        kind, shape = entry.get_dtype(), entry.get_shape()
        known = known and kind in DTYPE_BITS
        end = begin + _length(kind, shape) if known else begin
        yield name, kind, shape, (begin, end) if known else None
        begin = end


def _length(kind: str, shape: list[int]) -> int:
    return DTYPE_BITS[kind] * math.prod(shape) // 8
