"""Fleets of up to 10,000 hosts in virtual time: the planner that ships, from one seed each, on all cores.

Growth is shown with objects of one size. For the largest fleets the object is smaller, and 24 GB come in chunks of
64 MiB: a simulated chunk costs as much as a real one's decisions do.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from bench.run import Run
from bench.table import Column, Row, Table, at_most
from weightcache.tools.simulate import Scenario, play

READ, LARGE = 8 << 20, 64 << 20  # bytes of a chunk
FAST = Scenario(chunk=LARGE, link=12.5e9, origin=5e9, spread=0.1)  # 100 Gbit/s each, 40 for all
EIGHT = "8 hosts, 300 MB"
COLUMNS = (
    Column("bound", "bound\nseconds"),
    Column("last", "last host\ntimes the bound", bars=True),
    Column("p99", "p99\ntimes the bound"),
    Column("egress", "origin sent\ntimes the size", "{:.3f}"),
    Column("first", "first component\nof the bound"),
    Column("came", "by then of\nthe bytes", "{:.3f}"),
    Column("messages", "messages, a host\nand chunk", "{:.1f}"),
    Column("decision", "microseconds\na decision", "{:.0f}"),
    Column("minutes", "minutes\nthis took", "{:.1f}"),
)
ABOUT = (
    "Network, origin and clock are simulated. 8 hosts: links and origin of 400 Mbit/s, as in 'herd'. 24 and 12 GB: "
    "links of 100 Gbit/s, 40 for the origin; the former has four components, needed one after the other. Churn: "
    "each second 1% of the hosts leave and as many join; 2% have a tenth of the link. 1 GiB: links of 10 Gbit/s, 4 for "
    "the origin. 512 MiB: links of 100 Gbit/s; so small an object comes in the time of a few messages: that grows."
)


def simulated(run: Run) -> Table:
    """How far from the bound, what the origin sends, and how both grow with the fleet."""
    many, most = (100, 1_000) if run.quick else (1_000, 10_000)
    large, churn, largest = f"{many:,}, 24 GB", f"{many:,}, 12 GB, churn, stragglers", f"{most:,}, 1 GiB"
    table = Table("simulated", "fleets in virtual time", ABOUT, COLUMNS)
    growth = {f"{hosts:,}, 512 MiB": hosts for hosts in (10, 100, 1_000, most)}
    fleets = {
        EIGHT: Scenario(spread=0.05),
        large: replace(FAST, hosts=many, size=24_000_000_000, components=4),
        churn: replace(FAST, hosts=many, size=12_000_000_000, churn=0.01, stragglers=0.02),
        largest: Scenario(most, 128 * READ, READ, 1.25e9, 0.5e9, spread=0.1),
    }
    small = replace(FAST, size=64 * READ, chunk=READ, spread=0.05)
    fleets |= {name: replace(small, hosts=hosts) for name, hosts in growth.items()}
    with ProcessPoolExecutor(os.cpu_count()) as cores:
        # The longest first: the others fill up what is left of the cores.
        order = sorted(fleets, key=lambda name: -fleets[name].hosts * fleets[name].size / fleets[name].chunk)
        found = dict(zip(order, cores.map(play, [fleets[name] for name in order]), strict=True))
    for name in fleets:
        one = found[name]
        values = {
            "bound": one["bound"], "last": one["last_over_bound"], "p99": one["p99_over_bound"],
            "egress": one["egress"], "messages": one["messages_per_host_and_chunk"],
            "decision": one["microseconds_per_decision"], "minutes": one["seconds"] / 60,
        }  # fmt: skip
        if name == large:
            values |= {"first": one["first_component_seconds"] / one["bound"], "came": one["first_component_came"]}
        table.rows.append(Row(name, values, note=", ".join(one["failed"])))
    table.expect(at_most(1.2, f"times the bound, last host: {EIGHT}"), EIGHT, "last")
    table.expect(at_most(1.25, f"times the bound, last host: {large}"), large, "last")
    table.expect(at_most(1.05, f"times the size left the origin: {large}"), large, "egress")
    table.expect(at_most(0.275, "of the bytes had come when the first quarter was complete"), large, "came")
    table.expect(at_most(10, f"minutes: {large}"), large, "minutes")
    for name in (churn, largest):
        table.expect(at_most(1.6, f"times the bound, p99: {name}"), name, "p99")
        table.expect(at_most(1.1, f"times the size left the origin: {name}"), name, "egress")
    least, *_, last = growth
    table.expect(at_most(4, f"times as long for {most:,} hosts as for 10: the logarithm"), last, "last", least)
    table.expect(at_most(26, f"messages a host and chunk: {largest}"), largest, "messages")
    return table
