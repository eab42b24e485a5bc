"""``load_pipeline`` beside diffusers' own ``from_pretrained``: the same pipeline, to the last attribute and bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)
from safetensors.torch import load_file, save_file

from tests.runtime import pipelines
from tests.runtime.pipelines import KINDS
from weightcache.runtime import LoadReport, load_pipeline, report_of
from weightcache.runtime.emulated import Emulated

Saved = Callable[..., Path]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Saves a pipeline of a kind; the same one but once a session."""
    known: dict[str, Path] = {}

    def save(name: str, **options: Any) -> Path:
        key = f"{name} {sorted(options.items())}"
        if key not in known:
            known[key] = pipelines.save(name, tmp_path_factory.mktemp(name), **options)
        return known[key]

    return save


@pytest.fixture
def copied(saved: Saved, tmp_path: Path) -> Saved:
    """A copy, to be changed."""

    def copy(name: str, **options: Any) -> Path:
        return Path(shutil.copytree(saved(name, **options), tmp_path / name))

    return copy


def facts(module: torch.nn.Module) -> dict[str, Any]:
    """What a module is, but for its tensors' bytes."""
    tensors = {**module.state_dict(keep_vars=True), **dict(module.named_buffers())}
    found: dict[str, Any] = {
        "tensors": {
            name: (type(t), t.dtype, t.device, tuple(t.shape), t.stride(), t.requires_grad)
            for name, t in tensors.items()
        },
        "order": list(tensors),
        "modules": [(name, type(child), child.training) for name, child in module.named_modules()],
        "names": {name: sorted(vars(child)) for name, child in module.named_modules()},
        "hooks": sum(len(child._forward_pre_hooks) + len(child._forward_hooks) for child in module.modules()),
        "plain tensors": {
            (name, key): value.tolist()
            for name, child in module.named_modules()
            for key, value in vars(child).items()
            if isinstance(value, torch.Tensor)
        },
    }
    config: Any = module.config
    found["config"] = dict(config) if isinstance(config, dict) else config.to_dict()
    for name in ("name_or_path", "_name_or_path", "_internal_dict", "all_tied_weights_keys", "_tied_weights_keys"):
        if name in vars(module):
            found[name] = getattr(module, name)
    return found


def assert_same(ours: Any, theirs: Any) -> None:
    """All of a pipeline's components are alike, and so is the pipeline."""
    assert type(ours) is type(theirs)
    assert dict(ours.config) == dict(theirs.config)
    assert list(ours.components) == list(theirs.components)
    for name, component in theirs.components.items():
        mine = ours.components[name]
        assert type(mine) is type(component), name
        if not isinstance(component, torch.nn.Module):
            continue
        assert facts(mine) == facts(component), name
        expected = dict(component.named_buffers()) | component.state_dict()
        for key, tensor in (dict(mine.named_buffers()) | mine.state_dict()).items():
            assert torch.equal(tensor, expected[key]), (name, key)
        assert repr(getattr(mine, "generation_config", None)) == repr(getattr(component, "generation_config", None))


def run(name: str, pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return KINDS[name].run(pipe)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_goes_the_fast_way_and_gives_the_same(saved: Saved, name: str) -> None:
    folder = saved(name)
    ours = load_pipeline(folder)
    theirs = DiffusionPipeline.from_pretrained(str(folder))
    assert_same(ours, theirs)
    assert torch.equal(run(name, ours), run(name, theirs))
    assert report_of(ours).fallbacks == []
    assert report_of(ours).size > 100_000


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("name", ["sdxl", "sd3", "wan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_as_it_casts_them(saved: Saved, name: str, dtype: torch.dtype, mapped: bool) -> None:
    folder = saved(name)
    ours = load_pipeline(folder, dtype=dtype, mapped=mapped)
    assert_same(ours, DiffusionPipeline.from_pretrained(str(folder), dtype=dtype))
    assert report_of(ours).fallbacks == []


def test_each_component_may_have_its_own_dtype(saved: Saved) -> None:
    folder = saved("sd")
    dtype = {"unet": torch.bfloat16, "default": torch.float16}
    assert_same(load_pipeline(folder, dtype=dtype), DiffusionPipeline.from_pretrained(str(folder), dtype=dtype))


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_by_way_of_an_accelerators_ring(saved: Saved, name: str, dtype: torch.dtype | None) -> None:
    folder = saved(name)
    ours = load_pipeline(folder, device=Emulated(checked=True), dtype=dtype)
    assert_same(ours, DiffusionPipeline.from_pretrained(str(folder), dtype=dtype))
    assert report_of(ours).stages["copy"].size > 0


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_shards(saved: Saved, name: str) -> None:
    folder = saved(name, max_shard_size="50KB")
    assert len(list(folder.glob("*/*-of-*.safetensors"))) > 10
    ours = load_pipeline(folder)
    assert_same(ours, DiffusionPipeline.from_pretrained(str(folder)))
    assert report_of(ours).fallbacks == []


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "50KB"}])
def test_a_variant(saved: Saved, shards: dict[str, str]) -> None:
    folder = saved("sd", variant="fp16", **shards)
    ours = load_pipeline(folder, variant="fp16", dtype=torch.float16)
    assert_same(ours, DiffusionPipeline.from_pretrained(str(folder), variant="fp16", dtype=torch.float16))
    assert report_of(ours).fallbacks == []


def test_a_variant_that_only_some_components_have(copied: Saved) -> None:
    folder = copied("sd")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(whole).items()}
    save_file(tensors, whole.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    ours = load_pipeline(folder, variant="fp16")
    assert_same(ours, DiffusionPipeline.from_pretrained(str(folder), variant="fp16"))
    assert report_of(ours).fallbacks == []


def test_components_of_the_callers_own(saved: Saved) -> None:
    folder = saved("sd")
    own = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float16)
    options = {"vae": own, "safety_checker": None, "requires_safety_checker": False}
    ours = load_pipeline(folder, **options)
    assert ours.vae is own
    assert ours.safety_checker is None
    assert_same(ours, DiffusionPipeline.from_pretrained(str(folder), **options))
    assert report_of(ours).fallbacks == []


def test_another_pipeline_of_the_same_files(saved: Saved) -> None:
    control = load_pipeline(saved("controlnet")).controlnet
    options = {"cls": StableDiffusionControlNetPipeline, "controlnet": control, "safety_checker": None}
    ours = load_pipeline(saved("sd"), **options)
    assert type(ours) is StableDiffusionControlNetPipeline
    assert ours.controlnet is control
    assert report_of(ours).fallbacks == []
    other = load_pipeline(saved("sd"), cls=StableDiffusionImg2ImgPipeline)
    assert_same(other, StableDiffusionImg2ImgPipeline.from_pretrained(str(saved("sd"))))


def edit(file: Path, **entries: Any) -> None:
    found = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (found | entries).items() if value != "gone"}))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file, {"format": "pt"})


def without_first(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[1:])


def one_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"strange": torch.zeros(1)}


@pytest.mark.parametrize(
    ("component", "file", "change", "why"),
    [
        ("unet", "diffusion_pytorch_model", one_more, r"1 unknown \(strange\)"),
        ("text_encoder", "model", one_more, r"1 unknown \(strange\)"),
        ("text_encoder", "model", without_first, "1 missing"),
    ],
)
def test_what_does_not_fit_exactly_is_the_librarys(
    copied: Saved, component: str, file: str, change: Any, why: str
) -> None:
    folder = copied("sd")
    rewrite(folder / component / f"{file}.safetensors", change)
    report = LoadReport()
    ours = load_pipeline(folder, report=report)
    theirs = DiffusionPipeline.from_pretrained(str(folder))
    for name in ("vae", "safety_checker"):
        assert facts(getattr(ours, name)) == facts(getattr(theirs, name))
    (said,) = report.fallbacks
    assert said.startswith(f"{component} by from_pretrained: ")
    assert re.search(why, said)
