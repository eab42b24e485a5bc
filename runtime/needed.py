"""Which files of a repository a call will not read, so that they need not be brought.

Repositories hold the same weights several times: as safetensors and as pickles, in two precisions, for other
frameworks, and as one file beside a diffusers layout. What is decided here errs on the side of bringing too much: a
file is left out only when it is known that the library would choose another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from posixpath import basename, dirname
from typing import Any

SMALL = 1 << 20  # bytes: configurations, which may be looked for anywhere

_FOREIGN = (".msgpack", ".h5", ".ot", ".tflite", ".onnx", ".onnx_data", ".onnx.data", ".gguf")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# The names that libraries save weights under: what they belong to, variant, shard, format.
_NAME = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model|adapter_model)(?:\.(?P<variant>[A-Za-z0-9_]+))?"
    r"(?:-\d{5}-of-\d{5})?\.(?:(?P<format>safetensors|bin)|(?P<indexed>safetensors|bin)\.index(?:\.(?P<late>\w+))?\.json)"
)
# Words in the name of a module whose classes load no weights.
_WEIGHTLESS = ("tokenization", "configuration", "processing", "feature_extraction", "scheduling")


def superfluous(files: Mapping[str, int], module: str, owner: str, given: Mapping[str, Any]) -> list[str]:
    """The paths of ``files`` (with their sizes in bytes) that a call does not need.

    ``module``: where the method is defined; ``owner``: the name of the class it is called on; ``given``: the keywords.
    """
    out = set()
    subfolder = given.get("subfolder")
    subfolder = subfolder.strip("/") if isinstance(subfolder, str) else ""
    names = given.get("weight_name")
    wanted = {names} if isinstance(names, str) else set(names) if isinstance(names, list) else set()
    last = module.rpartition(".")[2]
    weightless = any(word in last for word in _WEIGHTLESS)
    for path, size in files.items():
        outside = subfolder and not path.startswith(f"{subfolder}/")
        unwanted = wanted and path.endswith(_WEIGHTS) and basename(path) not in wanted
        if size > SMALL and (outside or unwanted or (weightless and path.endswith(_WEIGHTS + _FOREIGN))):
            out.add(path)
    if not wanted and "gguf_file" not in given and not owner.startswith("Onnx"):
        out |= {path for path in files if path.endswith(_FOREIGN)}
        out |= _unchosen(files, given.get("variant"), given.get("use_safetensors"))
        out |= _merged(files)
    return sorted(out)


def _unchosen(paths: Iterable[str], variant: str | None, safetensors: bool | None) -> set[str]:
    """Weights of a format or variant that is not taken where another one lies beside it."""
    out = set()
    folders: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for path in paths:
        if found := _NAME.fullmatch(basename(path)):
            stem = found["stem"].replace("pytorch_model", "model")
            kind = found["variant"] or found["late"] or ""
            row = path, found["format"] or found["indexed"], kind
            folders.setdefault((dirname(path), stem), []).append(row)
    for rows in folders.values():
        kinds = {kind for _, _, kind in rows}
        kind = variant if variant in kinds else ""
        if kind in kinds:
            out |= {path for path, _, other in rows if other != kind}
        formats = {form for path, form, _ in rows if path not in out}
        taken = "bin" if safetensors is False else "safetensors"
        if taken in formats:
            out |= {path for path, form, _ in rows if form != taken}
    return out


def _merged(paths: Iterable[str]) -> set[str]:
    """Whole checkpoints at the top of what is laid out for a library already."""
    listed = list(paths)
    top = {path for path in listed if "/" not in path}
    if "model_index.json" in top:
        return {path for path in top if path.endswith(_WEIGHTS) and not _NAME.fullmatch(path)}
    if any(path.startswith("model") and path.endswith((".safetensors", ".safetensors.index.json")) for path in top):
        consolidated = {path for path in top if path.startswith("consolidated") and path.endswith(_WEIGHTS)}
        return consolidated | {path for path in listed if path.startswith("original/")}
    return set()
