"""What a cold start is made of: nodes, links, disturbances. Read and checked before anything runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from weightcache.errors import ConfigError

_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?)bit(?:/s)?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
SLOWEST = 0.001  # of a link

Kind = Literal["cold", "warm", "corrupt"]


@dataclass(frozen=True, slots=True)
class Kill:
    """``at``: seconds after the start, or None: once half of all bytes have come. ``node``: its number, from 1."""

    at: float | None
    node: int | None


@dataclass(frozen=True, slots=True)
class Role:
    """What one node does. ``link``: bits a second, None: not shaped. ``delay``: seconds that it starts later."""

    name: str
    kind: Kind = "cold"
    link: float | None = None
    slow: float = 1.0
    delay: float = 0.0
    kill: Kill | None = None

    @property
    def counts(self) -> bool:
        """Whether the fleet's figures are of it: it starts cold, and nothing is done to it."""
        return self.kind == "cold" and self.slow == 1 and self.kill is None and not self.delay

    @property
    def what(self) -> str:
        """For people: what is special about it, or ""."""
        said: list[str] = [] if self.kind == "cold" else [self.kind]
        said += [f"link x {self.slow:g}"] if self.slow != 1 else []
        said += [f"joins after {self.delay:g} s"] if self.delay else []
        if self.kill is not None:
            said.append("killed half way" if self.kill.at is None else f"killed after {self.kill.at:g} s")
        return ", ".join(said)


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes in bytes, rates in bits a second, times in seconds. A rate that is None is not limited."""

    source: str | None = None
    size: int | None = None
    nodes: int = 4
    link: float | None = None
    origin_link: float | None = None
    warm: int = 0
    kill: Kill | None = None
    slow: float | None = None
    join_after: float | None = None
    corrupt: bool = False
    rounds: int = 1
    baseline: bool = True
    fresh: bool = False  # the daemons have never loaded anything
    device: str | None = None  # load it into this one's memory, too
    force: bool = False

    def check(self) -> None:
        """Raise ConfigError for what makes no sense together."""
        if (self.source is None) == (self.size is None):
            raise ConfigError("coldstart: give a SOURCE to load, or --size to have an object made")
        if not 1 <= self.nodes <= 250:
            raise ConfigError(f"--nodes {self.nodes}: 1 to 250 are expected")
        if self.size is not None and self.size < 1_000_000:
            raise ConfigError(f"--size {self.size}: 1 MB or more is expected, such as 300MB")
        if self.rounds < 1:
            raise ConfigError(f"--rounds {self.rounds}: 1 or more is expected")
        cold = self.nodes - self.warm - self.corrupt
        if self.warm < 0 or cold < 1:
            raise ConfigError(f"--warm {self.warm}: of {self.nodes} nodes at least one must be left to start cold")
        if self.slow is not None and not SLOWEST <= self.slow < 1:
            raise ConfigError(f"--slow {self.slow:g}: a fraction of the link is expected, such as 0.1")
        if self.slow is not None and self.link is None:
            raise ConfigError("--slow: needs --link, the rate of which that node has a fraction")
        if self.join_after is not None and self.join_after <= 0:
            raise ConfigError(f"--join-after {self.join_after:g}: seconds are expected")
        special = [self.kill is not None, self.slow is not None, self.join_after is not None]
        if sum(special) and cold <= sum(special):
            raise ConfigError(f"{self.nodes} nodes leave none that is cold and undisturbed: more --nodes are needed")
        if self.kill is not None and self.kill.node is not None:
            self._check_victim(self.kill.node)

    def _check_victim(self, number: int) -> None:
        if not 1 <= number <= self.nodes:
            raise ConfigError(f"--kill: there is no node {number}; there are 1 to {self.nodes}")
        others = replace(self, kill=None).roles()
        if not (others[number - 1].counts or others[number - 1].kind == "warm"):
            raise ConfigError(f"--kill: node {number} is {others[number - 1].what}; choose another")

    def roles(self) -> list[Role]:
        """Every node: warm ones first, then the corrupt one, cold ones; the last of these are disturbed."""
        roles = [Role(f"node-{number}", link=self.link) for number in range(1, self.nodes + 1)]
        for index in range(self.warm):
            roles[index] = replace(roles[index], kind="warm")
        if self.corrupt:
            roles[self.warm] = replace(roles[self.warm], kind="corrupt")
        free = list(range(self.warm + self.corrupt, self.nodes))
        if self.kill is not None:
            victim = free[-1] if self.kill.node is None else self.kill.node - 1
            roles[victim] = replace(roles[victim], kill=self.kill)
            free = [index for index in free if index != victim]
        if self.slow is not None and self.link is not None:
            index = free.pop()
            roles[index] = replace(roles[index], slow=self.slow, link=self.link * self.slow)
        if self.join_after is not None:
            index = free.pop()
            roles[index] = replace(roles[index], delay=self.join_after)
        return roles

    def alone(self) -> list[Role]:
        """The same load without peers: those that count, each by itself."""
        return [role for role in self.roles() if role.counts]


def parse_rate(text: str) -> float:
    """Bits a second: ``2gbit``, ``400mbit``. Raises ConfigError."""
    match = _RATE.fullmatch(text.strip())
    rate = float(match[1]) * 1000 ** _POWERS[match[2].lower()] if match else 0.0
    if rate < 1e5:
        raise ConfigError(f"{text!r}: a rate of 100kbit or more is expected, such as 400mbit or 2gbit")
    return rate


def parse_kill(text: str) -> Kill:
    """``half``, ``3.5``, and which node: ``half:2``. Raises ConfigError."""
    when, _, node = text.partition(":")
    try:
        at = None if when == "half" else float(when)
        number = int(node) if node else None
    except ValueError:
        at = -1.0
        number = None
    if at is not None and not 0 < at < 1e6:
        raise ConfigError(f"--kill {text!r}: half or seconds are expected, and perhaps which node: half:2")
    return Kill(at, number)


def rate_text(bits: float | None) -> str:
    """``400 Mbit/s``."""
    if bits is None:
        return "not limited"
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if bits >= size:
            return f"{bits / size:.3g} {unit}" if bits < 1000 * size else f"{bits / size:.0f} {unit}"
    return f"{bits / 1e3:.3g} kbit/s"
