"""The report of a cold start as one page: nothing is loaded from anywhere, it prints, and it knows day and night."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from weightcache.tools import coldstart_svg as svg
from weightcache.tools.coldstart_measures import STAGES, NodeRun, Run, middle
from weightcache.tools.coldstart_run import Result
from weightcache.tools.coldstart_settings import rate_text
from weightcache.tools.show import duration, human

Json = dict[str, Any]

# Okabe and Ito's colours, which stay apart for those who see fewer of them.
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --ink: #14181f; --dim: #5b6572; --line: #d9dee5;
  --peers: #0072b2; --origin: #d55e00; --local: #8a939e; --hash: #009e73; --write: #e69f00; --resolve: #cc79a7;
  --plan: #332288; --link: #56b4e9; --device: #3b3f46; --bound: #c9d2dc;
  --first: #e69f00; --moving: #009e73; --tail: #882255; }
@media (prefers-color-scheme: dark) { :root { --back: #11151b; --card: #1a2029; --ink: #eef1f5; --dim: #9aa5b3;
  --line: #303844; --peers: #4aa8e8; --origin: #f08a4b; --local: #98a2ae; --hash: #2fc79a; --write: #f2b632;
  --resolve: #e09cc3; --plan: #8c86e0; --link: #8fd0f5; --device: #d8dde4; --bound: #3a4452;
  --first: #f2b632; --moving: #2fc79a; --tail: #e07f9f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem 1.6rem 3rem; max-width: 1080px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.12rem; margin: 2.2rem 0 .2rem; }
p { margin: .2rem 0 .6rem; color: var(--dim); max-width: 52rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .9rem;
  margin: 1.4rem 0 .6rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: .9rem 1.1rem 1rem; }
.tile b { display: block; font-size: 2.5rem; line-height: 1.15; letter-spacing: -.03em;
  font-variant-numeric: tabular-nums; }
.tile.first { background: #0072b2; border-color: #0072b2; color: #fff; }
.tile.first span, .tile.first small { color: #fff; }
.tile span { font-weight: 600; }
.tile small { display: block; color: var(--dim); }
.note { border-left: 4px solid var(--write); background: var(--card); padding: .5rem .9rem; margin: .5rem 0; }
.bad { border-left-color: var(--origin); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0 .2rem; color: var(--dim);
  font-size: .88rem; }
.legend i { display: inline-block; width: .85rem; height: .85rem; border-radius: .2rem; margin-right: .4rem;
  vertical-align: -.08rem; }
svg { display: block; width: 100%; height: auto; font: 13px system-ui, "Helvetica Neue", Arial, sans-serif; }
svg text { fill: var(--dim); font-variant-numeric: tabular-nums; } svg text.strong { fill: var(--ink); }
.grid { stroke: var(--line); stroke-width: 1; } .floor { stroke: var(--line); stroke-width: 1; }
.marker { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 4; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.line.with { stroke: var(--peers); } .line.without { stroke: var(--local); stroke-dasharray: 6 4; stroke-width: 1.6; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
td:last-child { white-space: normal; color: var(--dim); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .5rem 0; font-size: .92rem; }
dt { color: var(--dim); } dd { margin: 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem;
  overflow-x: auto; white-space: pre-wrap; word-break: break-word; font: .88rem/1.5 ui-monospace, Menlo, monospace; }
@media print { body { padding: 0; max-width: none; font-size: 12px; } section { break-inside: avoid; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""
_KINDS = (*STAGES, "bound", *svg.GAP_STAGES)
TIMES, NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


def page(result: Result, whole: Json) -> str:
    """The page of a result; ``whole`` is what --json prints."""
    run = middle(result.runs)
    alone = middle(result.alone) if result.alone else None
    fills = "".join(f"svg .{kind} {{ fill: var(--{kind}); }} " for kind in dict.fromkeys(_KINDS))
    title = f"Cold start: {len(run.nodes)} nodes, {human(result.size)}"
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(_about(result))}</p>",
        _tiles(result, whole["summary"]),
        *(f'<div class="note">{escape(note)}</div>' for note in result.notes),
        *(f'<div class="note bad">failed: {escape(failure)}</div>' for failure in result.failures),
        *_charts(run, alone),
        _section("Nodes", "", _table(run)),
        _section("Machine and settings", "", _facts(result, whole)),
        _section("To repeat it", "", f"<pre>{escape(whole['command'])}</pre>"),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<style>{_STYLE}{fills}</style></head>\n<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _about(result: Result) -> str:
    settings = result.settings
    if result.namespaces:
        how = f"Real daemons in network namespaces; links {rate_text(settings.link)}, "
        how += f"origin {rate_text(settings.origin_link)}."
    else:
        how = "Real daemons on loopback." if result.files else "A fleet that is there."
    warm = sum(node.warm for node in result.runs[0].nodes)
    start = f" {warm} of the nodes had it already." if warm else ""
    return f"{result.source}. {how}{start}"


def _tiles(result: Result, head: Json) -> str:
    tiles = []
    if head["speed_up"] is not None:
        took = f"{duration(head['seconds'])} instead of {duration(head['without_peers'])}, last node"
        tiles.append((f"{head['speed_up']:.1f}{TIMES}", "as fast as without peers", took))
    elif head["seconds"] is not None:
        tiles.append((duration(head["seconds"]), "until the last node is done", ""))
    if head["egress_multiple"] is not None:
        without = head["without_peers_egress_multiple"]
        beside = f"{without:.2f}{TIMES} without peers" if without is not None else human(result.size) + " an object"
        tiles.append((f"{head['egress_multiple']:.2f}{TIMES}", "the object's size left the origin", beside))
    if head["distance"] is not None:
        tiles.append(
            (f"{head['distance']:.2f}{TIMES}", "the bound", f"no fleet is faster than {duration(head['bound'])}")
        )
    if head["line_share"] is not None:
        tiles.append((f"{head['line_share']:.0%}", "of its link, the slowest node", "received, over all its seconds"))
    shown = [
        f'<div class="tile{" first" if not number else ""}"><b>{escape(figure)}</b><span>{escape(what)}</span>'
        f"<small>{escape(more)}</small></div>"
        for number, (figure, what, more) in enumerate(tiles)
    ]
    return f'<div class="tiles">{"".join(shown)}</div>'


def _charts(run: Run, alone: Run | None) -> list[str]:
    moved = [node for node in run.nodes if node.curve]
    told = [node for node in run.nodes if node.report is not None]
    absent = {
        name for name in ("device", "local", "origin", "peers") if not any(_has(node, name) for node in run.nodes)
    }

    def legend(*names: tuple[str, str]) -> str:
        return _legend([(kind, text) for kind, text in names if kind not in absent])

    few = f" The {svg.MOST} slowest of {len(moved)} are drawn." if len(moved) > svg.MOST else ""
    charts = []
    if moved:
        lines = [("peers", "with peers")] + ([("local", "without peers (dashed)")] if alone is not None else [])
        charts += [
            _section(
                "The fleet over time", "The share of the object that each node has; a line each.",
                _legend(lines) + svg.progress(run, alone),
            ),
            _section(
                "By source", f"How much each node had, and where it came from.{few}",
                legend(("origin", "origin"), ("peers", "peers"), ("local", "its own disk")) + svg.lanes(run),
            ),
        ]  # fmt: skip
    if told:
        names = (
            ("resolve", "resolve"), ("plan", "plan"), ("origin", "chunks coming from the origin"),
            ("peers", "chunks coming from peers"), ("hash", "hashing"), ("write", "writing"),
            ("link", "link and map"), ("device", "to the device, after the last byte"),
        )  # fmt: skip
        charts.append(
            _section(
                "Where each second went", "From each node's own start. A chunk is coming from the moment it is asked "
                f"for. Hashing and writing go on meanwhile: their bars show how long they took in all.{few}",
                legend(*names) + svg.waterfalls(run),
            )
        )  # fmt: skip
    if told and run.least is not None:
        names = (
            ("bound", "the bound"), ("resolve", "resolve"), ("plan", "plan"), ("first", "until the first chunk"),
            ("moving", "moving, slower than the bound"), ("tail", "the last 5% of the bytes"), ("link", "link"),
            ("device", "to the device"),
        )  # fmt: skip
        charts.append(
            _section(
                "The gap to the bound", "The object once over the origin's link, unless a node has it, and once over "
                f"each node's own: nothing is faster. What each node took above that, by stage.{few}",
                legend(*names) + svg.gaps(run),
            )
        )  # fmt: skip
    return charts


def _has(node: NodeRun, kind: str) -> bool:
    return bool(node.device if kind == "device" else node.bytes_by_source()[kind])


def _section(title: str, about: str, body: str) -> str:
    said = f"<p>{escape(about)}</p>" if about else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def _legend(names: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f'<span><i style="background: var(--{kind})"></i>{escape(text)}</span>' for kind, text in names)
    return f'<div class="legend">{shown}</div>'


def _table(run: Run) -> str:
    head = ("node", "time", "own disk", "peers", "origin", "sent to peers", "of its link", f"{TIMES} bound", "")
    rows = []
    for node in run.nodes:
        by, share = node.bytes_by_source(), node.line_share()
        rows.append(
            (
                node.name, duration(node.seconds) if node.seconds is not None else NONE,
                *(human(by[name]) if by[name] else NONE for name in ("local", "peers", "origin")),
                human(node.sent) if node.sent else NONE, f"{share:.0%}" if share is not None else NONE,
                f"{node.seconds / node.least:.2f}" if node.seconds is not None and node.least else NONE,
                "; ".join(filter(None, (node.what, node.error))),
            )
        )  # fmt: skip
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(result: Result, whole: Json) -> str:
    machine, settings = whole["machine"], result.settings
    facts = [
        ("when", machine["time"]),
        (
            "machine",
            f"{machine['cores']} cores, {machine['cpu']}, {human(machine['memory'])}, Linux {machine['kernel']}",
        ),
        ("links", f"{rate_text(settings.link)} each way; origin {rate_text(settings.origin_link)}"),
        ("rounds", f"{len(result.runs)}; the figures above are medians, the pictures the middle one"),
    ]
    busy = middle(result.runs).busy
    if busy is not None:
        facts.append(
            (
                "busy", f"{busy['all']:.0%} of {busy['cores']} cores: {busy['ours']:.0%} the fleet and this tool, "
                f"{busy['network']:.0%} the network, {busy['others']:.0%} other work",
            )
        )  # fmt: skip
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in facts)}</dl>"
