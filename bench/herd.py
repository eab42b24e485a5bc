"""A fleet that starts at once: the tables of issue 4, on real daemons behind real links, with the cold-start tool.

Each run has a fleet of its own. libtorrent has the same hosts, links and file, with its one seeder where the origin is.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bench import rivals, rounds
from bench.hosts import MB
from bench.run import Run
from bench.standing import Standing
from bench.table import Column, Row, Table, at_least, at_most
from weightcache.config import Config
from weightcache.tools.coldstart_machine import CpuMeter
from weightcache.tools.coldstart_measures import Run as Played
from weightcache.tools.coldstart_measures import ratio, slowest
from weightcache.tools.coldstart_net import missing
from weightcache.tools.coldstart_run import Stage, play, stage
from weightcache.tools.coldstart_settings import Kill, Settings
from weightcache.tools.coldstart_show import Quiet

HOSTS = 8
PIECE, PORT = 1 << 20, 6881  # of libtorrent
RATE = 400e6  # bits a second, of every link: at this rate two cores are not the limit, as the table shows
SLOW = 0.1
COLUMNS = (
    Column("seconds", "last host\nseconds", "{:.2f}", bars=True),
    Column("distance", "times\nthe bound", "{:.2f}"),
    Column("egress", "origin sent\ntimes the size", "{:.3f}"),
    Column("share", "of its link\nleast", "{:.2f}"),
    Column("most", "most one sent\ntimes fair share", "{:.2f}"),
    Column("busy", "cores busy\nshare", "{:.2f}"),
    Column("ours", "by this\nshare", "{:.2f}"),
    Column("others", "by others\nshare", "{:.2f}"),
)
ABOUT = (
    "Real daemons in network namespaces, each behind a link that 'tc' shapes both ways; the origin behind its own. The "
    "bound: the object once over the origin's link, unless a host has it, and once over each host's own, at the "
    "nominal rate (headers take 4% of it). Daemons have loaded something before, and start this load within "
    "milliseconds of one another. Every host's bytes are compared with the object's. Medians over rounds."
)
BOUND, COLD, ALONE, TORRENT = "limit: the bound", "weightcache, all cold", "without peers", "libtorrent"
ONE_WARM, ONE_COLD = "weightcache, 1 warm", "weightcache, 7 warm"


def herd(run: Run) -> Table:
    """Cold, nearly cold and nearly warm, without peers, and libtorrent."""
    size = run.size(300 * MB, 40 * MB)
    table = Table("herd", f"{HOSTS} hosts at once, links and origin of 400 Mbit/s, {size / MB:.0f} MB", ABOUT, COLUMNS)
    if why := missing():
        table.rows.append(Row(BOUND, skipped=why))
    else:
        asyncio.run(_herd(run, table, Settings(size=size, nodes=HOSTS, link=RATE, origin_link=RATE)))
    table.expect(at_most(1.02, "times the size left the origin, all cold"), COLD, "egress")
    table.expect(at_most(1.2, "times the bound, all cold"), COLD, "distance")
    table.expect(at_least(6, "times as fast as without peers"), ALONE, "seconds", COLD)
    table.expect(at_least(1, "times as fast as libtorrent"), TORRENT, "seconds", COLD)
    table.expect(at_most(0, "times the size left the origin, 1 warm"), ONE_WARM, "egress")
    table.expect(at_most(1.3, "times the bound, 1 warm"), ONE_WARM, "distance")
    table.expect(at_least(0.9, "of its link, 7 warm"), ONE_COLD, "share")
    table.expect(at_most(1.5, "times its fair share, the warm host that sent most"), ONE_COLD, "most")
    table.expect(at_most(0.9, "of all cores busy, all cold: the links are the limit"), COLD, "busy")
    return table


async def _herd(run: Run, table: Table, settings: Settings) -> None:
    async with stage(settings, Config(), run.folder, Quiet(), network=True) as made:
        cases = {COLD: settings, ONE_WARM: replace(settings, warm=1), ONE_COLD: replace(settings, warm=HOSTS - 1)}
        played = await _rounds(run, {name: _playing(made, case) for name, case in cases.items()})
        alone = await play(made, settings.alone(), Quiet(), "", peers=False)
        swarm, why = await _torrents(run, made)
    least = played[COLD][0].least or 0.0
    table.rows.append(Row(BOUND, {"seconds": least, "distance": 1.0, "egress": 1.0}))
    table.rows += [_row(name, runs) for name, runs in played.items()]
    table.rows.append(_row(ALONE, [alone]))
    table.rows.append(Row(TORRENT, skipped=why) if why else _swarm(swarm, least))
    table.facts |= {"rounds": run.rounds, "rounds without peers": 1}


def herd_disturbed(run: Run) -> Table:
    """One host of eight dies, crawls, or has a bad disk: what that costs the others."""
    size = run.size(300 * MB, 40 * MB)
    table = Table(
        "herd-disturbed", f"{HOSTS} hosts at once and one of them disturbed, 400 Mbit/s, {size / MB:.0f} MB",
        f"{ABOUT} Seconds are those of the last host that is not disturbed. A corrupt host says to have all of it, and "
        "a bit of each chunk on its disk is flipped.", COLUMNS,
    )  # fmt: skip
    calm = Settings(size=size, nodes=HOSTS, link=RATE, origin_link=RATE)
    cases = {
        COLD: calm,
        "killed at half time": replace(calm, kill=Kill(None, None)),
        "link of a tenth": replace(calm, slow=SLOW),
        "corrupt": replace(calm, corrupt=True),
    }
    if why := missing():
        table.rows.append(Row(COLD, skipped=why))
    else:
        asyncio.run(_disturbed(run, table, cases))
    for name in list(cases)[1:]:
        table.expect(at_most(1.3, f"times undisturbed: {name}"), name, "seconds", COLD)
        table.expect(at_most(1.1, f"times the size left the origin: {name}"), name, "egress")
    return table


async def _disturbed(run: Run, table: Table, cases: dict[str, Settings]) -> None:
    async def staged(case: Settings) -> Played:
        # A stage for each: their links differ.
        async with stage(case, Config(), run.folder, Quiet(), network=True) as made:
            return await play(made, case.roles(), Quiet(), "", peers=True)

    def playing(case: Settings) -> Callable[[], Awaitable[Played]]:
        return lambda: staged(case)

    played = await _rounds(run, {name: playing(case) for name, case in cases.items()})
    table.rows += [_row(name, runs) for name, runs in played.items()]
    table.facts["rounds"] = run.rounds


def _playing(made: Stage, case: Settings) -> Callable[[], Awaitable[Played]]:
    return lambda: play(replace(made, settings=case), case.roles(), Quiet(), "", peers=True)


async def _rounds(run: Run, cases: dict[str, Callable[[], Awaitable[Played]]]) -> dict[str, list[Played]]:
    """Every case in turn, as often as there are rounds. A run with a failure or a wrong byte ends it all."""
    played: dict[str, list[Played]] = {name: [] for name in cases}
    for _ in range(run.rounds):
        for name, case in cases.items():
            one = await case()
            if one.failures:
                raise SystemExit(f"{name}: {'; '.join(one.failures)}")
            played[name].append(one)
    return played


def _row(name: str, runs: Sequence[Played]) -> Row:
    def median(value: Callable[[Played], float | None]) -> float | None:
        found = [one for one in map(value, runs) if one is not None]
        return statistics.median(found) if found else None

    values = {
        "seconds": median(lambda one: slowest(one.counted)),
        "distance": median(lambda one: ratio(one.last, one.least)),
        "egress": median(lambda one: ratio(one.egress, one.size)),
        "share": median(lambda one: min((node.line_share() or 0.0 for node in one.counted), default=None)),
        "most": median(_most_sent),
        "busy": median(lambda one: one.busy["all"] if one.busy else None),
        "ours": median(lambda one: one.busy["ours"] + one.busy["network"] if one.busy else None),
        "others": median(lambda one: one.busy["others"] if one.busy else None),
    }
    note = "; ".join(_spread(runs)) if len(runs) > 1 else ""
    return Row(name, {key: value for key, value in values.items() if value is not None}, note)


def _spread(runs: Sequence[Played]) -> Iterable[str]:
    seconds = [one.last for one in runs if one.last is not None]
    yield f"{min(seconds):.2f} to {max(seconds):.2f} s"
    egress = [one.egress / one.size for one in runs if one.egress is not None]
    yield f"egress {min(egress):.3f} to {max(egress):.3f}"


def _most_sent(one: Played) -> float | None:
    """What the warm host that sent most sent, of what each would have if they shared it alike."""
    sent = [node.sent for node in one.nodes if node.warm and node.what != "corrupt"]
    return max(sent) / (sum(sent) / len(sent)) if sent and sum(sent) else None


# -- libtorrent


async def _torrents(run: Run, made: Stage) -> tuple[list[tuple[float, float, float]], str]:
    """Seconds, share that the seeder sent, and how busy the cores were, a round each; or why there are none."""
    try:
        rivals.module("libtorrent")
        return [await asyncio.to_thread(_torrent, made, run.folder / f"torrent{n}") for n in range(run.rounds)], ""
    except rounds.Unavailable as error:
        return [], str(error)


def _torrent(made: Stage, folder: Path) -> tuple[float, float, float]:
    net = made.place.network
    assert net is not None
    (path,) = (made.place.folder / "objects").glob("*.safetensors")
    hosts = [name for name in net.address if name != "origin"]
    folder.mkdir()
    meta = folder / "meta"
    with ExitStack() as stack:
        enter = stack.enter_context
        home = net.address["origin"]
        seeder = enter(
            Standing("bench.torrent", "seed", str(path), str(meta), home, str(PIECE), prefix=net.inside("origin"))
        )
        known = [f"{home}:{seeder.line()}"]
        swarm = []
        for host in hosts:
            # Each connects to those before it, and to the seeder; a connection serves both ways.
            fetcher = Standing("bench.torrent", "fetch", str(meta), net.address[host], *known, prefix=net.inside(host))
            swarm.append((host, enter(fetcher).start()))
            known.append(f"{net.address[host]}:{PORT}")
        for host, _ in swarm:
            (folder / host).mkdir()
        meter = CpuMeter()
        with ThreadPoolExecutor(len(swarm)) as threads:
            seconds = list(threads.map(lambda one: one[1].seconds(folder / one[0]), swarm))
        busy = meter.read().all
        sent = seeder.seconds("")
        for host, _ in swarm:
            if (folder / host / path.name).read_bytes() != path.read_bytes():
                raise SystemExit("libtorrent: wrong bytes")
            (folder / host / path.name).unlink()
    return max(seconds), sent / made.size, busy


def _swarm(found: Sequence[tuple[float, float, float]], least: float) -> Row:
    seconds, egress, busy = (statistics.median(column) for column in zip(*found, strict=True))
    note = "SHA-1, uTP off; one seeder where the origin is; pieces of 1 MiB; from the connection to the last piece"
    return Row(TORRENT, {"seconds": seconds, "distance": seconds / least, "egress": egress, "busy": busy}, note)
