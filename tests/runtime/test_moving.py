"""Tensors that are there already get a file's bytes, cast on their device, by way of little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.beyond import anonymous
from weightcache.runtime import LoadReport, moving
from weightcache.runtime.checkpoint import stored_tensors
from weightcache.runtime.device import Host, Target
from weightcache.runtime.emulated import Emulated
from weightcache.runtime.moving import Moving
from weightcache.runtime.opened import LocalFile
from weightcache.runtime.streamer import Streamer

ALLOWED = 64_000_000  # bytes beyond the ring


def moved(path: Path, tensors: dict[str, torch.Tensor], device: Target) -> tuple[LoadReport, int]:
    """Give the tensors the file's bytes; the report, and how much more memory than before there was at most."""
    report = LoadReport()
    work = Moving(report)
    stored = stored_tensors({"x": LocalFile(str(path))}, ["x"])
    pieces = (piece for name, tensor in tensors.items() for piece in work.pieces(stored[name], tensor))
    before = most = anonymous()
    whole = 0
    with Streamer(device, report=report) as streamer:
        for index in streamer.copy(pieces):
            most = max(most, anonymous())
            whole += work.arrived(index)
    assert whole == len(tensors)
    return report, most - before


@pytest.mark.parametrize("device", [Host(), Emulated(checked=True), Emulated(checked=True, readers=8)])
def test_a_cast_in_parts_is_that_of_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Target) -> None:
    monkeypatch.setattr(moving, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(moving, "CUT", 100)
    kinds = {"half": torch.float16, "brain": torch.bfloat16, "double": torch.float64, "float": torch.float32}
    shapes: dict[str, list[int]] = {"large": [37, 1001], "part": [2048], "small": [3], "scalar": [], "none": [0, 4]}
    given = {f"{kind} {name}": torch.randn(shape).to(kinds[kind]) for kind in kinds for name, shape in shapes.items()}
    given["image"] = torch.randn(8, 6, 17, 5).half()
    save_file(given, tmp_path / "x")
    into = {name: torch.full_like(tensor, 7, dtype=torch.float32) for name, tensor in given.items()}
    into["image"] = into["image"].contiguous(memory_format=torch.channels_last)
    report, _ = moved(tmp_path / "x", into, device)
    for name, tensor in given.items():
        assert torch.equal(into[name], tensor.float()), name
    assert into["image"].is_contiguous(memory_format=torch.channels_last)
    assert (report.tensors, report.size) == (len(given), sum(tensor.nbytes for tensor in given.values()))


def test_the_largest_tensor_takes_no_more_memory_than_any(tmp_path: Path) -> None:
    given = torch.arange(60_000_000, dtype=torch.float32).half()
    save_file({"embedding": given}, tmp_path / "x")
    into = torch.ones(given.shape)
    device = Emulated()
    _, held = moved(tmp_path / "x", {"embedding": into}, device)
    device.close()
    assert torch.equal(into, given.float())
    ring = 2 * device.readers * moving.BUFFER_BYTES
    assert held < ring + ALLOWED
