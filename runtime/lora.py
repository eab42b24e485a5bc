"""``load_lora``: a LoRA through the cache, by diffusers' own ``load_lora_weights``."""

from __future__ import annotations

import os
from typing import Any

from weightcache.openfile import open_snapshot
from weightcache.runtime.assembly import await_files, is_heavy, readable
from weightcache.runtime.report import LoadReport


def load_lora(
    pipe: Any,
    source: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    weight_name: str | None = None,
    **options: Any,
) -> LoadReport:
    """Like ``pipe.load_lora_weights(source, adapter_name=..., weight_name=..., **options)``, for any source.

    ``source``: one file, or a snapshot that holds it. Small files go ahead of large loads that are under way. Raises
    WeightcacheError when the source cannot be loaded, and what diffusers raises.
    """
    report = LoadReport(str(source))
    with open_snapshot(source) as snapshot:
        heavy = [file.name for file in snapshot.files if is_heavy(file.name)]
        if weight_name is None and len(heavy) == 1:
            weight_name = heavy[0]
        with report.stage("wait"):
            await_files(file for file in snapshot.files if weight_name in (None, file.name) or file.name not in heavy)
        with readable(snapshot) as folder, report.stage("build"):
            pipe.load_lora_weights(str(folder), weight_name=weight_name, adapter_name=adapter_name, **options)
        for file in snapshot.files:
            if file.name == weight_name:
                report.landed(file.size)
        report.came(snapshot.report())
    report.finish()
    return report
