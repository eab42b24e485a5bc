"""What the fast path leaves to ``from_pretrained``: the same pipeline, or the same error, and the report says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.runtime import pipelines
from weightcache.runtime import LoadReport, load_pipeline


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def quantized(folder: Path) -> None:
    edit(folder / "unet/config.json", quantization_config={"quant_method": "unheard_of"})


def custom_model(folder: Path) -> None:
    edit(folder / "text_encoder/config.json", auto_map={"AutoModel": "model.Model"})


def custom_pipeline(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name=["my_pipeline", "MyPipeline"])


def pickled(folder: Path) -> None:
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(whole), whole.with_suffix(".bin"))
    whole.unlink()


def tied(folder: Path) -> None:
    file = folder / "text_encoder_2/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}, file, {"format": "pt"})


def eight_bits(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in load_file(file).items()}, file, {"format": "pt"})


def nothing(folder: Path) -> None: ...


def outcome(load: Callable[[], Any]) -> Any:
    """The tensors of a pipeline, or what was raised."""
    try:
        pipe = load()
    except Exception as error:  # noqa: BLE001 - that is what is compared
        return type(error), str(error)
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        f"{name}.{key}": (tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: pipelines.save(name, tmp_path_factory.mktemp(name)) for name in ("sd", "flux")}


@pytest.mark.parametrize(
    ("kind", "change", "options", "works", "why"),
    [
        ("sd", quantized, {}, None, "unet by from_pretrained: config.json has quantization_config"),
        ("sd", custom_model, {}, True, "text_encoder by from_pretrained: config.json has auto_map"),
        ("sd", custom_pipeline, {}, False, "everything by from_pretrained: the pipeline's class is code of its own"),
        ("sd", pickled, {}, True, "unet by from_pretrained: there is no unet/diffusion_pytorch_model.safetensors"),
        ("flux", tied, {}, True, "tied, and both in the file"),
        ("sd", nothing, {"dtype": torch.float8_e4m3fn}, None, "it is made by casting a finished model"),
        ("sd", eight_bits, {"dtype": torch.float16}, True, ""),
        ("sd", nothing, {"use_safetensors": False}, False, "everything by from_pretrained: use_safetensors=False"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_it_is_what_from_pretrained_makes_of_it(
    originals: dict[str, Path], tmp_path: Path, kind: str, change: Any, options: Any, works: bool | None, why: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(originals[kind], folder)
    change(folder)
    report = LoadReport()
    theirs = outcome(lambda: DiffusionPipeline.from_pretrained(str(folder), **options))
    ours = outcome(lambda: load_pipeline(folder, report=report, **options))
    assert ours == theirs
    assert works is None or isinstance(theirs, dict) == works
    assert [text for text in report.fallbacks if why in text] if why else not report.fallbacks
