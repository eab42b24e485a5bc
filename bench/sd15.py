"""What Stable Diffusion 1.5 consists of: diffusers' own configurations, and weights of that shape that mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
TINY_TEXT = TEXT | {"num_hidden_layers": 1, "vocab_size": 1000}
TINY_VAE = VAE | {"block_out_channels": (32, 32, 32, 32)}
TINY_UNET = UNET | {"block_out_channels": (32, 32, 32, 32)}
SMALL_UNET = UNET | {"block_out_channels": (64, 128, 256, 256)}  # a tenth of it


def shapes(*, small: bool = False) -> dict[str, dict[str, torch.Size]]:
    """The tensors of each component, by the name of its directory, in the order of their use."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        models = {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
            "unet": UNet2DConditionModel(**(SMALL_UNET if small else UNET)),
            "vae": AutoencoderKL(**VAE),
        }
    return {
        component: {name: tensor.shape for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        for component, model in models.items()
    }


def weights(shapes: dict[str, torch.Size], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Random half-precision tensors, each of its own bytes."""
    draw = torch.Generator().manual_seed(15)
    for name, shape in shapes.items():
        yield prefix + name, torch.empty(shape, dtype=torch.float16).uniform_(-1, 1, generator=draw)


def write_file(path: Path, *, small: bool = False) -> int:
    """All components in one file, as single-file checkpoints have them; its size."""
    from safetensors.torch import save_file

    tensors = {
        name: tensor
        for component, found in shapes(small=small).items()
        for name, tensor in weights(found, f"{component}.")
    }
    save_file(tensors, path)
    return path.stat().st_size


def write_snapshot(folder: Path, *, small: bool = False) -> dict[str, int]:
    """A file a component, as pipelines have them; their sizes, by path."""
    from safetensors.torch import save_file

    sizes = {}
    for component, found in shapes(small=small).items():
        path = folder / component / "model.safetensors"
        path.parent.mkdir(parents=True)
        save_file(dict(weights(found)), path)
        sizes[f"{component}/model.safetensors"] = path.stat().st_size
    return sizes


def write_pipeline(folder: Path, *, small: bool = False, tiny: bool = False) -> int:
    """All of the pipeline as diffusers saves it, in half precision, with a tokenizer of letters; its weights' bytes.

    ``tiny``: for first uses. The weights are random, of a size at which the components' outputs are finite.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(**(TINY_TEXT if tiny else TEXT)))
        unet = UNet2DConditionModel(**(TINY_UNET if tiny else SMALL_UNET if small else UNET))
        vae = AutoencoderKL(**(TINY_VAE if tiny else VAE))
    for model in (text, unet, vae):
        _fill(model.half().to_empty(device="cpu"))
    tokenizer = CLIPTokenizer({word: number for number, word in enumerate(words)}, [], model_max_length=77)
    pipe = StableDiffusionPipeline(
        vae, text, tokenizer, unet, DDIMScheduler(**SCHEDULER), None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _fill(model: torch.nn.Module) -> None:
    block = torch.empty(1 << 20, dtype=torch.float16).uniform_(-1, 1, generator=torch.Generator().manual_seed(15))
    with torch.no_grad():
        for number, (name, tensor) in enumerate(model.named_parameters()):
            if tensor.ndim == 1:
                tensor.fill_(name.endswith("weight"))  # of a norm
                continue
            inputs = tensor.numel() // len(tensor)
            rolled = block.roll(number).mul(inputs**-0.5)
            tensor.copy_(rolled.repeat(-(-tensor.numel() // len(block)))[: tensor.numel()].reshape(tensor.shape))
