"""One host as an operator sees it in a browser: a page without scripts, which asks for itself again.

It shows what ``weightcache status`` and ``weightcache peers`` do, and no more: no path of a blob, no credential.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

REFRESH_SECONDS = 3

Json = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; --soft: #8884; --good: #2a9d63; --bad: #d1495b }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem; margin: 0 } h2 { font-size: 1rem; margin: 1.8rem 0 .4rem }
h1 + p { margin: 0; opacity: .7 }
dl { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
dl div { border: 1px solid var(--soft); border-radius: .5rem; padding: .5rem .9rem }
dt { font-size: .8rem; opacity: .7 } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-size: .8rem; font-weight: normal; opacity: .7 }
td, th { border-bottom: 1px solid var(--soft); padding: .25rem .8rem .25rem 0; overflow-wrap: anywhere }
progress { width: 100%; accent-color: var(--good) }
.bad { color: var(--bad) }
"""


def page(status: Json, peers: Sequence[Json]) -> str:
    """The page, as HTML, of what ``Node.status`` and ``Node.peers`` say."""
    where = status["listen"] or status["node"][:12]
    used, moved, trouble = status["bytes"], status["moved"], status["directory"]["trouble"]
    tiles = (
        ("store", f"{_size(used['used'])} used, {_size(used['free'])} free"),
        ("blobs", f"{status['blobs']['complete']} complete, {status['blobs']['partial']} partial"),
        ("from origins", _size(moved["origin"])),
        ("from peers", _size(sum(moved["peer"].values()))),
        ("to peers", _size(sum(moved["sent"].values()))),
        ("peers", str(status["peers"])),
    )
    loads = (
        (load["source"], _size(load["size"]), _Bar(load["had_chunks"], load["chunks"])) for load in status["loads"]
    )
    rows = (
        (
            peer["address"],
            peer.get("datacenter", ""),
            peer["state"],
            _size(peer.get("received", 0)),
            _size(peer.get("sent", 0)),
            peer["why"] or "",
        )
        for peer in peers
    )
    about = f"datacenter {status['datacenter']}, up {_span(status['uptime_seconds'])}"
    lost = f"The directory is lost, the last known view is kept: {trouble}" if trouble else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="refresh" content="{REFRESH_SECONDS}">
<meta name="viewport" content="width=device-width">
<title>{escape(where)}: weightcache</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(where)}</h1>
<p>weightcache {escape(status["version"])}, {escape(about)}</p>
<p class="bad">{escape(lost)}</p>
<dl>{"".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in tiles)}</dl>
<h2>Loads</h2>
{_table(("source", "size", "here"), loads)}
<h2>Peers</h2>
{_table(("peer", "datacenter", "state", "received", "sent", "why"), rows)}
</body>
</html>
"""


class _Bar:
    """How far something has come."""

    def __init__(self, done: int, whole: int) -> None:
        self.html = f'<progress value="{done}" max="{whole}"></progress>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str | _Bar]]) -> str:
    cells = [
        "".join(f"<td>{cell.html if isinstance(cell, _Bar) else escape(cell)}</td>" for cell in row) for row in rows
    ]
    if not cells:
        return "<p>none</p>"
    titles = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _span(seconds: float) -> str:
    days, rest = divmod(round(seconds), 86400)
    return f"{days} days" if days else f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
