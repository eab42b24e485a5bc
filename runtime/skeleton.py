"""Builds the modules of diffusers and transformers as their ``from_pretrained`` does, around tensors still to come.

transformers takes a state dict in ``from_pretrained``; its values need only be what it would find in a file. So it
does everything itself: dtypes, renames, ties, buffers that no file has. diffusers takes none; what its
``from_pretrained`` does for a plain checkpoint is few lines, and they are here. Either way the module is then asked
what it holds: exactly the tensors that are on their way, each as it was given, or it is not ours to load.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from weightcache.runtime.checkpoint import NotPlain
from weightcache.runtime.places import Arriving

# Building sets what is the whole process' (the default dtype, how parameters are registered): one at a time.
_BUILDING = threading.RLock()
# Keys of a config.json that ask for more than a checkpoint's tensors.
_SPECIAL = ("quantization_config", "compression_config", "auto_map", "transformers_weights", "fusion_config")

Tensors = Mapping[str, Arriving]


def stem_of(kind: type[Any]) -> str:
    """How the library that a model's class is of names weight files.

    Raises NotPlain unless it is loaded by the library's own, unchanged ``from_pretrained``.
    """
    for base, stem in _libraries():
        if issubclass(kind, base):
            for method in ("from_pretrained", "_load_pretrained_model"):
                if inspect.getattr_static(kind, method) is not inspect.getattr_static(base, method):
                    raise NotPlain(f"{kind.__name__} has a {method} of its own")
            return stem
    raise NotPlain(f"{kind.__name__} is a model of neither diffusers nor transformers")


def _libraries() -> Iterator[tuple[type[Any], str]]:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    yield ModelMixin, "diffusion_pytorch_model"
    yield PreTrainedModel, "model"


def build(kind: type[Any], folder: Path, name: str, dtype: torch.dtype | None, tensors: Tensors) -> torch.nn.Module:
    """The module whose files lie in ``folder``, with all of ``tensors`` as its weights. ``name``: the folder's proper
    name, which the config is to remember.

    Raises NotPlain, or whatever the library raises, when the module cannot be built around just these.
    """
    from diffusers import ModelMixin

    raw = json.loads((folder / "config.json").read_text())
    if special := [key for key in _SPECIAL if raw.get(key) is not None]:
        raise NotPlain(f"config.json has {special[0]}")
    if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
        raise NotPlain(f"as {dtype} it is made by casting a finished model")
    with _BUILDING:
        make = _diffusers_model if issubclass(kind, ModelMixin) else _transformers_model
        module = make(kind, folder, name, dtype, tensors)
    _check(module, tensors)
    return module


# -- diffusers


def _diffusers_model(
    kind: type[Any], folder: Path, name: str, dtype: torch.dtype | None, tensors: Tensors
) -> torch.nn.Module:
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from diffusers.models.modeling_utils import no_init_weights

    config, unused, _ = kind.load_config(folder, return_unused_kwargs=True, return_commit_hash=True)
    config = copy.deepcopy(config)
    before = torch.get_default_dtype()
    # Not the meta device: a tensor that a module keeps as a plain attribute would be lost there.
    with no_init_weights(), init_empty_weights(include_buffers=False):
        try:
            torch.set_default_dtype(dtype or before)
            module: Any = kind.from_config(config, **unused)
        finally:
            torch.set_default_dtype(before)
    if type(module) is not kind:
        raise NotPlain(f"its config makes it a {type(module).__name__}")
    expected = module.state_dict()
    if expected.keys() != tensors.keys():
        missing, more = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise NotPlain(_difference(missing, more))
    keep = kind._keep_in_fp32_modules or []
    keep = [keep] if isinstance(keep, str) else keep
    owners = dict(module.named_modules(remove_duplicate=False))
    for key, arriving in tensors.items():
        empty, stored = expected[key], arriving.stored
        if tuple(empty.shape) != stored.shape:
            raise NotPlain(f"{key} has shape {list(stored.shape)}, not {list(empty.shape)}")
        target = empty.dtype
        if stored.dtype.is_floating_point and dtype is not None:
            target = torch.float32 if any(part in key.split(".") for part in keep) else dtype
        elif not stored.dtype.is_floating_point and stored.dtype != target:
            raise NotPlain(f"{key} is {stored.dtype}, not {target}")
        _assign(owners, key, arriving.to(dtype=target))
    module.register_to_config(_name_or_path=name)
    return module.eval()  # type: ignore[no-any-return]


def _assign(owners: Mapping[str, torch.nn.Module], key: str, tensor: torch.Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    owner = owners[path]
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
        return
    old = owner._parameters.get(leaf)
    if type(old) is not torch.nn.Parameter:
        raise NotPlain(f"{key} is a {type(old).__name__}")
    owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)


# -- transformers


def _transformers_model(
    kind: type[Any], folder: Path, name: str, dtype: torch.dtype | None, tensors: Tensors
) -> torch.nn.Module:
    if (folder / "adapter_config.json").exists():
        raise NotPlain("it is an adapter of another model")
    config, unused = kind.config_class.from_pretrained(folder, return_unused_kwargs=True)
    if unused or getattr(type(config), "extra_files", None):
        raise NotPlain("its class has files or options of its own")
    if dtype is None:  # "auto", for which transformers would look into the tensors
        first = next((t.stored.dtype for t in tensors.values() if t.stored.dtype.is_floating_point), torch.float32)
        dtype = config.dtype or first
    with _quiet():
        module, info = kind.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
        )
    if info["mismatched_keys"]:
        key, found, wanted = sorted(info["mismatched_keys"])[0]
        raise NotPlain(f"{key} has shape {list(found)}, not {list(wanted)}")
    if info["missing_keys"] or info["unexpected_keys"]:
        raise NotPlain(_difference(sorted(info["missing_keys"]), sorted(info["unexpected_keys"])))
    _check_ties(module, tensors)
    module.config.name_or_path = module.name_or_path = name
    if module.can_generate() and hasattr(module, "adjust_generation_fn"):
        module.adjust_generation_fn(
            None, False, None, str(folder), cache_dir=None, force_download=False, proxies=None,
            local_files_only=True, token=None, revision="main", subfolder="", trust_remote_code=None,
        )  # fmt: skip
    return module  # type: ignore[no-any-return]


def _check_ties(module: Any, tensors: Tensors) -> None:
    """Of two tied names that are both in the file transformers compares the bytes, which are not there yet."""
    given = {arriving.stored.name for arriving in tensors.values()}
    pairs = module.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in pairs.items():
        if target in given and source in given:
            raise NotPlain(f"{target} and {source} are tied, and both in the file")


# -- either


def _difference(missing: list[str], more: list[str]) -> str:
    said = [f"{len(names)} {what} ({names[0]})" for names, what in ((missing, "missing"), (more, "unknown")) if names]
    return f"its files do not fit its config: keys {', '.join(said)}"


def _check(module: torch.nn.Module, tensors: Tensors) -> None:
    """Raise NotPlain unless the module holds every tensor that is on its way, untouched, and waits for no other."""
    held = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.device.type == "meta":
            raise NotPlain(f"{name} is in no file")
        if tensor.numel():
            held[_identity(tensor)] = name
    for name, arriving in tensors.items():
        tensor = arriving.tensor  # None: the library leaves it out
        if tensor is not None and tensor.numel() and held.pop(_identity(tensor), None) is None:
            raise NotPlain(f"{name} is not kept as it is in the file")
    if held:
        raise NotPlain(f"{min(held.values())} is in no file")


def _identity(tensor: torch.Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers: there is nothing to wait for while it builds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
