"""A table as a picture: one bar a row, the limit as a line. SVG, written by hand: it needs no library."""

from __future__ import annotations

from html import escape
from itertools import cycle

from bench.table import Table

WIDTH, LEFT, RIGHT, TOP, STEP, BAR = 760, 250, 110, 64, 30, 18
DASHES = ("none", "6 3", "2 3")
OURS, THEIRS, LIMIT = "#1f6feb", "#9aa4b2", "#57606a"
_STYLE = (
    "text { font: 13px system-ui, sans-serif; fill: #24292f; paint-order: stroke; stroke: white; stroke-width: 4px }"
    " .title { font-size: 16px; font-weight: 600 }"
)


def draw(table: Table) -> str:
    """The picture of a table: its timelines, or the column that is meant for it."""
    return _timelines(table) if table.timelines else _bars(table)


def _svg(title: str, height: int, parts: list[str]) -> str:
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text class="title" x="16" y="28">{escape(title)}</text>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _timelines(table: Table) -> str:
    height, left, bottom = 360, 70, 320
    seconds = max(line[-1][0] for line in table.timelines.values())
    most = max(line[-1][1] for line in table.timelines.values())
    across, up = (WIDTH - left - 30) / seconds, (bottom - TOP) / most
    end = min(seconds, most / table.slope) if table.slope else 0.0
    own = f'x2="{left + end * across:.1f}" y2="{bottom - end * table.slope * up:.1f}"'
    parts = [
        f'<line x1="{left}" y1="{bottom}" {own} stroke="{LIMIT}" stroke-dasharray="4 3"/>',
        f'<path d="M{left},{TOP} V{bottom} H{WIDTH - 30}" fill="none" stroke="{THEIRS}"/>',
        f'<text x="{left - 8}" y="{TOP + 5}" text-anchor="end">{most / 1e9:.1f} GB</text>',
        f'<text x="{WIDTH - 30}" y="{bottom + 20}" text-anchor="end">{seconds:.0f} s</text>',
    ]
    dashes = {OURS: cycle(DASHES), THEIRS: cycle(DASHES)}
    for number, (name, line) in enumerate(table.timelines.items(), start=1):
        colour = OURS if "weightcache" in name else THEIRS
        drawn = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{next(dashes[colour])}"'
        points = " ".join(f"{left + at * across:.1f},{bottom - size * up:.1f}" for at, size in line)
        y = bottom - 18 * number
        parts += [
            f'<polyline points="{points}" {drawn}/>',
            f'<path d="M{WIDTH - 260},{y - 4} h30" {drawn}/><text x="{WIDTH - 220}" y="{y}">{escape(name)}</text>',
        ]
    return _svg(table.title, height, parts)


def _bars(table: Table) -> str:
    column = next((column for column in table.columns if column.bars), None)
    rows = [row for row in table.rows if column is not None and column.key in row.values]
    height = TOP + STEP * len(rows) + 24
    parts: list[str] = []
    if column is not None and rows:
        ratio = " (ratio to the limit)" if "ratio" in rows[0].values else ""
        heading = column.heading.replace("\n", ", ")
        parts.append(f'<text x="{LEFT}" y="50">{escape(heading)}{ratio}</text>')
        largest = max(row.values[column.key] for row in rows)
        scale = (WIDTH - LEFT - RIGHT) / largest if largest else 0.0
        limit = next((row.values[column.key] for row in rows if row.name == "limit"), None)
        if limit is not None:
            x = LEFT + limit * scale
            line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{height - 16}"'
            parts.append(f'<line {line} stroke="{LIMIT}" stroke-dasharray="4 3"/>')
        for number, row in enumerate(rows):
            y, value = TOP + STEP * number, row.values[column.key]
            colour = OURS if "weightcache" in row.name else LIMIT if row.name.startswith("limit") else THEIRS
            label = column.form.format(value)
            if "ratio" in row.values:
                label += f" ({row.values['ratio']:.2f})"
            parts += [
                f'<text x="{LEFT - 10}" y="{y + 14}" text-anchor="end">{escape(row.name)}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{max(1.0, value * scale):.1f}" height="{BAR}" fill="{colour}"/>',
                f'<text x="{LEFT + value * scale + 8:.1f}" y="{y + 14}">{escape(label)}</text>',
            ]
    return _svg(table.title, height, parts)
