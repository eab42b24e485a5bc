"""Small fleets in virtual time, as the tests of the planner use them: the simulator of ``weightcache simulate``."""

from __future__ import annotations

import random
from dataclasses import dataclass

from weightcache.core.events import Reach
from weightcache.core.layout import ChunkPlan
from weightcache.tools.sim_fleet import Blob, Fleet, Host

MIB = 1 << 20
HOSTS = 8
SIZE = 300_000_000
LINK = ORIGIN = 50e6  # bytes/s: 400 Mbit/s
BOUND = SIZE / LINK


def a_plan(seed: int) -> ChunkPlan:
    draw, starts, at = random.Random(seed), [], 0
    while at < SIZE:
        starts.append(at)
        at += draw.choice([1, 2, 4, 8]) * MIB
    return ChunkPlan(SIZE, tuple(starts))


@dataclass
class Herd:
    """Eight hosts; those that are not warm start within a second."""

    fleet: Fleet
    hosts: list[Host]
    seed: int

    @classmethod
    def of(
        cls, seed: int, *, warm: int = 0, reach: Reach = Reach.RANGED, crawls: bool = False, lies: bool = False
    ) -> Herd:
        fleet = Fleet(seed, [Blob(b"b" * 32, a_plan(seed), reach=reach)], LINK, ORIGIN)
        first = fleet.add(LINK / 10 if crawls else None, lies=lies, warm=warm > 0)
        hosts = [first, *(fleet.add(warm=number < warm) for number in range(1, HOSTS))]
        for host in hosts[warm:]:
            fleet.start(host, fleet.random.random())
        return cls(fleet, hosts, seed)

    def ends(self, egress: float, last: float, but: int = 0) -> None:
        """Run it; all but the first ``but`` hosts have ended, whole, within ``last`` times the bound of their start."""
        self.fleet.run()
        for host in self.hosts:
            assert all(not why for _, why in host.ended.values()), f"seed {self.seed}: {host.ended}"
        took = max(at - host.began for host in self.hosts[but:] for at, _ in host.ended.values())
        sent = self.fleet.egress / SIZE
        assert sent <= egress, f"seed {self.seed}: the origin was read {sent:.3f} times"
        assert took <= last * BOUND, f"seed {self.seed}: the last host took {took / BOUND:.2f} times the bound"
