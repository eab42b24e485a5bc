"""Files to load: any header over any data, whole or still arriving."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weightcache.core.layout import DTYPE_BITS

DEADLINE = 30.0


def pack(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None = None, pad: int = 8) -> bytes:
    """A safetensors file of the tensors given as (dtype, shape), one after the other; their bytes differ throughout."""
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape) in tensors.items():
        length = DTYPE_BITS[dtype] * int(np.prod(shape, dtype=int)) // 8
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + length]}
        at += length
    data = np.random.default_rng(7).integers(0, 256, at, np.uint8)
    data[: at // 2] |= 1  # so that zeros, the bytes of what has not arrived, are rarely right
    return pack_raw(json.dumps(fields, ensure_ascii=False).encode(), data.tobytes(), pad)


def pack_raw(head: bytes, data: bytes, pad: int = 1) -> bytes:
    head += b" " * (-len(head) % pad)
    return len(head).to_bytes(8, "little") + head + data


def raw(tensor: Any) -> bytes:
    """A tensor's bytes, in order, whatever its dtype or framework."""
    if isinstance(tensor, np.ndarray):
        return tensor.tobytes()
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


class Arriving:
    """A file of full size whose bytes land when the test says so: an Opened as the client gives it."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = str(path)
        self.data = data
        self.closed = 0
        self.changed = threading.Condition()
        self.blocked: tuple[int, int] | None = None  # the bytes somebody waits for
        self._had = bytearray(len(data))
        self._error: Exception | None = None
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, len(data))
        path.chmod(0o444)

    def wait(self, begin: int, end: int) -> None:
        assert 0 <= begin <= end <= len(self.data)
        with self.changed:
            if not self._error and not all(self._had[begin:end]):  # or another's wait would seem to be over
                self.blocked = (begin, end)
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: self._error or all(self._had[begin:end]), DEADLINE), "no bytes"
                self.blocked = None
            if self._error and not all(self._had[begin:end]):
                raise self._error

    def close(self) -> None:
        self.closed += 1

    def land(self, begin: int, end: int) -> None:
        with open(os.open(self.path, os.O_WRONLY), "wb") as file:
            file.seek(begin)
            file.write(self.data[begin:end])
        self.landed(begin, end)

    def landed(self, begin: int, end: int) -> None:
        with self.changed:
            self._had[begin:end] = b"\1" * (end - begin)
            self.changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self.changed:
            self._error = error
            self.changed.notify_all()

    def wake(self) -> None:
        """Have ``until`` look again."""
        with self.changed:
            self.changed.notify_all()

    def until(self, true: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(true, DEADLINE)


class Background:
    """A call on a thread, and what became of it. ``ended`` is told of its end."""

    def __init__(self, call: Callable[[], Any], ended: Callable[[], object] = lambda: None) -> None:
        self._future: Future[Any] = Future()
        self._call = call
        self._future.add_done_callback(lambda _: ended())
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._future.set_result(self._call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            self._future.set_exception(error)

    @property
    def waits(self) -> bool:
        return not self._future.done()

    def get(self) -> Any:
        return self._future.result(DEADLINE)
