"""The examples run; what needs a program that is not here runs up to it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fleet.daemons import Daemon
from tests.fleet.weights import minilm
from weightcache.runtime import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["with_transformers.py", "with_vllm.py", "with_comfyui.py"])
def test_each_says_what_it_takes(name: str) -> None:
    assert "usage:" in run(name, "--help")


def test_transformers(tmp_path: Path) -> None:
    with Daemon(tmp_path / "a", f"--file-root={minilm()}") as host:
        texts = ("--text", "one sentence", "--text", "another")
        env = host.worker_env | {"HF_HUB_OFFLINE": "1"}
        from_source = run("with_transformers.py", f"file://{minilm()}/", *texts, env=env)
    local = run("with_transformers.py", str(minilm()), *texts, env={"HF_HUB_OFFLINE": "1"})
    assert from_source.startswith("2 rows of 384")
    assert from_source.splitlines()[1:] == local.splitlines()[1:]


def test_what_vllm_is_given(tmp_path: Path, works_for: Callable[[Daemon], None]) -> None:
    with Daemon(tmp_path / "a", f"--file-root={minilm()}") as host:
        works_for(host)
        source = f"file://{minilm()}/"
        folder = Path(run("with_vllm.py", source).strip())
        assert (folder / "config.json").read_bytes() == (minilm() / "config.json").read_bytes()
        assert not list(folder.rglob("*.safetensors"))
        given = dict(runpy.run_path(str(EXAMPLES / "with_vllm.py"))["weights"](source))
    expected = load_file(minilm() / "model.safetensors")
    assert given.keys() == expected.keys()
    assert all(given[name].equal(tensor) for name, tensor in expected.items())


def test_what_comfyui_is_given(tmp_path: Path) -> None:
    import yaml

    with Daemon(tmp_path / "a", f"--file-root={minilm()}") as host:
        wanted = (f"checkpoints=file://{minilm()}/model.safetensors", f"text_encoders=file://{minilm()}/")
        said = yaml.safe_load(run("with_comfyui.py", *wanted, env=host.worker_env))
        for folder in ("checkpoints", "text_encoders"):  # read as ComfyUI reads it
            (path,) = (line for line in said["weightcache"][folder].split("\n") if line)
            assert (Path(path) / "model.safetensors").stat().st_size == (minilm() / "model.safetensors").stat().st_size
        with host.client() as client:
            assert all(blob["pinned"] for blob in client.ls()["blobs"])
