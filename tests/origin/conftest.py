from __future__ import annotations

import json
import random
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.servers.liar import Liar
from tests.servers.nginx import NginxServer
from weightcache.config import OriginConfig
from weightcache.origin import Origins


@pytest.fixture
async def origins() -> AsyncIterator[Callable[..., Origins]]:
    """Makes ``Origins`` with these settings; all are closed at the end."""
    made: list[Origins] = []

    def make(**settings: object) -> Origins:
        made.append(Origins(OriginConfig(**{"timeout": 5.0, **settings})))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that nginx serves."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def nginx(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NginxServer]:
    with NginxServer(served, tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture
def liar() -> Iterator[Liar]:
    with Liar(random.Random(1).randbytes(200_000)) as server:
        yield server


def safetensors(header: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def model(size: int = 1 << 20, seed: int = 1, padding: int = 0) -> bytes:
    """A safetensors file with one tensor of ``size`` random bytes, and ``padding`` bytes of metadata."""
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    return safetensors({"__metadata__": {"pad": "x" * padding}, "w": tensor}, random.Random(seed).randbytes(size))
