"""``weightcache coldstart``: where the seconds of a fleet's cold start went. What runs it is imported when it runs."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightcache.config import Config
from weightcache.errors import ConfigError, WeightcacheError
from weightcache.tools import exits
from weightcache.tools.options import parse_size

if TYPE_CHECKING:
    from weightcache.tools.coldstart_run import Result
    from weightcache.tools.coldstart_settings import Settings

Json = dict[str, Any]
VIA = "ssh {host} weightcache"


def coldstart(
    config: Config,
    as_json: bool,
    source: Annotated[
        str | None, typer.Argument(metavar="[SOURCE]", help="what to load; or have --size made", show_default=False)
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", "-n", metavar="N", help="daemons to start")] = 4,
    size: Annotated[
        int | None, typer.Option("--size", parser=parse_size, metavar="SIZE", help="load a made-up checkpoint")
    ] = None,
    link: Annotated[str | None, typer.Option(metavar="RATE", help="of each node's link, such as 2gbit")] = None,
    origin_link: Annotated[str | None, typer.Option(metavar="RATE", help="of the origin's link")] = None,
    warm: Annotated[int, typer.Option(metavar="K", help="nodes that have it already")] = 0,
    kill: Annotated[
        str | None, typer.Option(metavar="WHEN[:NODE]", help="kill one after so many seconds, or half way: half")
    ] = None,
    slow: Annotated[float | None, typer.Option(metavar="FACTOR", help="one link at a fraction of --link")] = None,
    join_after: Annotated[float | None, typer.Option(metavar="SECONDS", help="one node starts later")] = None,
    corrupt: Annotated[bool, typer.Option("--corrupt", help="one warm node, whose disk has flipped bits")] = False,
    rounds: Annotated[int, typer.Option(metavar="N", help="how often; medians are reported")] = 1,
    no_baseline: Annotated[bool, typer.Option("--no-baseline", help="not also without peers")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="daemons that never loaded anything: their start counts")
    ] = False,
    load: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="workers load it there, too: cpu, cuda; needs torch")
    ] = None,
    loopback: Annotated[bool, typer.Option("--loopback", help="no network namespaces, though root could")] = False,
    hosts: Annotated[
        str | None, typer.Option(metavar="HOST,...", help="daemons that are there: hosts, or paths of sockets")
    ] = None,
    via: Annotated[str, typer.Option(metavar="COMMAND", help="how weightcache is run on a host")] = VIA,
    evict: Annotated[bool, typer.Option("--evict", help="with --hosts: have them forget SOURCE first")] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="a page for a browser, or for a slide")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="where stores are made: the disk to measure [/tmp]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="also if this machine seems too small")] = False,
) -> None:
    """Measure a fleet's cold start, stage by stage.

    It runs N real daemons that load the same thing at the same moment, and once more without peers. As root they live
    in network namespaces, behind links of the given rates; else on loopback, without. SOURCE is copied once and served
    to them by a local origin, behind its own link. Or --hosts: daemons that are there already; --link and --origin-link
    then only say what their links are.

    The bound is what no fleet can beat: the object once over the origin's link (unless some node has it), and once
    over each node's own. Exits 1 if a node fails or bytes differ.

    \b
    weightcache coldstart --size 300MB --nodes 8 --link 400mbit --origin-link 400mbit --report herd.html
    weightcache coldstart hf://org/name --nodes 4 --warm 1 --kill half
    weightcache coldstart s3://models/sdxl.safetensors --hosts gpu-1,gpu-2,gpu-3 --evict
    """
    from weightcache.tools.coldstart_settings import Settings, parse_kill, parse_rate

    settings = Settings(
        source, size, nodes, parse_rate(link) if link else None, parse_rate(origin_link) if origin_link else None,
        warm, parse_kill(kill) if kill else None, slow, join_after, corrupt, rounds, not no_baseline, fresh, load,
        force,
    )  # fmt: skip
    settings.check()
    if report is not None:
        _check_report(report)
    if hosts is not None:
        names = [name.strip() for name in hosts.split(",") if name.strip()]
        work = _there(settings, names, via, evict=evict, loopback=loopback)
    elif evict:
        raise ConfigError("--evict: only with --hosts; nodes that are started have nothing yet")
    else:
        work = _here(settings, config, folder or Path(tempfile.gettempdir()), loopback=loopback)
    result, stopped = asyncio.run(_interruptible(work))
    code = _tell(result, report, as_json) if result is not None and result.runs else 0
    if stopped or code:
        raise typer.Exit(stopped or code)


def _check_report(report: Path) -> None:
    """Raise ConfigError before anything runs, rather than after minutes."""
    folder = report.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"--report {report}: there is no such directory")
    if report.is_dir() or not os.access(report if report.exists() else folder, os.W_OK):
        raise ConfigError(f"--report {report}: it cannot be written; choose another file")


async def _interruptible(work: Any) -> tuple[Result | None, int]:
    """The result, and the code to exit with when a signal ended it."""
    from weightcache.tools.coldstart_run import ending_with

    async with ending_with(asyncio.current_task()) as got:
        try:
            return await work, 0
        except asyncio.CancelledError:
            return None, 128 + got[0] if got else exits.INTERRUPTED


async def _here(settings: Settings, config: Config, folder: Path, *, loopback: bool) -> Result:
    from weightcache.tools import coldstart_run as run
    from weightcache.tools.coldstart_show import watching

    if settings.device is not None:
        from importlib.util import find_spec

        if find_spec("torch") is None:
            raise ConfigError("--load needs torch: pip install 'weightcache[torch]'")
    why = run.why_no_network(settings, loopback=loopback)
    with watching() as watcher:
        async with run.stage(settings, config, folder, watcher, network=not why) as stage:
            shown = settings.source or "a made-up checkpoint"
            result = run.Result(settings, shown, stage.size, len(stage.digests), not why)
            if why:
                result.notes.append(f"on loopback, because {why}: nothing limits the links")
            await run.measure(stage, watcher, result)
    return result


async def _there(settings: Settings, names: list[str], via: str, *, evict: bool, loopback: bool) -> Result:
    from weightcache.tools import coldstart_hosts
    from weightcache.tools.coldstart_run import Result
    from weightcache.tools.coldstart_show import watching

    coldstart_hosts.check(settings, names, loopback=loopback)
    result = Result(settings, settings.source or "", 0, 0, False)
    with watching() as watcher:
        for _ in range(settings.rounds):
            run = await coldstart_hosts.play(settings, names, via, watcher, evict=evict)
            result.runs.append(run)
            result.size = run.size
    result.notes.append("a fleet that is there: nothing is measured without peers")
    if all(node.warm for run in result.runs for node in run.nodes):
        result.notes.append("every host had it already: --evict makes them forget it first")
    return result


def _tell(result: Result, report: Path | None, as_json: bool) -> int:
    """Print it, write the page; the code to exit with."""
    from weightcache.tools import coldstart_machine, coldstart_show
    from weightcache.tools.coldstart_measures import summary

    command = shlex.join(["weightcache", *sys.argv[1:]])
    if as_json or report is not None:
        whole: Json = {
            "command": command,
            "source": result.source,
            "size": result.size,
            "namespaces": result.namespaces,
            "settings": dataclasses.asdict(result.settings),
            "machine": coldstart_machine.facts(),
            "summary": summary(result.runs, result.alone),
            "runs": [run.to_json() for run in result.runs],
            "without_peers": [run.to_json() for run in result.alone],
            "notes": result.notes,
            "failures": result.failures,
        }
        if report is not None:
            from weightcache.tools.coldstart_page import page

            try:
                report.write_text(page(result, whole))
            except OSError as error:
                raise ConfigError(f"--report {report}: {error.strerror}") from None
    if as_json:
        print(json.dumps(whole), flush=True)
    else:
        print(coldstart_show.final(result))
        if report is not None:
            print(f"\nreport: {report}")
    return WeightcacheError.exit_code if result.failures else 0
