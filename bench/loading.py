"""``python -m bench.loading WAY FOLDER``: load pipelines, one a line of stdin, and say as JSON what each took.

A process is to load one that counts; the tiny one before it (a line, too) takes imports and first uses out of the way.
A line is a directory, a dtype, and ``time``, ``memory`` or ``output``: what is measured. Time and memory exclude each
other, since sampling costs CPU.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.beyond import anonymous
from weightcache.runtime import load_pipeline
from weightcache.runtime.emulated import Emulated

SAMPLE_SECONDS = 0.002


def from_pretrained(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(folder), dtype=dtype)


WAYS: dict[str, Callable[[Path, torch.dtype], Any]] = {
    "from_pretrained": from_pretrained,
    "mapped": lambda folder, dtype: load_pipeline(folder, dtype=dtype),
    "own": lambda folder, dtype: load_pipeline(folder, dtype=dtype, mapped=False),
    "ring": lambda folder, dtype: load_pipeline(folder, dtype=dtype, device=Emulated()),
}


def weights(pipe: Any) -> Iterator[torch.Tensor]:
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            yield from component.state_dict().values()


def read(tensors: Iterator[torch.Tensor]) -> None:
    """Every byte."""
    for tensor in tensors:
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        whole = flat.nbytes // 8 * 8
        np.bitwise_xor.reduce(flat[:whole].view(np.int64))
        np.bitwise_xor.reduce(flat[whole:])


def step(pipe: Any) -> str:
    """A digest of what each component makes of the same input."""
    draw = torch.Generator().manual_seed(0)
    size = pipe.unet.config.sample_size // 8
    latents = torch.randn(1, 4, size, size, generator=draw).to(pipe.unet.dtype)
    with torch.no_grad():
        text = pipe.text_encoder(torch.arange(77)[None] % 54)[0]
        noise = pipe.unet(latents, 10, text, return_dict=False)[0]
        image = pipe.vae.decode(latents, return_dict=False)[0]
    found = hashlib.sha256()
    for output in (text, noise, image):
        assert output.isfinite().all()
        found.update(output.contiguous().numpy().tobytes())
    return found.hexdigest()


class Most:
    """The most anonymous memory meanwhile, in bytes more than before."""

    def __init__(self) -> None:
        self._before = anonymous()
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, anonymous() - self._before)

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self.bytes


def measure(way: str, folder: Path, dtype: torch.dtype, what: str) -> dict[str, Any]:
    gc.collect()  # all start with as much to collect: in the middle of a load it takes longer than the load
    most = Most() if what == "memory" else None
    began = time.perf_counter()
    pipe = WAYS[way](folder, dtype)
    returned = time.perf_counter() - began
    read(weights(pipe))
    found: dict[str, Any] = {"returned": returned, "read": time.perf_counter() - began}
    if most is not None:
        found["held"] = most.end()
        found["weights"] = sum(tensor.nbytes for tensor in weights(pipe))
    if what == "output":
        found["output"] = step(pipe)
    return found


def main(way: str) -> None:
    for line in sys.stdin:
        folder, dtype, what = json.loads(line)
        print(json.dumps(measure(way, Path(folder), getattr(torch, dtype), what)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
