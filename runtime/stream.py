"""``stream_file`` and ``stream_snapshot``: tensors on the device, one after the other, as their bytes arrive.

Memory is bounded whatever the model's size: a ring of pinned buffers, and on the device what was handed out and the
few tensors that are next. A tensor is made of a part of a *slab*: bytes of the device's memory that small tensors share
and a large one has to itself, each at an offset that is good for every dtype, wherever it lay in the file. It keeps
its slab, and nothing else.
"""

from __future__ import annotations

import errno
import fnmatch
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from safetensors import SafetensorError

from weightcache.core.components import rank
from weightcache.core.layout import MAX_HEADER, Header, Tensor, check_cover, parse_header
from weightcache.errors import FormatError
from weightcache.openfile import OpenFile, OpenSnapshot, open_snapshot
from weightcache.runtime.device import DeviceName, Target, target_of
from weightcache.runtime.frameworks import TORCH
from weightcache.runtime.opened import Opened, open_source
from weightcache.runtime.report import LoadReport
from weightcache.runtime.streamer import Piece, Streamer

SLAB = 16 << 20  # bytes that small tensors share: a tensor that is kept keeps no more than this
SHARING = SLAB // 4  # larger tensors have memory of their own
ALIGN = 256  # bytes: good for every dtype, and for the vector instructions that kernels choose by it
REPORT_SECONDS = 5.0  # that a load which is over here is waited for to be over in the daemon

Item = TypeVar("Item")


class TensorStream(Iterator[Item], Generic[Item]):
    """An iterator over what lands, with the load's ``report``. ``close`` (or the end of a ``with``) ends it early."""

    def __init__(self, items: Iterator[Item], report: LoadReport, close: Callable[[], object]) -> None:
        self.report = report
        self._items = items
        self._close = close

    def __next__(self) -> Item:
        try:
            return next(self._items)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and give up files and leases. What was handed out remains good."""
        self._close()
        self.report.finish()


def stream_file(
    source: str | os.PathLike[str],
    *,
    device: DeviceName | Target = "cpu",
    dtype: torch.dtype | None = None,
    names: Iterable[str] | None = None,
) -> TensorStream[tuple[str, torch.Tensor]]:
    """(name, tensor) of a safetensors file or source, each as soon as it is on ``device``; it owns its memory.

    ``names``: which, and in what order; by default all, in the file's. ``dtype``: what floating tensors are cast to, on
    the device. Returns once the header is had.

    Raises, here or from whichever item waits for the bytes, what ``load_file`` does; FormatError when the file is cut
    short meanwhile; and what the device raises.
    """
    target = target_of(device)
    report = LoadReport(os.fspath(source), str(target.name))
    opened = open_source(source)
    try:
        held = _Held(opened)
    except BaseException:
        opened.close()
        raise
    try:
        tensors = _chosen(held.header, names)
    except BaseException:
        held.close()
        raise

    def items() -> Iterator[tuple[str, torch.Tensor]]:
        with Streamer(target, report=report) as streamer:
            for tensor, made in _made(held, tensors, streamer, dtype):
                yield tensor.name, made
        report.came(_daemon_report(opened))

    streaming = items()
    return TensorStream(streaming, report, _closing(streaming, held.close))


def stream_snapshot(
    source: str | os.PathLike[str],
    *,
    device: DeviceName | Target = "cpu",
    dtype: torch.dtype | None = None,
    files: str | Sequence[str] | None = None,
) -> TensorStream[tuple[str, str, torch.Tensor]]:
    """(file's path, name, tensor) of all safetensors files of a source or directory, as ``stream_file`` does of one.

    Files come in the order in which a pipeline needs them: text encoders, denoiser, VAE. ``files``: paths or patterns
    (``unet/*``), which are taken in this order instead.
    """
    target = target_of(device)
    report = LoadReport(os.fspath(source), str(target.name))
    snapshot = open_snapshot(source)
    try:
        chosen = _files(snapshot, files)
    except BaseException:
        snapshot.close()
        raise

    def items() -> Iterator[tuple[str, str, torch.Tensor]]:
        with Streamer(target, report=report) as streamer:
            for file in chosen:
                with _Held(file, keep=True) as held:
                    for tensor, made in _made(held, held.header.tensors, streamer, dtype):
                        yield file.name, tensor.name, made
        whole = len(chosen) == len(snapshot.files)  # else the rest may take as long as it likes
        report.came(snapshot.report(REPORT_SECONDS if whole else 0.0))

    streaming = items()
    return TensorStream(streaming, report, _closing(streaming, snapshot.close))


def _closing(items: Iterator[object], release: Callable[[], None]) -> Callable[[], None]:
    """Ends a generator first, since it may use what is then released; once."""
    left = [items]

    def close() -> None:
        if left:
            left.pop().close()  # type: ignore[attr-defined]
            release()

    return close


def _daemon_report(opened: Opened) -> dict[str, object] | None:
    return opened.load_report(REPORT_SECONDS) if isinstance(opened, OpenFile) else None


class _Held:
    """A file that is open, so that whatever happens to its name it stays the same one; its header is had, and good.

    Owns the lease, unless ``keep`` leaves it to another.
    """

    def __init__(self, opened: Opened, *, keep: bool = False) -> None:
        self._opened = opened
        self._keep = keep
        self.wait = opened.wait
        try:
            self._fd = os.open(opened.path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"No such file or directory: {opened.path}") from error
        self.path = f"/proc/self/fd/{self._fd}"
        try:
            self.header = self._header()
        except IsADirectoryError:
            os.close(self._fd)
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), opened.path) from None  # as safetensors has it
        except FormatError as error:
            os.close(self._fd)
            raise SafetensorError(f"Error while deserializing header: {error}") from error
        except BaseException:
            os.close(self._fd)
            raise

    def _header(self) -> Header:
        size = os.fstat(self._fd).st_size
        self.wait(0, min(8, size))
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        end = min(8 + length, size) if length <= MAX_HEADER else 8
        self.wait(0, end)
        header = parse_header(os.pread(self._fd, end, 0))
        check_cover(header, size)
        return header

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)
        if not self._keep:
            self._opened.close()


def _chosen(header: Header, names: Iterable[str] | None) -> Sequence[Tensor]:
    if names is None:
        return header.tensors
    known = {tensor.name: tensor for tensor in header.tensors}
    try:
        return [known[name] for name in names]
    except KeyError as error:
        raise SafetensorError(f"File does not contain tensor {error.args[0]}") from None


def _files(snapshot: OpenSnapshot, files: str | Sequence[str] | None) -> list[OpenFile]:
    weights = [file for file in snapshot.files if file.name.endswith(".safetensors")]
    if files is None:
        if not weights:
            raise FileNotFoundError(f"{snapshot.directory}: no safetensors file in it")
        return sorted(weights, key=lambda file: (rank(file.name, file.size), file.name))
    chosen: dict[str, OpenFile] = {}
    for pattern in [files] if isinstance(files, str) else files:
        found = {file.name: file for file in weights if fnmatch.fnmatchcase(file.name, pattern)}
        if not found:
            raise FileNotFoundError(f"{pattern}: no safetensors file of that name in {snapshot.directory}")
        chosen |= {name: file for name, file in found.items() if name not in chosen}
    return list(chosen.values())


def _made(
    file: Opened, tensors: Iterable[Tensor], streamer: Streamer, dtype: torch.dtype | None
) -> Iterator[tuple[Tensor, torch.Tensor]]:
    """The tensors of one file, in order, on the streamer's device."""
    coming: deque[tuple[Tensor, torch.Tensor]] = deque()
    slabs = Slabs(streamer.device)

    def pieces() -> Iterator[Piece]:
        for tensor in tensors:
            memory = slabs.take(tensor.end - tensor.begin)
            coming.append((tensor, memory))
            yield Piece(file, tensor.begin, tensor.end, memory)

    for _ in streamer.copy(pieces()):
        tensor, memory = coming.popleft()
        made = viewed(memory, tensor.dtype, tensor.shape)
        del memory  # or it would outlive the one it is cast to
        if dtype is not None and castable(made) and made.dtype != dtype:
            with streamer.report.stage("cast", made.nbytes):
                made = made.to(dtype)
        streamer.report.landed(made.nbytes)
        yield tensor, made
        del made


def viewed(memory: torch.Tensor, kind: str, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of a safetensors dtype over bytes; those of four bits come in pairs, as safetensors gives them."""
    if kind == "F4":
        if not shape or shape[-1] % 2:
            raise SafetensorError(
                f"f4_x2 dtype requires that the last dim be divisible by 2 in torch: got {list(shape)}"
            )
        return memory.view(torch.float4_e2m1fn_x2).reshape(*shape[:-1], shape[-1] // 2)
    dtype = TORCH.dtypes.get(kind)
    if dtype is None:
        raise SafetensorError(f"Dtype not understood: {kind}")
    return memory.view(dtype).reshape(tuple(shape))


def castable(tensor: torch.Tensor) -> bool:
    """Whether ``dtype=`` concerns it: torch has no conversions for packed ones."""
    return tensor.is_floating_point() and tensor.dtype != torch.float4_e2m1fn_x2


class Slabs:
    """Memory of a device for tensors, in the order in which they come."""

    def __init__(self, device: Target) -> None:
        self._device = device
        self._slab = device.allocate(0)
        self._at = 0

    def take(self, size: int) -> torch.Tensor:
        """``size`` bytes at an offset that is a multiple of ALIGN within memory that is aligned itself."""
        if size > SHARING:
            return self._device.allocate(size)
        if self._at + size > len(self._slab):
            self._slab, self._at = self._device.allocate(SLAB), 0
        taken = self._slab[self._at : self._at + size]
        self._at += size + -size % ALIGN
        return taken
