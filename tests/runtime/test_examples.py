"""The examples for diffusers run as they stand, on a tiny pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.runtime import pipelines
from tests.servers.loop import accepts, spawn, wait_until
from weightcache.tools.local import free_ports

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG"


def test_with_diffusers(tmp_path: Path) -> None:
    model = pipelines.save("sd", tmp_path)
    out = tmp_path / "out.png"
    command = [sys.executable, EXAMPLES / "with_diffusers.py", model, "a cat"]
    done = subprocess.run(
        [*command, "--steps=2", "--size=32", f"--out={out}"], capture_output=True, text=True, check=True
    )
    assert out.read_bytes().startswith(PNG)
    assert "tensors" in done.stdout


def test_lora_server(tmp_path: Path) -> None:
    model = pipelines.save("sd", tmp_path)
    (port,) = free_ports(1)
    server = spawn([sys.executable, str(EXAMPLES / "lora_server.py"), str(model), f"--port={port}"])
    try:
        wait_until(lambda: accepts(port), 60)
        asked = json.dumps({"prompt": "a cat", "steps": 2, "size": 32}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", asked, timeout=60) as answer:
            assert answer.read().startswith(PNG)
    finally:
        server.kill()
        server.wait()
