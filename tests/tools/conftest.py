"""The command line as a user runs it: a process, with nothing of the developer's own settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Where the store is, and that file:// may be read below ``tmp_path``."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHTCACHE_")}
    return own | {
        "HOME": str(tmp_path),
        "WEIGHTCACHE_STORE": str(tmp_path / "store"),
        "WEIGHTCACHE_ORIGIN_FILE_ROOTS": str(tmp_path),
    }


@pytest.fixture
def cli(environ: dict[str, str]) -> Cli:
    """Run a command to its end."""

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "weightcache.tools", *arguments]
        return subprocess.run(command, env=environ | more, capture_output=True, text=True, timeout=60)

    return run


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """What a command with --json said when it went well."""
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""
    return json.loads(done.stdout)
