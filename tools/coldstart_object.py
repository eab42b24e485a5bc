"""An object to load: a checkpoint in safetensors, with the names, shapes and sizes that Stable Diffusion's have."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

_PIECE = 1 << 16
# Components in the order of their use, with their share of the bytes. A layer: matrices, and small things beside them.
_COMPONENTS = (("cond_stage_model.transformer", 0.12), ("model.diffusion_model", 0.80), ("first_stage_model", 0.08))
_LAYER = (
    ("attn.to_q.weight", (1280, 1280)),
    ("attn.to_k.weight", (1280, 1024)),
    ("attn.to_v.weight", (1280, 1024)),
    ("attn.to_out.bias", (1280,)),
    ("ff.proj.weight", (5120, 1280)),
    ("conv.weight", (1280, 640, 3, 3)),
    ("norm.weight", (1280,)),
    ("norm.bias", (1280,)),
)

Tensors = Iterator[tuple[str, tuple[int, ...]]]


def write_object(path: Path, size: int) -> None:
    """A checkpoint of about ``size`` bytes (within 1%), all of whose chunks differ."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in _tensors(size):
        length = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (at, at + length)}
        at += length
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    draw = random.Random(size)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        block = bytearray(draw.randbytes(_PIECE))
        for number, left in enumerate(range(at, 0, -_PIECE)):
            block[:8] = (number << 20 | 0x3555).to_bytes(8, "little")
            file.write(block[:left])


def _tensors(size: int) -> Tensors:
    """Layers as long as there is room for them, then what fills the component up."""
    for component, share in _COMPONENTS:
        left = int(size * share)
        for layer, (name, shape) in itertools.product(range(1 << 20), _LAYER):
            length = 2 * math.prod(shape)
            if length > left:
                yield f"{component}.head.weight", (max(1, left // 2560), 1280) if left >= 2560 else (max(1, left // 2),)
                break
            left -= length
            yield f"{component}.layers.{layer}.{name}", shape
