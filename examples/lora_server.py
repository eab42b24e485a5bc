"""One base pipeline, any LoRA: ``python examples/lora_server.py hf://org/model --port 8000``, and then

curl -o cat.png -d '{"prompt": "a cat", "lora": "hf://org/lora/pytorch_lora_weights.safetensors"}' localhost:8000/

A LoRA comes through the cache, ahead of whatever large load is under way, and goes when the image is done. Requests
take turns on the one pipeline.
"""

from __future__ import annotations

import argparse
import asyncio
import io
from typing import Any

import torch
from aiohttp import web

from weightcache.errors import WeightcacheError
from weightcache.runtime import load_lora, load_pipeline


class Server:
    def __init__(self, source: str, device: str) -> None:
        self._pipe = load_pipeline(source, device=device, overlap=True)
        self._turn = asyncio.Lock()

    async def draw(self, request: web.Request) -> web.Response:
        """The image of a prompt, as PNG; {"prompt", "lora"?, "steps"?, "size"?, "seed"?}."""
        asked = await request.json()
        try:
            async with self._turn:
                data = await asyncio.to_thread(self._draw, asked)
        except (WeightcacheError, ValueError, KeyError) as error:
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=400)
        return web.Response(body=data, content_type="image/png")

    def _draw(self, asked: dict[str, Any]) -> bytes:
        pipe, lora, size = self._pipe, asked.get("lora"), asked.get("size")
        noise = torch.Generator().manual_seed(asked["seed"]) if "seed" in asked else None
        try:
            if lora:
                load_lora(pipe, lora, adapter_name="request")
            steps = asked.get("steps", 20)
            image = pipe(asked["prompt"], num_inference_steps=steps, height=size, width=size, generator=noise).images[0]
        finally:
            if lora:
                pipe.unload_lora_weights()
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="the base: hf://org/name, s3://bucket/prefix/, or a directory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    app = web.Application()
    app.add_routes([web.post("/", Server(given.source, given.device).draw)])
    web.run_app(app, host="127.0.0.1", port=given.port)


if __name__ == "__main__":
    main()
