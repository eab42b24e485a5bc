"""This process as a worker of a daemon's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.fleet.daemons import Daemon
from weightcache import openfile


@pytest.fixture
def works_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Daemon], None]]:
    """Call it to have this process load from a daemon, and from none that it knew before."""

    def works_for(host: Daemon) -> None:
        for name, value in host.worker_env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(openfile, "_worker", None)

    yield works_for
    if openfile._worker is not None:
        openfile._worker.close()
