"""``weightcache simulate`` on the command line: its options. What it does is in simulate.py, imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from weightcache.config import Config
from weightcache.tools import show
from weightcache.tools.options import parse_size


def simulate(
    config: Config,
    as_json: bool,
    hosts: Annotated[int, typer.Option("--hosts", metavar="N", help="that load")] = 8,
    size: Annotated[int, typer.Option("--size", parser=parse_size, metavar="SIZE", help="of the object")] = "300MB",  # type: ignore[assignment]
    chunk: Annotated[int, typer.Option("--chunk", parser=parse_size, metavar="SIZE", help="of a chunk")] = "2MiB",  # type: ignore[assignment]
    link: Annotated[str, typer.Option("--link", metavar="RATE", help="of each host, each way")] = "400mbit",
    origin: Annotated[str, typer.Option("--origin", metavar="RATE", help="of the origin, for all")] = "400mbit",
    latency: Annotated[float, typer.Option("--latency", metavar="SECONDS", help="of a message")] = 0.0005,
    spread: Annotated[float, typer.Option("--spread", metavar="SECONDS", help="within which hosts start")] = 1.0,
    warm: Annotated[int, typer.Option("--warm", metavar="K", help="hosts that have it all")] = 0,
    churn: Annotated[float, typer.Option("--churn", metavar="SHARE", help="of hosts replaced each second")] = 0.0,
    stragglers: Annotated[float, typer.Option("--stragglers", metavar="SHARE", help="of hosts that crawl")] = 0.0,
    slow: Annotated[float, typer.Option("--slow", metavar="FACTOR", help="by which they are slower")] = 10.0,
    liars: Annotated[float, typer.Option("--liars", metavar="SHARE", help="of hosts that send other bytes")] = 0.0,
    disagree: Annotated[
        float, typer.Option("--disagree", metavar="SHARE", help="of hosts that see half the fleet")
    ] = 0.0,
    components: Annotated[int, typer.Option("--components", metavar="N", help="needed one after the other")] = 1,
    streamed: Annotated[bool, typer.Option("--streamed", help="the origin knows no ranges")] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="the same one plays the same again")] = 1,
) -> None:
    """Play a fleet that loads at once, in virtual time.

    The planner is the one that ships; network, origin and clock are simulated. Prints how far from the bound
    max(size / origin, size / link) the hosts end, and what the origin sent. Hosts that crawl or lie are not counted.
    Exits 1 when an invariant breaks.

    \b
    weightcache simulate --hosts 8 --size 300MB --link 400mbit --origin 400mbit
    weightcache simulate --hosts 100 --size 2GB --link 100gbit --origin 40gbit --churn 0.01 --stragglers 0.02
    """
    from weightcache.tools import simulate as simulation
    from weightcache.tools.coldstart_settings import parse_rate

    scenario = simulation.Scenario(
        hosts, size, chunk, parse_rate(link) / 8, parse_rate(origin) / 8, latency, spread, warm, churn,
        stragglers, slow, liars, disagree, components, streamed, seed,
    )  # fmt: skip
    found = simulation.watched(scenario)
    print(show.as_line(found) if as_json else simulation.shown(found))
