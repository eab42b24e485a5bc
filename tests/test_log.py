"""What a log says: one line an event, for machines or for a person."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from weightcache.errors import ConfigError
from weightcache.log import configure

PROGRAM = """
import logging
from weightcache.log import configure, fields
configure({arguments})
log = logging.getLogger("weightcache.test")
log.debug("unseen")
log.info("chunk landed", extra=fields(blob=b"\\x0a\\xff", bytes=8388608, event="not this"))
log.warning("peer banned", extra=fields(peer="10.0.0.7:9000", why="said\\n\\x1b[2J evil=1"))
logging.getLogger("aiohttp").info("of %s", "another library")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broke")
"""


def logged(arguments: str) -> str:
    program = [sys.executable, "-c", PROGRAM.format(arguments=arguments)]
    return subprocess.run(program, capture_output=True, text=True, check=True).stderr


def test_a_pipe_gets_one_json_object_a_line() -> None:
    lines = [json.loads(line) for line in logged('"info"').splitlines()]
    landed, banned, other, broke = lines
    assert {key: landed[key] for key in landed if key != "ts"} == {
        "level": "info",
        "logger": "weightcache.test",
        "event": "chunk landed",
        "blob": "0aff",
        "bytes": 8388608,
    }
    assert abs(datetime.now(UTC) - datetime.fromisoformat(landed["ts"])) < timedelta(minutes=1)
    assert (banned["level"], banned["peer"], banned["why"]) == ("warning", "10.0.0.7:9000", "said\n\x1b[2J evil=1")
    assert (other["logger"], other["event"]) == ("aiohttp", "of another library")
    assert "ZeroDivisionError" in broke["traceback"]


def test_a_person_gets_short_lines_that_no_peer_can_forge() -> None:
    landed, banned, *_ = logged('"info", as_json=False').splitlines()
    assert landed.endswith('info    chunk landed blob=0aff bytes=8388608 event="not this"')
    assert banned.endswith(r'warning peer banned peer=10.0.0.7:9000 why="said\n\u001b[2J evil=1"')


def test_a_terminal_is_told_from_a_pipe() -> None:
    ours, theirs = pty.openpty()
    program = [sys.executable, "-c", PROGRAM.format(arguments='"warning"')]
    subprocess.run(program, stderr=theirs, check=True)
    shown = os.read(ours, 65536)
    os.close(theirs)
    os.close(ours)
    assert b"warning peer banned peer=10.0.0.7:9000" in shown


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="'loud': one of debug, info, warning, error"):
        configure("loud")
