"""transformers, unchanged, with a model that comes from the fleet: s3://, gs://, hf://, https:// or file://.

    python examples/with_transformers.py s3://models/all-minilm-l6-v2/ --text "one sentence" --text "another"
    python examples/with_transformers.py --hub org/name

Only ``installed()`` is weightcache's. A program that cannot be changed at all gets the same by

    weightcache run python program.py
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModel, AutoTokenizer

from weightcache.runtime import installed


def embed(name: str, texts: list[str]) -> torch.Tensor:
    """The mean of the last hidden states of each text: one row of the model's width (float32) a text."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModel.from_pretrained(name)
    words = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**words).last_hidden_state
    mask = words["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("source", help="a directory as save_pretrained makes it; with --hub also ORG/NAME")
    parser.add_argument("--text", action="append", help="what to embed; may be repeated")
    parser.add_argument("--hub", action="store_true", help="send ids of the hub through the cache, too")
    given = parser.parse_args()
    began = time.perf_counter()
    with installed(hub=given.hub):
        rows = embed(given.source, given.text or ["weights from the fleet"])
    print(f"{len(rows)} rows of {rows.shape[1]} in {time.perf_counter() - began:.2f} s")
    for row in rows:
        print(" ".join(f"{value:.4f}" for value in row[:8].tolist()), "...")


if __name__ == "__main__":
    main()
