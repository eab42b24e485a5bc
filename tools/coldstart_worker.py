"""A worker of a cold start: ``python -m weightcache.tools.coldstart_worker DEVICE`` loads what its input names.

In: ``{"source"}``. Out: ``{"began", "ended"}``, on the clock of time.monotonic, and ``"bytes"`` on the device.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from weightcache.client import SyncClient
from weightcache.runtime import load_file
from weightcache.runtime.device import target_of
from weightcache.tools.child import answer

_PAGE = 4096


def _files(source: str) -> list[str]:
    """The safetensors files of a source: itself, or those below it."""
    if source.endswith(".safetensors"):
        return [source]
    with SyncClient() as client:
        found = client.pull(source)  # the directory's names are known once it is linked
    return [str(path) for path in sorted(Path(found["path"]).rglob("*.safetensors"))]


def _load(source: str, device: str) -> dict[str, Any]:
    began, size = time.monotonic(), 0
    for file in _files(source):
        tensors = load_file(file, device=device)
        for tensor in tensors.values():
            size += tensor.nbytes
            if device == "cpu":  # mapped lazily: have every page read
                tensor.reshape(-1)[:: max(1, _PAGE // tensor.itemsize)].clone()
            else:
                last = tensor
        if device != "cpu" and tensors:
            last.flatten()[:1].cpu()  # what was sent before it has arrived
    return {"began": began, "ended": time.monotonic(), "bytes": size}


if __name__ == "__main__":
    target_of(sys.argv[1])  # what is no device is told before anything is measured
    answer(lambda job: _load(job["source"], sys.argv[1]))
