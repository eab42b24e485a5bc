"""ComfyUI, with models from the fleet. Untested with ComfyUI itself, which was not installed where this was written.

Its source was read: how it takes an extra_model_paths.yaml apart, and what checkpoint nodes call to load a checkpoint.

ComfyUI wants real paths, and weightcache has real files. Either tell it where they lie, before it starts:

    python with_comfyui.py checkpoints=hf://org/sdxl/sdxl.safetensors loras=s3://loras/ > extra_model_paths.yaml
    python main.py --extra-model-paths-config extra_model_paths.yaml

(a folder of ComfyUI's, "=", a source; each may be given again. What it names is pinned: ``weightcache unpin`` lets it
go.) Or put this file into ``custom_nodes/``: its node "Load Checkpoint (weightcache)" takes a source in the graph.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from weightcache import SyncClient


def bring(source: str) -> str:
    """The real path of a source, a file or a directory, which stays until it is unpinned."""
    with SyncClient() as client:
        path = str(client.pull(source)["path"])
        client.pin([source])
        return path


def model_paths(wanted: list[str]) -> str:
    """The text of an extra_model_paths.yaml for FOLDER=SOURCE pairs. ComfyUI lists what is in the folders."""
    folders: dict[str, list[str]] = {}
    for pair in wanted:
        folder, separator, source = pair.partition("=")
        if not separator or not folder.isidentifier():
            raise SystemExit(f"{pair!r}: give FOLDER=SOURCE, such as loras=s3://loras/")
        path = bring(source)
        folders.setdefault(folder, []).append(path if os.path.isdir(path) else os.path.dirname(path))
    lines = ["weightcache:"]
    for folder, paths in folders.items():
        lines += [f"  {folder}: |", *(f"    {path}" for path in dict.fromkeys(paths))]
    return "\n".join(lines) + "\n"


class LoadCheckpoint:
    """What CheckpointLoaderSimple does, of a source: model, CLIP and VAE of one checkpoint file."""

    CATEGORY = "loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"source": ("STRING", {"default": "hf://org/name/model.safetensors"})}}

    def load(self, source: str) -> tuple[Any, ...]:
        import comfy.sd
        import folder_paths

        embeddings = folder_paths.get_folder_paths("embeddings")
        found = comfy.sd.load_checkpoint_guess_config(
            bring(source), output_vae=True, output_clip=True, embedding_directory=embeddings
        )
        return tuple(found[:3])


NODE_CLASS_MAPPINGS = {"WeightcacheLoadCheckpoint": LoadCheckpoint}
NODE_DISPLAY_NAME_MAPPINGS = {"WeightcacheLoadCheckpoint": "Load Checkpoint (weightcache)"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring models, and print an extra_model_paths.yaml for them.")
    parser.add_argument("wanted", nargs="+", metavar="FOLDER=SOURCE", help="such as loras=s3://loras/")
    print(model_paths(parser.parse_args().wanted), end="")


if __name__ == "__main__":
    main()
