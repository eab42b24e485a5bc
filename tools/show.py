"""How things look in a terminal: sizes, times, columns. Nothing here needs more than the standard library."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

Json = dict[str, Any]
Rows = Iterable[Sequence[object]]


def plain(text: object) -> str:
    """``text`` without what could move the cursor or forge a line: it may come from a peer or an origin."""
    return "".join(char if char.isprintable() else "�" for char in str(text))


def human(size: float) -> str:
    """Bytes as a person reads them, in powers of 1000 as the settings take them: ``90.9 MB``."""
    for unit in _UNITS:
        if abs(size) < 999.95 or unit == _UNITS[-1]:
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def percent(part: float, whole: float) -> str:
    """``part`` of ``whole``, never rounded up to all of it."""
    if part >= whole:
        return "100 %" if whole else "-"
    return f"{min(99.9, 100 * part / whole):.1f} %"


def duration(seconds: float) -> str:
    """``3 ms``, ``0.61 s``, ``4 min``, ``3 h``, ``2 days``."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or name == "min":
            break
    return f"{seconds / size:.0f} {name}"


def ago(when: float) -> str:
    """How long ago a time (seconds since the epoch) was."""
    seconds = round(time.time() - when)
    return f"{duration(seconds).replace('.00', '')} ago" if seconds > 0 else "now"


def rate(size: float, seconds: float) -> str:
    return f"{human(size / seconds)}/s" if seconds > 0 else "-"


def columns(head: Sequence[str], rows: Rows, right: str = "") -> str:
    """Rows under a head, two spaces between columns. ``right`` names the columns that are set flush right."""
    cells = [list(head), *([plain(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    flush = [name in right.split(",") for name in head]
    lines = (
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, flush, strict=True)
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines)


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values, one pair a line."""
    shown = [(name, plain(value)) for name, value in pairs]
    width = max(len(name) for name, _ in shown)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in shown)


def as_line(value: object) -> str:
    """One line of JSON."""
    return json.dumps(value)


# -- what each command prints


def pulled(report: Json) -> str:
    """A finished load: bytes by source, seconds, where it lies, and what fell back."""
    total, seconds = report["bytes_total"], report["seconds"]
    by = report["bytes_by_source"]
    sources = [("local disk", by["local"]), *((f"peer {peer}", size) for peer, size in sorted(by["peer"].items()))]
    sources.append(("origin", by["origin"]))
    rows = [(name, human(size), percent(size, total)) for name, size in sources if size]
    stages = ", ".join(f"{name} {duration(spent)}" for name, spent in report["stages"].items())
    here = by["local"] == total
    speed = "all of it was here" if here else f"{human(total)} in {duration(seconds)}, {rate(total, seconds)}"
    lines = [f"{plain(report['source'])}  {speed}"]
    if not here:
        lines += ["  " + line for line in columns(("from", "bytes", "share"), rows, "bytes,share").splitlines()]
    if known := already(report["bytes_here"], report["bytes_nearby"], total):
        lines.append(f"  when it began: {known.removesuffix('; pulling the rest')}")
    lines += [f"  seconds: {stages}", f"  path: {plain(report['path'])}"]
    lines += [f"  fell back: {plain(reason)}" for reason in report["fallbacks"]]
    return "\n".join(lines)


def already(here: int, nearby: int, total: int) -> str:
    """How much of a source need not come from its origin, before the first byte has: "" for nothing worth a word."""
    parts = [(here, "is here already"), (nearby, "is in other files of peers")]
    said = [f"{100 * size // total}% {where}" for size, where in parts if total and 100 * size >= total]
    return f"{', '.join(said)}; pulling the rest" if said and here < total else ""


def listing(found: Json) -> str:
    """What the store holds."""
    if not found["blobs"]:
        return "nothing yet; bring something with: weightcache pull SOURCE"
    snapshots = [
        (
            human(snapshot["size"]),
            percent(snapshot["had"], snapshot["size"]),
            len(snapshot["files"]),
            snapshot["revision"][:12],
            snapshot["source"],
        )
        for snapshot in sorted(found["snapshots"], key=lambda snapshot: str(snapshot["source"]))
    ]
    blobs = [
        (blob["blob"][:12], human(blob["size"]), _state(blob), ago(blob["last_used"]), blob["name"])
        for blob in sorted(found["blobs"], key=lambda blob: -blob["last_used"])
    ]
    parts = [columns(("BLOB", "SIZE", "STATE", "USED", "FILE"), blobs, "SIZE")]
    if snapshots:
        parts.insert(0, columns(("SIZE", "HERE", "FILES", "REVISION", "SOURCE"), snapshots, "SIZE,HERE,FILES"))
    return "\n\n".join(parts)


def _state(blob: Json) -> str:
    state = blob["state"] if blob["state"] == "complete" else f"partial {percent(blob['had_bytes'], blob['size'])}"
    more = [name for name in ("pinned", "suspect") if blob[name]]
    if blob["leases"]:
        more.append("leased")
    if blob["shared"]:
        more.append("shared")
    return ", ".join([state, *more])


def status(found: Json) -> str:
    """One daemon, as it sees itself."""
    used, moved, blobs = found["bytes"], found["moved"], found["blobs"]
    capacity = human(used["capacity"]) if used["capacity"] is not None else "the disk's"
    pairs: list[tuple[str, object]] = [
        ("version", found["version"]),
        ("node", found["node"]),
        ("datacenter", found["datacenter"]),
        ("up", duration(found["uptime_seconds"])),
        ("store", found["store"]),
        ("socket", found["socket"]),
        ("listens", found["listen"] or "no: it serves nobody"),
        ("peers", found["peers"]),
        ("directory", _directory(found["directory"])),
        ("blobs", f"{blobs['complete']} complete, {blobs['partial']} partial"),
        ("bytes", f"{human(used['used'])} used, {human(used['free'])} free, capacity: {capacity}"),
        ("received", f"{human(moved['origin'])} from origins, {human(sum(moved['peer'].values()))} from peers"),
        ("sent", f"{human(sum(moved['sent'].values()))} to peers"),
        ("processes", _processes(found["processes"])),
    ]
    pairs += [
        ("loading", f"{load['source']}: {human(load['size'])}, {load['had_chunks']} of {load['chunks']} chunks")
        for load in found["loads"]
    ]
    return facts(pairs)


def _processes(found: Json) -> str:
    """Process ids by role, of those that run."""
    return ", ".join(f"{role} {' '.join(map(str, pids))}" for role, pids in found.items() if pids)


def _directory(found: Json) -> str:
    if found["trouble"]:
        return f"{found['discover']}: lost, the last known view is kept: {found['trouble']}"
    return f"{found['discover']}: {found['members']} members"


def peers(rows: Sequence[Json]) -> str:
    """Who is connected, and who is not."""
    if not rows:
        return "none; see --peer and --discover of: weightcache daemon --help"
    return columns(
        ("PEER", "DATACENTER", "STATE", "RATE", "RECEIVED", "SENT", "WHY"),
        [
            (
                row["address"],
                row.get("datacenter", "-"),
                row["state"],
                f"{human(row['bytes_per_second'])}/s" if row.get("received") else "-",  # till then it is a guess
                human(row.get("received", 0)),
                human(row.get("sent", 0)),
                row.get("why") or "",
            )
            for row in rows
        ],
        "RATE,RECEIVED,SENT",
    )


def evicted(outcome: Json) -> str:
    """What went, and what stays."""
    lines = [f"freed {human(outcome['freed'])}"]
    if outcome["kept"]:
        rows = [(kept["blob"][:12], kept["why"], kept["path"]) for kept in outcome["kept"]]
        lines.append(columns(("KEPT", "WHY", "FILE"), rows))
    return "\n".join(lines)


def verified(rows: Sequence[Json]) -> str:
    """What was read again, and what was found bad."""
    total = sum(row["size"] for row in rows)
    bad = [row for row in rows if row["bad"]]
    lines = [f"read {len(rows)} blobs, {human(total)}: " + (f"{len(bad)} had bad chunks" if bad else "all good")]
    if bad:
        outcomes = [(row["blob"], len(row["bad"]), _mended(row), row["path"]) for row in bad]
        lines.append(columns(("BLOB", "BAD", "OUTCOME", "FILE"), outcomes, "BAD"))
    return "\n".join(lines)


def _mended(row: Json) -> str:
    if row["error"]:
        return f"not repaired: {row['error']}"
    return "repaired" if row["repaired"] is not None else "not repaired: those chunks are missing now"


def manifests(files: Sequence[Json]) -> str:
    """The chunks of each file."""
    return "\n\n".join(_manifest(file) for file in files)


def _manifest(file: Json) -> str:
    chunks = file["chunks"]
    known = sum(chunk["id"] is not None for chunk in chunks)
    title = f"{plain(file['path'])}: {human(file['size'])} in {len(chunks)} chunks"
    if known < len(chunks):
        title += f", the ids of {len(chunks) - known} not known yet: nobody has read them"
    head, right = ["OFFSET", "LENGTH", "ID"], "OFFSET,LENGTH"
    rows = [[chunk["offset"], chunk["length"], (chunk["id"] or "-")[:16]] for chunk in chunks]
    if any("tensors" in chunk for chunk in chunks):
        head.append("TENSORS THAT BEGIN HERE")
        for row, chunk in zip(rows, chunks, strict=True):
            row.append(_few(chunk["tensors"]))
    return f"{title}\n{columns(head, rows, right)}" if rows else title


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def shared(here: str, there: str, common: Json) -> str:
    """How much of one file is in another."""
    text = (
        f"{human(common['bytes'])} of {human(common['of_bytes'])} ({percent(common['bytes'], common['of_bytes'])}), "
        f"{common['chunks']} of {common['of_chunks']} chunks of {plain(here)} are in {plain(there)}, too"
    )
    for name, unknown in zip((here, there), common["unknown"], strict=True):
        if unknown:
            text += f"\nnot known yet: the ids of {unknown} chunks of {plain(name)}, which nobody has read"
    return text
