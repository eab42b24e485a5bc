"""Tiny pipelines of every kind, with seeded random weights, built and saved offline.

Each is a few megabytes at most and runs in a second. ``KINDS`` has them by name: what makes one, and how it is called.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

torch.set_num_threads(1)  # on a busy machine two threads wait for each other far longer than they work

WIDTH = 32  # of everything
PROMPT = "a cat"


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """One that knows single letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """What stands in for T5's, whose vocabulary is a file from the hub."""
    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def clip_config(**more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=54,
        bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=WIDTH, **more,
    )  # fmt: skip


def t5_config(kind: type[Any] = T5Config) -> Any:
    return kind(d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=100)


def unet(**more: Any) -> UNet2DConditionModel:
    options: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**options | more)


def vae(**more: Any) -> AutoencoderKL:
    options: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return AutoencoderKL(**options | more)


def ddim() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, image_size=30,
        patch_size=15, projection_dim=WIDTH,
    )  # fmt: skip


def sd_parts(folder: Path) -> dict[str, Any]:
    checker = CLIPConfig(text_config=clip_config().to_dict(), vision_config=vision().to_dict(), projection_dim=WIDTH)
    return {
        "unet": unet(),
        "vae": vae(),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(folder),
        "scheduler": ddim(),
        "safety_checker": StableDiffusionSafetyChecker(checker),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
    }


def sd(folder: Path) -> Any:
    return StableDiffusionPipeline(**sd_parts(folder))


def saved_large_sd(folder: Path) -> Path:
    """The directory of a saved one whose denoiser takes several reads."""
    torch.manual_seed(0)
    parts = sd_parts(folder / "vocabulary") | {"safety_checker": None, "feature_extractor": None}
    parts["unet"] = unet(block_out_channels=(96, 192))
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder / "model")
    return folder / "model"


def controlnet(folder: Path) -> Any:
    parts = sd_parts(folder) | {"safety_checker": None, "feature_extractor": None}
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(16, 32))
    return StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)


def sdxl(folder: Path) -> Any:
    second = CLIPTextModelWithProjection(clip_config(hidden_act="gelu"))
    return StableDiffusionXLPipeline(
        unet=unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            cross_attention_dim=2 * WIDTH,
        ),
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(hidden_act="gelu")),
        text_encoder_2=second,
        tokenizer=clip_tokenizer(folder / "1"),
        tokenizer_2=clip_tokenizer(folder / "2"),
        scheduler=ddim(),
    )


def sd3(folder: Path) -> Any:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=WIDTH, pooled_projection_dim=2 * WIDTH, out_channels=4,
        ),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        text_encoder_3=T5EncoderModel(t5_config()),
        tokenizer=clip_tokenizer(folder / "1"),
        tokenizer_2=clip_tokenizer(folder / "2"),
        tokenizer_3=word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def flux(folder: Path) -> Any:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        ),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=T5EncoderModel(t5_config()),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def wan(folder: Path) -> Any:
    return WanPipeline(
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=WIDTH, freq_dim=64, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        text_encoder=UMT5EncoderModel(t5_config(UMT5Config)),
        tokenizer=word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def ip_adapter(folder: Path) -> Any:
    """SD with an image encoder; its adapter lies in ``folder``."""
    parts = sd_parts(folder) | {"safety_checker": None}
    save_file(_adapter(parts["unet"]), folder / "adapter.safetensors")
    encoder = CLIPVisionModelWithProjection(vision())
    return StableDiffusionPipeline(**parts, image_encoder=encoder, requires_safety_checker=False)


def _adapter(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """An IP-Adapter of four tokens, as its files name the tensors: layers by the odd numbers."""
    shapes = {"proj.weight": (4 * WIDTH, WIDTH), "proj.bias": (4 * WIDTH,), "norm.weight": (WIDTH,)}
    found = {f"image_proj.{name}": torch.randn(shape) for name, shape in (shapes | {"norm.bias": (WIDTH,)}).items()}
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    for number, name in enumerate(crossing):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for leaf in ("to_k_ip", "to_v_ip"):
            found[f"ip_adapter.{2 * number + 1}.{leaf}.weight"] = torch.randn(width, WIDTH)
    return found


def _image(call: Callable[..., Any], **options: Any) -> torch.Tensor:
    """The output of two steps, from the same noise each time."""
    found = call(
        prompt=PROMPT, generator=torch.Generator("cpu").manual_seed(0), num_inference_steps=2, output_type="pt",
        return_dict=False, **options,
    )  # fmt: skip
    output = found[0]
    assert isinstance(output, torch.Tensor)
    assert output.isfinite().all()
    return output


def _controlled(pipe: Any) -> torch.Tensor:
    return _image(pipe, image=torch.full((1, 3, 32, 32), 0.5), height=32, width=32)


def _prompted_by_image(pipe: Any) -> torch.Tensor:
    plain = _image(pipe, height=32, width=32, ip_adapter_image=None)
    folder = Path(pipe.config["_name_or_path"]).parent / "vocabulary"
    pipe.load_ip_adapter(folder, subfolder="", weight_name="adapter.safetensors", image_encoder_folder=None)
    image = torch.linspace(-1, 1, 3 * 30 * 30).reshape(1, 3, 30, 30)
    prompted = _image(pipe, height=32, width=32, ip_adapter_image=image)
    assert not torch.equal(prompted, plain)
    return prompted


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of pipeline is made, and what it makes of a prompt."""

    make: Callable[[Path], Any]
    run: Callable[[Any], torch.Tensor]


def _run(**options: Any) -> Callable[[Any], torch.Tensor]:
    return partial(_image, **options)


KINDS = {
    "sd": Kind(sd, _run(height=32, width=32)),
    "sdxl": Kind(sdxl, _run(height=32, width=32)),
    "sd3": Kind(sd3, _run(height=32, width=32, max_sequence_length=16)),
    "flux": Kind(flux, _run(height=32, width=32, max_sequence_length=16)),
    "wan": Kind(wan, _run(height=16, width=16, num_frames=5, max_sequence_length=16)),
    "controlnet": Kind(controlnet, _controlled),
    "ip-adapter": Kind(ip_adapter, _prompted_by_image),
}


def save(name: str, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """Make a pipeline of a kind with weights of a seed, and save it. ``options`` as for save_pretrained."""
    torch.manual_seed(seed)
    pipe = KINDS[name].make(folder / "vocabulary")
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            _fill(component)
    pipe.save_pretrained(folder / name, safe_serialization=True, **options)
    return folder / name


def _fill(module: torch.nn.Module) -> None:
    """No parameter is zero: one that were left out would not be noticed."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
