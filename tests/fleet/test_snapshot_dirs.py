"""A snapshot's directory is what transformers and diffusers load: offline, from hard links to blobs."""

from __future__ import annotations

from pathlib import Path

from tests.fleet.daemons import Daemon
from tests.fleet.weights import minilm, same_files
from tests.fleet.workers import Worker
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server

PIPELINE = """
import json, os, sys, torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoModel, BertModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

def build(folder):
    torch.manual_seed(0)
    os.makedirs(folder + "/vocabulary")
    words = ["<|startoftext|>", "<|endoftext|>", "a", "c", "t", "a</w>", "c</w>", "t</w>", "ca", "cat</w>"]
    with open(folder + "/vocabulary/vocab.json", "w") as file:
        json.dump({word: number for number, word in enumerate(words)}, file)
    with open(folder + "/vocabulary/merges.txt", "w") as file:
        file.write("#version: 0.2\\nc a\\nca t</w>\\n")
    tokenizer = CLIPTokenizer(folder + "/vocabulary/vocab.json", folder + "/vocabulary/merges.txt", model_max_length=16)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=[32, 64], in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder + "/model")

def image(name, **options):
    pipeline = StableDiffusionPipeline.from_pretrained(name, **options)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    made = pipeline("a cat", num_inference_steps=2, generator=generator, output_type="np", height=16, width=16)
    return torch.from_numpy(made.images)

def embedding(kind, name, **options):
    torch.manual_seed(1)
    with torch.no_grad():
        return kind.from_pretrained(name, **options)(torch.arange(100, 110)[None]).last_hidden_state
"""


def test_libraries_load_a_snapshot_offline(s3: S3Server, hub: HubServer, tmp_path: Path) -> None:
    host = Daemon(tmp_path / "a", env={"HF_ENDPOINT": hub.endpoint})
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(host.store / "hub"), "HF_ENDPOINT": "http://127.0.0.1:1"}
    with host, Worker(tmp_path / "log", offline) as worker:
        worker.run(PIPELINE + f"build({str(tmp_path)!r})")
        model = tmp_path / "model"
        for file in (path for path in model.rglob("*") if path.is_file()):
            s3.put("dirs", f"sd/{file.relative_to(model)}", file)
        hub.publish("org/tiny-sd", model)
        hub.publish("org/minilm", minilm())
        folders = {name: host.pull(name)["path"] for name in ("s3://dirs/sd/", "hf://org/tiny-sd", "hf://org/minilm")}
        assert same_files(Path(folders["s3://dirs/sd/"]), model) == same_files(Path(folders["hf://org/tiny-sd"]), model)

        worker.run(f"folders, model, minilm = {folders!r}, {str(model)!r}, {str(minilm())!r}")
        worker.run("real = image(model)")
        assert worker.run("", "torch.equal(image(folders['s3://dirs/sd/']), real)")
        assert worker.run("", "torch.equal(image(folders['hf://org/tiny-sd']), real)")
        assert worker.run("", "torch.equal(image('org/tiny-sd', local_files_only=True), real)")
        for kind in ("BertModel", "AutoModel"):
            worker.run(f"real = embedding({kind}, minilm)")
            assert worker.run("", f"torch.equal(embedding({kind}, folders['hf://org/minilm']), real)")
            assert worker.run("", f"torch.equal(embedding({kind}, 'org/minilm', local_files_only=True), real)")
