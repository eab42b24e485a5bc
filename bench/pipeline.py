"""``load_pipeline`` beside ``DiffusionPipeline.from_pretrained``, from a local directory that is in the page cache.

Every turn is a process of its own that has loaded a tiny pipeline before, so that imports and first uses are out of the
way. They take turns, and medians are given; the outputs of the first turns are compared, after their time was taken.
Reading every byte afterwards is part of it: a mapping that nobody has touched is no weights.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from bench import sd15
from bench.run import Run
from bench.standing import Standing
from bench.table import Column, Row, Table, at_least, at_most

ABOUT = (
    "From the call until the pipeline is returned, and until every byte of its weights is read. 'beyond': anonymous "
    "memory at most, less the weights' own where they are not the file's pages. The output: a step of each component."
)
COLUMNS = (
    Column("returned", "returned, s", "{:.3f}"),
    Column("read", "all read, s", "{:.3f}", bars=True),
    Column("beyond", "MB beyond\nweights", "{:.0f}"),
)
THEIRS = "from_pretrained"
WAYS = {THEIRS: THEIRS, "load_pipeline": "mapped", "load_pipeline, mapped=False": "own", "load_pipeline, ring": "ring"}
COMPARED = (THEIRS, WAYS["load_pipeline"])
DTYPES = {"float16": "as stored", "float32": "cast to float32"}
ALLOWED = 64 + 64  # MB


def turn(way: str, folder: Path, dtype: str, what: str) -> dict[str, Any]:
    """One process' load."""
    with Standing("bench.loading", way) as worker:
        worker.ask(json.dumps([str(folder / "tiny"), dtype, "time"]))
        found: dict[str, Any] = json.loads(worker.ask(json.dumps([str(folder / "model"), dtype, what])))
    return found


def pipeline(run: Run) -> Table:
    """Both dtypes, every way."""
    size = sd15.write_pipeline(run.folder / "model", small=run.quick)
    sd15.write_pipeline(run.folder / "tiny", tiny=True)
    title = f"a pipeline shaped as SD 1.5, {size / 1e6:.0f} MB of float16, to the CPU"
    table = Table("pipeline", title, ABOUT, COLUMNS, facts={"rounds": run.rounds})
    for dtype, label in DTYPES.items():
        memory = {way: turn(way, run.folder, dtype, "memory") for way in WAYS.values()}
        first = {way: turn(way, run.folder, dtype, "output") for way in WAYS.values()}
        turns = [first, *(_again(run.folder, dtype, seldom=bool(number % 2)) for number in range(1, run.rounds))]
        for name, way in WAYS.items():
            mine = [found[way] for found in turns if way in found]
            values = {key: statistics.median(found[key] for found in mine) for key in ("returned", "read")}
            values["beyond"] = _beyond(memory[way], size) / 1e6
            values["same"] = first[way]["output"] == first[THEIRS]["output"]
            table.rows.append(Row(f"{name}, {label}", values))
            if way == THEIRS:
                continue
            table.expect(at_least(1, f"same output: {table.rows[-1].name}"), table.rows[-1].name, "same")
            table.expect(at_most(ALLOWED, f"MB beyond: {table.rows[-1].name}"), table.rows[-1].name, "beyond")
        for key in ("returned", "read"):
            ours, theirs = f"load_pipeline, {label}", f"{THEIRS}, {label}"
            table.expect(at_most(1, f"of {THEIRS}'s seconds, {key}, {label}"), ours, key, theirs)
    return table


def _again(folder: Path, dtype: str, *, seldom: bool) -> dict[str, dict[str, Any]]:
    """One round more; what nothing is compared with takes part in every other one."""
    return {way: turn(way, folder, dtype, "time") for way in WAYS.values() if way in COMPARED or not seldom}


def _beyond(found: dict[str, Any], stored: int) -> float:
    """Weights are either all the files' pages (the other tensors are small) or all the process' own."""
    held, weights = found["held"], found["weights"]
    own = held > stored / 2
    return float(held - weights if own else held)
