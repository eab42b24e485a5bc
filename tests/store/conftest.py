"""Stores that are closed, and processes that are ended, whatever a test does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weightcache.store import Store

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def open_store(root: Path) -> Iterator[Callable[..., Store]]:
    """Open the store at ``root``; whatever is open at the end is closed."""
    opened: list[Store] = []

    def open_it(**settings: int) -> Store:
        opened.append(Store.open(root, **settings))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., Store]) -> Store:
    return open_store()


@pytest.fixture
def worker() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python code in a process of its own, with arguments; returns when it has printed ``ready``."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object, wait: bool = True) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        started.append(process)
        if wait:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
