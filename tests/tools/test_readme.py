"""README.md says what the code says."""

from __future__ import annotations

import re

from tests.tools.readme import README, updated
from tests.tools.test_help import COMMANDS
from weightcache.tools.cli import app


def test_the_tables_are_up_to_date() -> None:
    text = README.read_text()
    assert text == updated(text), "run: python -m tests.tools.readme"


def test_every_command_it_shows_exists() -> None:
    known = {command.name for command in app.registered_commands}
    assert known == set(COMMANDS)
    shown = set(re.findall(r"^(?:\$ )?weightcache ([a-z]+)", README.read_text(), re.MULTILINE))
    assert shown
    assert shown <= known
