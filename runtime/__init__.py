"""weightcache.runtime: the loader of an inference worker, and the only home of torch.

``load_file``, ``safe_open``, ``load_model`` and ``load`` stand in for those of safetensors. They take a path or any
source (``s3://``, ``hf://``, ...), and give tensors over the cached file itself, each as soon as its bytes are there.
``snapshot_download`` stands in for that of huggingface_hub. ``install`` makes safetensors itself, and the
``from_pretrained`` of diffusers and transformers, take sources: their callers change nothing. ``stream_file`` and
``stream_snapshot`` give tensors on a device as they land, in memory of their own; each such load has a ``LoadReport``.
``load_pipeline`` gives a whole diffusers pipeline (``wait`` and ``report_of`` go with it), ``load_lora`` adds to one,
and ``swap`` makes another one of it in place. diffusers and transformers are imported when they are first needed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightcache.runtime.download import snapshot_download
    from weightcache.runtime.installing import install, installed, uninstall
    from weightcache.runtime.loaded import report_of, wait
    from weightcache.runtime.loader import load, load_file, load_model, safe_open
    from weightcache.runtime.lora import load_lora
    from weightcache.runtime.pipeline import load_pipeline
    from weightcache.runtime.report import LoadReport
    from weightcache.runtime.stream import stream_file, stream_snapshot
    from weightcache.runtime.swapping import swap

__all__ = [
    "LoadReport",
    "install",
    "installed",
    "load",
    "load_file",
    "load_lora",
    "load_model",
    "load_pipeline",
    "report_of",
    "safe_open",
    "snapshot_download",
    "stream_file",
    "stream_snapshot",
    "swap",
    "uninstall",
    "wait",
]

# Each is imported when it is first asked for: what is installed in every child process must not cost it torch.
_HOMES = {
    "install": "installing",
    "installed": "installing",
    "uninstall": "installing",
    "load": "loader",
    "load_file": "loader",
    "load_model": "loader",
    "safe_open": "loader",
    "snapshot_download": "download",
    "LoadReport": "report",
    "stream_file": "stream",
    "stream_snapshot": "stream",
    "load_lora": "lora",
    "load_pipeline": "pipeline",
    "report_of": "loaded",
    "swap": "swapping",
    "wait": "loaded",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


if os.environ.get("WEIGHTCACHE_INSTALL"):
    from weightcache.runtime.installing import install_as_told

    install_as_told()
