"""Which directory a configuration gives, and the plain list."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weightcache.config import Config
from weightcache.directory import Member, View, open_directory


async def test_a_list_may_hold_oneself_and_is_told_once() -> None:
    told: list[View] = []
    directory = open_directory(Config(peers=("10.0.0.1:7000", "10.0.0.2:7000", "[fd00::3]:7000")), None)
    await directory.start(Member("10.0.0.1", 7000, b"i" * 32), told.append)
    assert told == [{Member("10.0.0.2", 7000), Member("fd00::3", 7000)}] == [directory.view()]
    await directory.close()


async def test_a_dns_name_without_a_port_means_the_port_one_listens_on() -> None:
    directory = open_directory(Config(listen="127.0.0.1:7123", discover="dns:localhost"), None)
    await directory.start(Member("127.0.0.1", 7999), lambda view: None)
    assert Member("127.0.0.1", 7123) in directory.view()
    await directory.close()


@pytest.mark.parametrize("discover", ["static", "dns:localhost:1"])
@pytest.mark.parametrize("library", ["zeroconf", "redis"])
def test_a_library_is_imported_only_where_it_is_used(library: str, discover: str) -> None:
    program = (
        "import sys; from weightcache.config import Config; from weightcache.directory import open_directory;"
        f"open_directory(Config(discover={discover!r}), None); sys.exit({library!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
