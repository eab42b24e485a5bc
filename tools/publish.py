"""``weightcache publish``, on the side of whoever calls it: where to, files to be written, what is said of it."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightcache.errors import ConfigError, StoreError, WeightcacheError, to_wire
from weightcache.tools.show import columns, human, plain

SUFFIX = ".weightcache"
_STATES = {"same": "already published, the same", "published": "published", "replaced": "published anew"}

Json = dict[str, Any]


def target(to: str) -> tuple[str, Path | None]:
    """What ``--to`` says: a place as the daemon knows it, and the file or directory to be written here.

    Raises ConfigError for a bare word, which is a slip of the pen rather than a file of that name.
    """
    if to in ("beside", "fleet"):
        return to, None
    if not set(to) & {".", os.sep} and not os.path.isdir(to):
        raise ConfigError(f"--to {to!r}: beside, fleet or a path is expected, such as ./{to or 'FILE'}")
    return "file", Path(to)


def keep(row: Json, path: Path, *, many: bool, force: bool) -> Json:
    """Write one manifest to ``path``, or below it when there are ``many``; the row, with what came of it."""
    row = dict(row)
    data = base64.b64decode(row.pop("data"))
    place = path / f"{row['path']}{SUFFIX}" if many or path.is_dir() else path
    row["to"] = str(place)
    try:
        there = place.read_bytes() if place.exists() else None
        if there == data:
            return row | {"state": "same"}
        if there is not None and not force:
            raise StoreError(f"{place}: something else is there already; replace it with --force")
        place.parent.mkdir(parents=True, exist_ok=True)
        made = place.with_name(f"{place.name}.{os.getpid()}")
        made.write_bytes(data)
        made.replace(place)
    except OSError as error:
        return row | _failed(StoreError(f"{place}: {error.strerror}; choose another --to"))
    except WeightcacheError as error:
        return row | _failed(error)
    return row | {"state": "published" if there is None else "replaced"}


def _failed(error: WeightcacheError) -> Json:
    name, message = to_wire(error)
    return {"state": "error", "error": name, "message": message}


def told(rows: Sequence[Json]) -> str:
    """What was published where."""
    shown = [(_STATES[row["state"]], human(row["size"]), human(row["bytes"]), row["to"]) for row in rows]
    return columns(("MANIFEST", "OF A FILE OF", "SIZE", "AT"), shown, "OF A FILE OF,SIZE") if rows else plain("nothing")
