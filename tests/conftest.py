"""Fixtures that more than one part's tests use: the real servers, started once a run."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server

# No test may use what the developer's own machine would lend it: a stored token, the credentials of an instance's role.
os.environ["HF_TOKEN_PATH"] = "/nonexistent"  # huggingface_hub reads it once, when it is imported
os.environ["AWS_METADATA_ENDPOINT"] = "http://127.0.0.1:1"

# What a shell starts in the background ignores Ctrl-C, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The S3 server, whole and with its counts at zero, and the environment that leads to it."""
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    s3_server.proxy.reset_counts()
    yield s3_server
    s3_server.proxy.heal()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty hub, and the environment that leads to it without a token."""
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts whole fleets first: a long file that begins last would be waited for."""
    items.sort(key=lambda item: "/fleet/" not in str(item.path))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Leave nothing outside the checkout: pytest keeps the directory above its temporary ones, even if empty."""
    folder = Path(tempfile.gettempdir()) / f"pytest-of-{getpass.getuser()}"
    for link in folder.glob("*current"):
        if link.is_symlink() and not link.exists():
            link.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()  # not while another run, or a failure, has something there
