"""What a call will not read is left out, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from weightcache.runtime.needed import superfluous

BIG, TINY = 5 << 20, 500

STABLE_DIFFUSION = {
    "model_index.json": TINY,
    "scheduler/scheduler_config.json": TINY,
    "sd-v1-5-pruned.safetensors": BIG,
    "sd-v1-5-pruned.ckpt": BIG,
    "text_encoder/config.json": TINY,
    "text_encoder/model.safetensors": BIG,
    "text_encoder/model.fp16.safetensors": BIG,
    "text_encoder/pytorch_model.bin": BIG,
    "text_encoder/pytorch_model.fp16.bin": BIG,
    "text_encoder/flax_model.msgpack": BIG,
    "tokenizer/vocab.json": BIG,
    "unet/config.json": TINY,
    "unet/diffusion_pytorch_model.safetensors": BIG,
    "unet/diffusion_pytorch_model.fp16.safetensors": BIG,
    "unet/diffusion_pytorch_model.non_ema.safetensors": BIG,
    "unet/diffusion_pytorch_model.bin": BIG,
    "unet/model.onnx": BIG,
    "unet/model.onnx_data": BIG,
    "vae/diffusion_pytorch_model.safetensors": BIG,
    "safety_checker/pytorch_model.bin": BIG,
}
SHARDED = {
    "config.json": TINY,
    "consolidated.safetensors": BIG,
    "model-00001-of-00002.safetensors": BIG,
    "model-00002-of-00002.safetensors": BIG,
    "model.safetensors.index.json": TINY,
    "original/consolidated.00.pth": BIG,
    "pytorch_model-00001-of-00001.bin": BIG,
    "pytorch_model.bin.index.json": TINY,
    "tokenizer.json": BIG,
    "training_args.bin": TINY,
    "model-q4.gguf": BIG,
}
VARIANT = {
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors": BIG,
    "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors": BIG,
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json": TINY,
    "unet/diffusion_pytorch_model-00001-of-00001.safetensors": BIG,
    "unet/diffusion_pytorch_model.safetensors.index.json": TINY,
    "vae/diffusion_pytorch_model.safetensors": BIG,
}


def needed(
    files: dict[str, int], module: str = "diffusers.pipelines.pipeline_utils", owner: str = "X", **given: Any
) -> set[str]:
    return files.keys() - set(superfluous(files, module, owner, given))


def with_marks(files: dict[str, int], *marks: str) -> set[str]:
    """The weights that bear one of the marks, and all that is no weights."""
    return {path for path in files if any(mark in path for mark in marks)}


def test_a_pipeline_takes_each_components_safetensors_and_pickles_where_there_are_none_else() -> None:
    assert needed(STABLE_DIFFUSION) == {
        *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"),
        *("text_encoder/config.json", "text_encoder/model.safetensors", "unet/config.json"),
        *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        "safety_checker/pytorch_model.bin",
    }


def test_a_variant_is_taken_where_there_is_one() -> None:
    taken = needed(STABLE_DIFFUSION, variant="fp16")
    assert {path for path in taken if path.endswith((".safetensors", ".bin"))} == {
        *("text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"),
        *("vae/diffusion_pytorch_model.safetensors", "safety_checker/pytorch_model.bin"),
    }
    assert needed(VARIANT, variant="fp16") == with_marks(VARIANT, "fp16", "vae/")
    assert needed(VARIANT) == {path for path in VARIANT if "fp16" not in path}
    assert needed(VARIANT, variant="int8") == needed(VARIANT)


def test_pickles_are_taken_when_asked_for() -> None:
    taken = needed(STABLE_DIFFUSION, use_safetensors=False)
    assert "unet/diffusion_pytorch_model.bin" in taken
    assert "unet/diffusion_pytorch_model.safetensors" not in taken
    assert "vae/diffusion_pytorch_model.safetensors" in taken


def test_shards_and_their_index_come_together() -> None:
    assert needed(SHARDED, "transformers.modeling_utils") == {
        *("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "training_args.bin"),
    }


@pytest.mark.parametrize("module", ["transformers.tokenization_utils_base", "diffusers.configuration_utils"])
def test_who_loads_no_weights_gets_none(module: str) -> None:
    assert not [path for path in needed(SHARDED, module) if path.endswith((".safetensors", ".pth", ".gguf"))]
    assert "tokenizer.json" in needed(SHARDED, module)


def test_a_subfolder_is_taken_with_what_is_small_elsewhere() -> None:
    taken = needed(STABLE_DIFFUSION, subfolder="unet")
    assert {path for path in taken if STABLE_DIFFUSION[path] == BIG} == {"unet/diffusion_pytorch_model.safetensors"}
    assert "model_index.json" in taken


def test_one_weight_that_is_named_is_taken_whatever_its_name() -> None:
    files = {"a.safetensors": BIG, "b.safetensors": BIG, "pytorch_model.bin": BIG, "README.md": BIG}
    assert needed(files, weight_name="b.safetensors") == {"b.safetensors", "README.md"}
    assert needed(files, weight_name=["a.safetensors", "pytorch_model.bin"]) == files.keys() - {"b.safetensors"}


def test_other_frameworks_are_taken_by_those_who_read_them() -> None:
    assert "unet/model.onnx_data" in needed(STABLE_DIFFUSION, owner="OnnxStableDiffusionPipeline")
    assert "model-q4.gguf" in needed(SHARDED, "transformers.modeling_utils", gguf_file="model-q4.gguf")
