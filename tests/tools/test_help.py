"""Help: there for every command, with an example, and quick."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.tools.conftest import Cli
from weightcache.config import settings
from weightcache.tools.cli import run
from weightcache.tools.options import spelling
from weightcache.version import __version__

COMMANDS = [
    *("daemon", "pull", "path", "ls", "status", "peers", "pin", "unpin", "evict", "verify", "manifest", "publish"),
    *("coldstart", "simulate", "run"),
]
SECONDS = 1.5  # generous: it takes a tenth of that on an idle machine


def test_help_names_every_command_and_is_quick(cli: Cli) -> None:
    cli("--help")  # whatever has to be compiled is now
    began = time.perf_counter()
    done = cli("--help")
    assert time.perf_counter() - began < SECONDS
    assert done.returncode == 0
    listed = done.stdout.partition("Commands:")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in listed.strip().splitlines()] == COMMANDS
    assert "..." not in listed  # a summary that fits


def test_help_imports_nothing_that_only_commands_need() -> None:
    program = "import sys\nfrom weightcache.tools.cli import run\nrun(['--help'])\n"
    program += "print([name for name in ('rich', 'aiohttp', 'lmdb', 'obstore', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example_and_the_common_options(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"weightcache {command}" in said.partition("\n")[2]
    for option in ("--config", "--store", "--socket", "--log-level", "--json"):
        assert option in said


def test_the_daemon_has_an_option_for_every_setting(cli: Cli) -> None:
    said = " ".join(cli("daemon", "--help").stdout.split())
    for setting in settings():
        assert spelling(setting) + " " in said
        assert setting.doc in said


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"weightcache {__version__}\n"
