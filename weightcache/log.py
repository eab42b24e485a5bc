"""Logs: one event a line, with its facts as fields.

    log = logging.getLogger(__name__)
    log.warning("peer banned", extra=fields(peer=peer, why="forged a chunk"))

A terminal gets short lines; anything else gets one JSON object a line. A process that calls nothing here logs as its
owner set logging up: only what runs on its own (the daemon, its bulk processes, the tools) configures it.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from weightcache.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")


def fields(**facts: object) -> dict[str, object]:
    """What to pass as ``extra``: the facts of an event. Bytes are shown in hex."""
    return {"facts": facts}


def configure(level: str = "info", as_json: bool | None = None) -> None:
    """Log to stderr from ``level`` on. ``as_json`` None: JSON unless stderr is a terminal. May be called again."""
    if level not in LEVELS:
        raise ConfigError(f"log level {level!r}: one of {', '.join(LEVELS)} is expected")
    if as_json is None:
        as_json = not sys.stderr.isatty()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else ShortLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    facts: dict[str, object] = getattr(record, "facts", {})
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in facts.items()}


class JsonLines(logging.Formatter):
    """``{"ts": …, "level": …, "logger": …, "event": …, facts…}``; ts is UTC, to the millisecond."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        for name, value in _facts(record).items():
            line.setdefault(name, value)
        if record.exc_info:
            line.setdefault("traceback", self.formatException(record.exc_info))
        return json.dumps(line, default=str, ensure_ascii=False)


class ShortLines(logging.Formatter):
    """``12:00:01 warning peer banned peer=10.0.0.7:9000 why="forged a chunk"``, local time."""

    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(f" {name}={_plain(value)}" for name, value in _facts(record).items())
        clock = self.formatTime(record, "%H:%M:%S")
        line = f"{clock} {record.levelname.lower():7} {record.getMessage()}{facts}"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def _plain(value: object) -> str:
    """A value as one word. What peers and origins say is quoted: it must not move the cursor or forge a line."""
    text = str(value)
    return text if text.isprintable() and text and not set(text) & set(' "=') else json.dumps(text)
