"""A diffusers pipeline from any source: ``python examples/with_diffusers.py hf://org/model "a cat"``.

The prompt is encoded while the denoiser still arrives; the report says where the seconds went.
"""

from __future__ import annotations

import argparse
import time

import torch

from weightcache.runtime import load_pipeline, report_of, wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="hf://org/name, s3://bucket/prefix/, or a directory")
    parser.add_argument("prompt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="pixels of a side; default: the model's own")
    parser.add_argument("--out", default="out.png")
    given = parser.parse_args()

    began = time.perf_counter()
    dtype = torch.float32 if given.device == "cpu" else torch.float16
    pipe = load_pipeline(given.source, device=given.device, dtype=dtype, overlap=True)
    print(f"a pipeline after {time.perf_counter() - began:.2f} s, weights still to come")
    image = pipe(given.prompt, num_inference_steps=given.steps, height=given.size, width=given.size).images[0]
    print(f"an image after {time.perf_counter() - began:.2f} s: {given.out}")
    image.save(given.out)
    wait(pipe)
    print(report_of(pipe))


if __name__ == "__main__":
    main()
