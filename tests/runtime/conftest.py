"""What opens a file that is still arriving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.files import Arriving
from weightcache.runtime import loader, stream


@pytest.fixture
def arriving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Arriving]:
    """Make a file that is arriving; the runtime opens it, whatever name it is given."""

    def make(data: bytes) -> Arriving:
        opened = Arriving(tmp_path / "arriving.safetensors", data)
        for module in (loader, stream):
            monkeypatch.setattr(module, "open_source", lambda _: opened)
        return opened

    return make
