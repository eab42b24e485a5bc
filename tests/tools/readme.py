"""The tables of README.md that follow from the code. ``python -m tests.tools.readme`` brings them up to date."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weightcache.config import settings
from weightcache.errors import WeightcacheError
from weightcache.tools import exits
from weightcache.tools.options import spelling

README = Path(__file__).parents[2] / "README.md"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def settings_table() -> str:
    rows = []
    for setting in settings():
        usual = ", ".join(setting.default) if isinstance(setting.default, tuple) else setting.default
        default = "" if usual in (None, "") else f"`{usual}`"
        rows.append((f"`{setting.key}`", f"`{spelling(setting)}`", default, setting.doc))
    return _table(("key", "option of `daemon`", "default", "what it is"), rows)


def errors_table() -> str:
    rows = []
    for code, kinds in exits.codes().items():
        said = [f"`{kind.__name__}`: {_summary(kind)}" for kind in kinds]
        rows.append((str(code), "<br>".join(said)))
    return _table(("exit code", "error"), rows)


def _summary(kind: type[WeightcacheError]) -> str:
    if kind is WeightcacheError:
        return "anything else"
    return (kind.__doc__ or "").splitlines()[0].rstrip(".")


TABLES = {"settings": settings_table, "errors": errors_table}


def updated(text: str) -> str:
    """``text`` with every table between its markers as it is now."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        assert found, f"README.md: no {begin!r}"
        assert closed, f"README.md: no {end!r}"
        text = before + begin + table() + end + after
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
