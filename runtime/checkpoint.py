"""What a component's safetensors files hold: each tensor's dtype, shape and place, from the headers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch

from weightcache.core.layout import MAX_HEADER, check_cover, parse_header
from weightcache.errors import FormatError
from weightcache.runtime.frameworks import TORCH
from weightcache.runtime.opened import Opened

Files = Mapping[str, Opened]  # by their path within the snapshot


class NotPlain(Exception):
    """Something that only the library's own ``from_pretrained`` knows how to load; the text says what."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint: bytes [begin, end) of ``file``."""

    name: str
    file: Opened
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def weight_files(files: Files, folder: str, stem: str, variant: str | None) -> list[str]:
    """The paths of a component's safetensors files: one, or the shards that an index names.

    ``stem``: "model" for transformers, "diffusion_pytorch_model" for diffusers. Raises NotPlain when there is none, or
    both a whole file and shards: which of them counts, only the library knows.
    """
    tag = f".{variant}" if variant else ""
    whole = _inside(folder, f"{stem}{tag}.safetensors")
    index = _inside(folder, f"{stem}.safetensors.index{tag}.json")
    if whole in files and index in files:
        raise NotPlain(f"{whole} and {index} are both there")
    if whole in files:
        return [whole]
    if index not in files:
        raise NotPlain(f"there is no {whole}")
    try:
        named = set(json.loads(read_whole(files[index]))["weight_map"].values())
        shards = [_inside(folder, name) for name in sorted(named)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NotPlain(f"{index} is no index of shards") from None
    if missing := [path for path in shards if path not in files]:
        raise NotPlain(f"{index} names {missing[0]}, which is not there")
    return shards


def _inside(folder: str, name: str) -> str:
    return str(PurePosixPath(folder) / name)


def read_whole(file: Opened) -> bytes:
    """All bytes of a small file, once had."""
    with open(file.path, "rb") as opened:
        file.wait(0, os.fstat(opened.fileno()).st_size)
        return opened.read()


def stored_tensors(files: Files, paths: list[str]) -> dict[str, Stored]:
    """The tensors of some files by name, in the order of their bytes; waits for their headers alone.

    Raises NotPlain for bytes that are no safetensors, a dtype that torch lacks, or a name that occurs twice.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        file = files[path]
        try:
            size, head = _head(file)
            header = parse_header(head)
            check_cover(header, size)
        except FormatError as error:
            raise NotPlain(f"{path}: {error}") from None
        for tensor in header.tensors:
            dtype: Any = TORCH.dtypes.get(tensor.dtype)
            if dtype is None:
                raise NotPlain(f"{path}: {tensor.name} is {tensor.dtype}, which torch has no dtype for")
            if tensor.name in found:
                raise NotPlain(f"{path}: {tensor.name} is in another shard, too")
            found[tensor.name] = Stored(tensor.name, file, tensor.begin, tensor.end, dtype, tensor.shape)
    return found


def _head(file: Opened) -> tuple[int, bytes]:
    """The file's size, and its length and JSON."""
    with open(file.path, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        file.wait(0, min(8, size))
        length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEADER:
            raise FormatError("header too large")
        file.wait(0, min(8 + length, size))
        opened.seek(0)
        return size, opened.read(8 + length)
