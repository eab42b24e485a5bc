"""A comparison's result, and how it looks in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True, slots=True)
class Column:
    """``key`` finds the value in a row. ``bars``: the picture shows this one."""

    key: str
    heading: str
    form: str = "{:.2f}"
    bars: bool = False


@dataclass(slots=True)
class Row:
    """One contender: values by column, a note, or why it was ``skipped``."""

    name: str
    values: dict[str, float] = field(default_factory=dict)
    note: str = ""
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure that is to be at least, or at most, so much. ``value`` None: what it needs was skipped."""

    text: str
    bound: float
    least: bool
    value: float | None = None

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.least else self.value <= self.bound


def at_least(bound: float, text: str) -> Goal:
    return Goal(text, bound, True)


def at_most(bound: float, text: str) -> Goal:
    return Goal(text, bound, False)


@dataclass(slots=True)
class Table:
    """``about``: what was done and what a figure includes. ``facts`` are of the run, such as the machine's load.

    ``timelines``: (seconds, bytes) by name, for a picture over time, beside a line of ``slope`` bytes a second.
    """

    name: str
    title: str
    about: str
    columns: Sequence[Column]
    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    timelines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    slope: float = 0.0

    def value(self, row: str, key: str) -> float | None:
        """A row's value; None if it was skipped."""
        return next((found.values.get(key) for found in self.rows if found.name == row), None)

    def expect(self, goal: Goal, row: str, key: str, of: str | None = None) -> None:
        """Compare a row's value, or its ratio to the same of another row, with a goal."""
        value = self.value(row, key)
        if of is not None and value is not None:
            other = self.value(of, key)
            value = value / other if other else None
        self.goals.append(replace(goal, value=value))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "about": self.about,
            "facts": self.facts,
            "rows": [asdict(row) for row in self.rows],
            "timelines": self.timelines,
            "slope": self.slope,
            "goals": [asdict(goal) | {"met": goal.met} for goal in self.goals],
        }


def show(table: Table, console: Console) -> None:
    """Print a table, what it means, and how far its goals are met."""
    console.print()
    drawn = RichTable(title=f"{table.name}: {table.title}", title_justify="left", box=box.SIMPLE_HEAD)
    drawn.add_column("")
    for column in table.columns:
        drawn.add_column(column.heading, justify="right")
    for row in table.rows:
        cells = [
            column.form.format(row.values[column.key]) if column.key in row.values else "" for column in table.columns
        ]
        drawn.add_row(row.name, *cells)
    console.print(drawn, markup=False)
    for row in table.rows:
        if row.skipped or row.note:
            console.print(f"  {row.name}: {'skipped: ' + row.skipped if row.skipped else row.note}", markup=False)
    console.print(f"  {table.about}", markup=False)
    if table.facts:
        console.print("  " + ", ".join(f"{name} {value}" for name, value in table.facts.items()), markup=False)
    for goal in table.goals:
        bound = f"{'>=' if goal.least else '<='} {goal.bound:g}"
        if goal.value is None:
            console.print(f"  ?      {goal.text}: not measured ({bound})", markup=False)
        else:
            verdict = "met" if goal.met else "MISSED"
            console.print(f"  {verdict:6} {goal.text}: {goal.value:.2f} ({bound})", markup=False)


def _cell(row: Row, column: Column) -> str:
    return column.form.format(row.values[column.key]) if column.key in row.values else ""
