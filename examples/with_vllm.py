"""vLLM, with weights from the fleet. Untested here: vLLM needs a GPU and was not installed where this was written.

It was compared with vLLM's source: the entry-point group ``vllm.general_plugins``, ``register_model_loader``, and the
two abstract methods of ``BaseModelLoader`` (alike from 0.9.2 to 0.32), which itself makes the model and then calls
``load_weights``. A plug-in is loaded in every process that vLLM starts. Put this file into a package of yours with

    [project.entry-points."vllm.general_plugins"]
    weightcache = "with_vllm:register"

vLLM reads configuration and tokenizer from a directory before any loader is asked, so those come first; the loader then
takes the weights from the source itself, each tensor as soon as its bytes are here:

    MODEL=$(python with_vllm.py s3://models/llama/)
    vllm serve "$MODEL" --load-format weightcache --model-loader-extra-config '{"source": "s3://models/llama/"}'

The source is that of one model: a draft model would get the same weights, and a model with weights in a second
repository (its ``secondary_weights``) needs vLLM's own loader. Without the plug-in,
``vllm serve "$(weightcache pull SOURCE >/dev/null; weightcache path SOURCE)"`` does it with real files, after all of
them have come.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*"]


def configuration(source: str) -> str:
    """The directory with everything of ``source`` that is not weights."""
    from weightcache import SyncClient

    with SyncClient() as client:
        return str(client.pull(source, ignore=WEIGHTS)["path"])


def weights(source: str) -> Iterator[tuple[str, Any]]:
    """Every tensor of the source's safetensors files, with its name, in the order in which they lie there."""
    from weightcache import SyncClient
    from weightcache.runtime import safe_open

    with SyncClient() as client:
        paths = [file["path"] for file in client.files(source)["files"]]
    index = Path(configuration(source), "model.safetensors.index.json")
    if index.exists():  # there may be other checkpoints beside it
        chosen = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        chosen = [path for path in paths if path.endswith(".safetensors") and "/" not in path]
    if not chosen:
        raise FileNotFoundError(f"{source}: it holds no safetensors file")
    for path in chosen:
        with safe_open(f"{source.rstrip('/')}/{path}", "pt") as file:
            for name in file.offset_keys():
                yield name, file.get_tensor(name)


def register() -> None:
    """The entry point: make ``--load-format weightcache`` known. vLLM may call it more than once."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader("weightcache")
    class WeightcacheLoader(BaseModelLoader):
        def _source(self, model_config: Any) -> str:
            extra = self.load_config.model_loader_extra_config or {}
            return str(extra.get("source") or model_config.model)

        def download_model(self, model_config: Any) -> None:
            from weightcache import SyncClient

            with SyncClient() as client:
                client.pull(self._source(model_config), allow=["*.safetensors", "*.json"])

        def load_weights(self, model: Any, model_config: Any) -> None:
            wanted = {name for name, _ in model.named_parameters()}
            loaded = model.load_weights(weights(self._source(model_config)))
            # As vLLM's own loader does; a model that does not say what it has loaded returns None.
            if model_config.quantization is None and loaded is not None and (missing := wanted - loaded):
                raise ValueError(f"{self._source(model_config)}: it lacks {len(missing)} weights: {min(missing)}, ...")


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring a model's configuration and tokenizer; print where they lie.")
    parser.add_argument("source", help="a directory as save_pretrained makes it, with safetensors")
    print(configuration(parser.parse_args().source))


if __name__ == "__main__":
    main()
