"""How torch and numpy make a tensor over a buffer, without copying it.

Only what they can hold is here. Every other dtype (the sub-byte ones among them) and every other framework is left to
safetensors itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Framework:
    """One framework's way with buffers.

    ``dtypes``: by safetensors' name, each with an ``itemsize`` in bytes. ``over(buffer, offset, count, dtype, shape)``:
    a tensor of ``count`` > 0 elements that keeps the buffer alive. ``empty(shape, dtype)``: one without elements.
    """

    dtypes: Mapping[str, Any]
    over: Callable[[Any, int, int, Any, list[int]], Any]
    empty: Callable[[list[int], Any], Any]


def _torch_over(buffer: Any, offset: int, count: int, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    # As few arguments as will do, and no list: with 10,000 tensors a file, parsing them is a tenth of its load.
    if not offset and len(buffer) == count * dtype.itemsize:
        flat = torch.frombuffer(buffer, dtype=dtype)
    else:
        flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
    return flat.view(*shape) if shape else flat.view(())


_BOTH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16", "I32": "int32",
    "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_TORCH_ONLY = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip

TORCH = Framework(
    # A torch that lacks one of them leaves it to safetensors.
    {key: getattr(torch, name) for key, name in (_BOTH | _TORCH_ONLY).items() if hasattr(torch, name)},
    _torch_over,
    lambda shape, dtype: torch.empty(shape, dtype=dtype, device="cpu"),  # whatever default device is in force
)
NUMPY = Framework(
    {key: np.dtype(name) for key, name in _BOTH.items()},
    lambda buffer, offset, count, dtype, shape: np.frombuffer(buffer, dtype, count, offset).reshape(shape),
    lambda shape, dtype: np.empty(shape, dtype),
)
OTHER = Framework({}, TORCH.over, TORCH.empty)  # holds no dtype: safetensors makes all of its tensors

_NAMED = {"pt": TORCH, "torch": TORCH, "pytorch": TORCH, "np": NUMPY, "numpy": NUMPY}


def framework_named(name: str) -> Framework:
    """The framework of one of safetensors' names for it; OTHER for those it must serve itself."""
    return _NAMED.get(name, OTHER)
