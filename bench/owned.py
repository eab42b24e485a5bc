"""``python -m bench.owned WAY``: load files into memory of the tensors' own, one a line of stdin; say the seconds.

A worker loads its weights once, into memory that is new to it; so a process is to load one file that counts. A small
one before it takes imports and first uses out of the way. Each way is what a program's users do: it gives all tensors
on the CPU, for the caller to keep.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.rounds import timed


def ours(path: Path) -> list[Any]:
    from weightcache.runtime import stream_file

    return list(stream_file(path))


def safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path, backend="pread")


def runai(path: Path) -> list[Any]:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        return list(streamer.get_tensors())


def fastsafetensors(path: Path) -> list[Any]:
    from fastsafetensors import fastsafe_open

    with fastsafe_open([str(path)], nogds=True, device="cpu") as file:
        return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - no mapping


def tensorizer(path: Path) -> dict[str, Any]:
    from tensorizer import TensorDeserializer

    with TensorDeserializer(str(path), device="cpu", num_readers=2) as file:
        return dict(file)


def flashpack(path: Path) -> list[Any]:
    from flashpack.deserialization import iterate_from_flash_tensor, read_flashpack_file

    os.environ["FLASHPACK_CPU_PARALLEL_READ"] = "1"  # its reading mode
    storage, metadata = read_flashpack_file(str(path), "cpu")
    return list(iterate_from_flash_tensor(storage, metadata))


WAYS: dict[str, Callable[[Path], object]] = {
    way.__name__: way for way in (ours, safetensors, runai, fastsafetensors, tensorizer, flashpack)
}


def main(way: str) -> None:
    for line in sys.stdin:
        path, kept = Path(line.rstrip("\n")), []
        print(timed(lambda path=path, kept=kept: kept.append(WAYS[way](path))), flush=True)  # type: ignore[misc]


if __name__ == "__main__":
    main(sys.argv[1])
