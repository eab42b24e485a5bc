"""An inference worker of the demo: loads what a line of its input says, and compares it with the original.

In: ``{"source", "original"}``. Out: ``{"seconds", "tensors", "different"}``. It talks to the daemon that its
environment names, as any worker does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from weightcache.runtime import load_file
from weightcache.tools.child import answer

_PAGE = 4096


def differences(loaded: Mapping[str, Any], original: Path) -> list[str]:
    """The tensors that differ, in any byte, shape or dtype, from what safetensors itself reads of ``original``."""
    with safe_open(original, framework="np") as file:
        names = set(file.keys())
        wrong = names ^ loaded.keys()
        for name in names & loaded.keys():
            ours, theirs = loaded[name].numpy(), file.get_tensor(name)
            same = ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
            if not same:
                wrong.add(name)
    return sorted(wrong)


def _load(source: str, original: Path) -> dict[str, Any]:
    began = time.perf_counter()
    tensors = load_file(source)
    for tensor in tensors.values():
        tensor.numpy().reshape(-1).view("u1")[::_PAGE].sum()  # tensors are mapped lazily: have every page read
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tensors": len(tensors), "different": differences(tensors, original)}


if __name__ == "__main__":
    answer(lambda job: _load(job["source"], Path(job["original"])))
