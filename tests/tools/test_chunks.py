"""A local file's chunks are those that the daemon would cut, and what two files share is counted by id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.tools.conftest import Cli, answer
from weightcache.core.ids import chunk_id
from weightcache.core.layout import CHUNK, parse_header, plan
from weightcache.errors import FormatError, SourceNotFound
from weightcache.tools.chunks import describe, shared

MIB = 1 << 20


def tensors(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    sizes = {"big": 20 * MIB, "small": 100, "tiny": 1, "empty": 0, "mid": 2 * MIB}
    return {name: random.integers(0, 255, size, dtype=np.uint8) for name, size in sizes.items()}


def test_chunks_are_those_of_the_plan_with_their_ids_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(1), path)
    data = path.read_bytes()
    header = parse_header(data)
    found = describe(path)
    assert [(chunk["offset"], chunk["length"]) for chunk in found["chunks"]] == list(plan(len(data), header))
    for chunk in found["chunks"]:
        assert chunk["id"] == chunk_id(data[chunk["offset"] : chunk["offset"] + chunk["length"]]).hex()
    begins = {tensor.name: tensor.begin for tensor in header.tensors}
    for name, begin in begins.items():
        (where,) = [chunk for chunk in found["chunks"] if name in chunk["tensors"]]
        assert where["offset"] <= begin <= where["offset"] + where["length"]


def test_a_file_that_is_no_safetensors_has_chunks_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(CHUNK + MIB))
    assert [chunk["length"] for chunk in describe(tmp_path / "x")["chunks"]] == [CHUNK, MIB]
    assert "tensors" not in describe(tmp_path / "x")["chunks"][0]
    (tmp_path / "x").write_bytes(b"")
    assert describe(tmp_path / "x")["chunks"] == []
    with pytest.raises(SourceNotFound, match="no such file"):
        describe(tmp_path / "y")
    with pytest.raises(FormatError, match="directory"):
        describe(tmp_path)


def test_a_fine_tune_shares_what_it_did_not_change(cli: Cli, tmp_path: Path) -> None:
    base, tuned = tensors(1), tensors(1)
    tuned["big"][-1] ^= 1
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned | {"added": np.ones(3 * MIB, np.uint8)}, tmp_path / "tuned.safetensors")
    common = answer(cli("manifest", str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors"), "--json"))
    assert common["bytes"] >= 16 * MIB + 2 * MIB
    assert common["bytes"] < common["of_bytes"] - 3 * MIB
    assert common["unknown"] == [0, 0]


def test_ids_that_nobody_knows_yet_match_nothing() -> None:
    here = [{"chunks": [{"length": 5, "id": None}, {"length": 7, "id": "ab"}]}]
    there = [{"chunks": [{"length": 5, "id": None}, {"length": 7, "id": "ab"}, {"length": 1, "id": "cd"}]}]
    assert shared(here, there) == {"chunks": 1, "bytes": 7, "of_chunks": 2, "of_bytes": 12, "unknown": [1, 1]}
