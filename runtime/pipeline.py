"""``load_pipeline``: a diffusers pipeline whose modules are built at once and get their weights as they arrive.

Theory of operation. The snapshot's small files come first. With them every module that is plain (see ``skeleton``) is
built around tensors still to come. Then diffusers' own ``from_pretrained`` is given these modules as components: it
makes everything else (tokenizers, schedulers, what must be None, what is optional) and puts the pipeline together.
A module that is not plain it loads itself, from the real path, and the report says why. Meanwhile a thread brings the
bytes (see ``bringing``); until a module has its own, whoever uses it waits (see ``gates``).
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from weightcache.core.components import rank
from weightcache.errors import WeightcacheError
from weightcache.openfile import OpenFile, OpenSnapshot, open_snapshot
from weightcache.runtime.assembly import await_files, is_heavy, readable, rename, uncollected, unquestioned
from weightcache.runtime.bringing import Bringing
from weightcache.runtime.checkpoint import NotPlain, read_whole, stored_tensors, weight_files
from weightcache.runtime.device import DeviceName, Target, target_of
from weightcache.runtime.loaded import Held, Loaded, remember
from weightcache.runtime.places import Arriving, DeviceMemory, FilePages, arrivals
from weightcache.runtime.report import LoadReport
from weightcache.runtime.skeleton import build, stem_of

Dtype = torch.dtype | dict[str, torch.dtype] | None

INDEX = "model_index.json"
LARGE = 1 << 62  # bytes: what a component's place in the order goes by is its name
# Options of from_pretrained that change nothing about how a plain module of a local directory is loaded.
_HARMLESS = {
    *("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "mirror"),
    *("disable_mmap", "output_loading_info"),
}
_PLAIN_VALUES = {"low_cpu_mem_usage": (True,), "use_safetensors": (None, True)}


def load_pipeline(
    source: str | os.PathLike[str],
    *,
    device: DeviceName | Target = "cpu",
    dtype: Dtype = None,
    variant: str | None = None,
    overlap: bool = False,
    mapped: bool = True,
    cls: Any = None,
    report: LoadReport | None = None,
    **options: Any,
) -> Any:
    """What ``DiffusionPipeline.from_pretrained(path, dtype=dtype, variant=variant, **options).to(device)`` gives.

    ``source``: a snapshot (``hf://``, a prefix) or a local directory, with a model_index.json. ``cls``: whose
    ``from_pretrained`` is meant, if not DiffusionPipeline's. ``overlap``: return as soon as the modules are built; each
    waits for its own weights when it is first used, and ``wait(pipe)`` for all. ``mapped``: on the CPU, weights in
    the files' dtype are the files' own pages, read when touched; False: memory of their own. ``report`` is filled.

    Raises WeightcacheError when the source cannot be loaded (with ``overlap``: also where a module is used), and
    whatever ``from_pretrained`` raises.
    """
    target = target_of(device)
    report = report or LoadReport(str(source), str(target.name))
    loading = _Loading(open_snapshot(source), str(source), target, mapped, report)
    try:
        with report.stage("build"), uncollected():
            pipe = loading.pipeline(cls, dtype, variant, options)
        if not overlap:
            loading.bringing.wait()
    except BaseException:
        loading.bringing.end()
        raise
    return pipe


class _Loading:
    """One call of ``load_pipeline``."""

    def __init__(self, snapshot: OpenSnapshot, source: str, target: Target, mapped: bool, report: LoadReport) -> None:
        self._snapshot = snapshot
        self._source = source
        self._target = target
        self._report = report
        self._files = {file.name: file for file in snapshot.files}
        pages = FilePages() if mapped and target.name.type == "cpu" and not target.staged else None
        self._place = pages or DeviceMemory(target.name)
        self._held: dict[str, dict[str, Held]] = {}
        self.bringing = Bringing(snapshot, target, pages, report)

    def pipeline(self, cls: Any, dtype: Dtype, variant: str | None, options: dict[str, Any]) -> Any:
        """The pipeline, whose modules wait for their weights."""
        import diffusers

        cls = cls or diffusers.DiffusionPipeline
        await_files(file for file in self._snapshot.files if not is_heavy(file.name))
        with readable(self._snapshot) as folder:
            modules = self._modules(folder, cls, dtype, variant, options)
            self.bringing.start()
            if variant is not None:
                options = options | {"variant": variant}
            with unquestioned():
                pipe = cls.from_pretrained(str(folder), **{_dtype_option(): dtype}, **options, **modules)
            real = Path(self._snapshot.directory)
            for name, component in pipe.components.items():
                if name in options or name in modules:
                    continue
                rename(component, folder, real)
                if isinstance(component, torch.nn.Module):
                    component.to(self._target.name)
            pipe.register_to_config(_name_or_path=str(real))
        remember(pipe, Loaded(self._report, self.bringing, self._held))
        for part in self.bringing.parts:
            part.guard()
        return pipe

    def _modules(
        self, folder: Path, cls: Any, dtype: Dtype, variant: str | None, options: dict[str, Any]
    ) -> dict[str, torch.nn.Module]:
        """The plain modules, by component. The files of all others are had, and the report says why they are not."""
        try:
            index = json.loads(read_whole(self._files[INDEX]))
            _check_plain(cls, index, self._files, options)
        except (NotPlain, KeyError, ValueError) as error:
            self._report.fell_back(f"everything by from_pretrained: {error}")
            await_files(self._snapshot.files)
            return {}
        modules: dict[str, torch.nn.Module] = {}
        for name, kind in sorted(_models(index, options), key=lambda item: rank(f"{item[0]}/model", LARGE)):
            own = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
            try:
                modules[name] = self._module(folder, name, kind, own, variant)
            except WeightcacheError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, from_pretrained will say it better
                why = str(error) if isinstance(error, NotPlain) else f"{type(error).__name__}: {error}"
                self._report.fell_back(f"{name} by from_pretrained: {why}")
                await_files(file for file in self._snapshot.files if file.name.startswith(f"{name}/"))
        return modules

    def _module(
        self, folder: Path, name: str, kind: Any, dtype: torch.dtype | None, variant: str | None
    ) -> torch.nn.Module:
        if kind is None:
            raise NotPlain("its class is code of its own")
        stem = stem_of(kind)
        own = [path.removeprefix(f"{name}/") for path in self._files if path.startswith(f"{name}/")]
        tagged = variant is not None and any(path.partition(".")[2].startswith(variant) for path in own)
        paths = weight_files(self._files, name, stem, variant if tagged else None)
        stored = stored_tensors(self._files, paths)
        if isinstance(self._place, DeviceMemory):
            self._place.expect(sum(tensor.end - tensor.begin for tensor in stored.values()))
        tensors = arrivals(stored.values(), self._place)
        real = os.path.join(self._snapshot.directory, name)
        module = build(kind, folder / name, real, dtype, tensors)
        if self._target.name.type != "cpu":
            module.to(self._target.name)  # buffers that no file has: the rest is there
        self.bringing.add(name, module, [arriving for arriving in tensors.values() if arriving.tensor is not None])
        self._held[name] = dict(self._hold(module, tensors))
        return module

    def _hold(self, module: torch.nn.Module, tensors: dict[str, Arriving]) -> Iterator[tuple[str, Held]]:
        kept = {tensor.data_ptr(): tensor for tensor in module.state_dict(keep_vars=True).values()}
        for key, arriving in tensors.items():
            stored, tensor = arriving.stored, arriving.tensor
            if tensor is not None and tensor.numel():
                where = weakref.ref(kept[tensor.data_ptr()])
                yield key, Held(where, stored.dtype, self._source, stored.file.path, stored.begin, stored.end)


def _check_plain(cls: Any, index: dict[str, Any], files: dict[str, OpenFile], options: dict[str, Any]) -> None:
    """Raise NotPlain for a pipeline, or options, that only from_pretrained can make anything of."""
    import diffusers

    kind = getattr(diffusers, index["_class_name"], None) if isinstance(index["_class_name"], str) else None
    if kind is None:
        raise NotPlain("the pipeline's class is code of its own")
    known = set(index) | {name for found in (cls, kind) for name in inspect.signature(found.__init__).parameters}
    for name, value in options.items():
        if name in _PLAIN_VALUES and value not in _PLAIN_VALUES[name]:
            raise NotPlain(f"{name}={value}")
        if name not in known | _HARMLESS | set(_PLAIN_VALUES):
            raise NotPlain(f"{name} was given")
    if kind._load_connected_pipes and "README.md" in files:
        raise NotPlain("it may name connected pipelines")


def _models(index: dict[str, Any], options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Components that are models, with their class; None: it is not one of the libraries'."""
    from diffusers import pipelines

    for name, value in index.items():
        if name.startswith("_") or name in options or not isinstance(value, list) or None in value:
            continue
        library, class_name = value
        if library in ("diffusers", "transformers"):
            kind = getattr(importlib.import_module(library), class_name, None)
        else:
            kind = getattr(getattr(pipelines, library, None), class_name, None)
        if kind is None or (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            yield name, kind


def _dtype_option() -> str:
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"  # its name before 0.40
