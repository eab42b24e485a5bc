"""Programs for workers: small models of several kinds, built, saved, and loaded again."""

from __future__ import annotations

BUILD = """
import os, torch
torch.set_num_threads(1)
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BertModel, CLIPConfig, CLIPModel, LlamaConfig,
    LlamaForCausalLM, T5Config, T5ForConditionalGeneration,
)

def build(folder):
    torch.manual_seed(0)
    text = dict(vocab_size=99, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2)
    vision = text | dict(image_size=30, patch_size=2)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder + "/clip")
    T5ForConditionalGeneration(T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0,
    )).save_pretrained(folder + "/t5")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=5000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=True,
    )).save_pretrained(folder + "/llama", max_shard_size="3MB")

def bert(name, **options):
    with torch.no_grad():
        return AutoModel.from_pretrained(name, **options)(torch.arange(100, 110)[None]).last_hidden_state

def clip(name):
    pixels = torch.linspace(-1, 1, 2 * 3 * 30 * 30).reshape(2, 3, 30, 30)
    with torch.no_grad():
        return CLIPModel.from_pretrained(name)(input_ids=torch.arange(5)[None], pixel_values=pixels).logits_per_image

def t5(name):
    with torch.no_grad():
        model = AutoModel.from_pretrained(name)
        return model(input_ids=torch.arange(9)[None], decoder_input_ids=torch.arange(4)[None]).last_hidden_state

def llama(name):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(name)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        return model(torch.arange(20)[None]).logits
"""

SWARM = """
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
from weightcache.runtime import install, load_file, safe_open
install()

def whole(source):
    found = AutoModelForCausalLM.from_pretrained(source).state_dict()
    del found["lm_head.weight"]  # tied, so that no file has it
    return found

def files(source):
    return {name: tensor for file in shards for name, tensor in load_file(source + file).items()}

def slices(source):
    found = {}
    for file in shards:
        with safe_open(source + file, "pt") as opened:
            found |= {name: opened.get_slice(name)[:] for name in opened.keys()}
    return found

ways = (whole, files, slices)
"""
