"""A fleet's network on one machine: a namespace for each host, and a switch between them. Only root may make one.

Each host has one cable (a veth pair) to a bridge in a namespace of its own. The kernel's token bucket limits both ends
of the cable: the host's for what it sends, the switch's for what it receives. Everything is inside namespaces, so
deleting those deletes it all. Their names say which process made them: what one that was killed left is found by
``sweep``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightcache.errors import WeightcacheError

SUBNET = "198.18"  # of the range that is reserved for benchmarks
BURST = "256kb"  # what a bucket holds: several packets of 64 KiB, the largest a veth carries
QUEUE = "20ms"  # what may wait before it
_NAME = re.compile(r"coldstart-(\d+)-(\d+)-")


class NoNamespaces(WeightcacheError):
    """This machine, or this user, cannot have them: why."""


@dataclass(slots=True)
class Network:
    """``address`` of each host by name, and ``inside``: what a command is started with to run there."""

    prefix: str
    address: dict[str, str] = field(default_factory=dict)

    def inside(self, host: str) -> tuple[str, ...]:
        return (_tool("ip"), "netns", "exec", self.prefix + host)


def missing() -> str:
    """Why there can be no namespaces here, or ""."""
    if os.geteuid():
        return "only root may make network namespaces"
    absent = [name for name in ("ip", "tc") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not found: apt-get install iproute2" if absent else ""


@contextlib.contextmanager
def network(links: Mapping[str, float | None]) -> Iterator[Network]:
    """Hosts by name, with the rate of each one's link in bits a second (None: not limited). Raises NoNamespaces."""
    if why := missing():
        raise NoNamespaces(why)
    sweep()
    made = Network(f"coldstart-{os.getpid()}-{started(os.getpid())}-")
    switch = made.prefix + "switch"
    try:
        _run(f"ip netns add {switch}")
        _run(f"ip -n {switch} link add bridge type bridge")
        _run(f"ip -n {switch} link set bridge up")
        for number, (host, rate) in enumerate(links.items(), start=1):
            space, cable = made.prefix + host, f"to{number}"
            made.address[host] = f"{SUBNET}.{number // 250}.{number % 250 + 1}"
            _run(f"ip netns add {space}")
            _run(f"ip link add eth0 netns {space} type veth peer name {cable} netns {switch}")
            _run(f"ip -n {switch} link set {cable} master bridge up")
            _run(f"ip -n {space} address add {made.address[host]}/16 dev eth0")
            for device in ("eth0", "lo"):
                _run(f"ip -n {space} link set {device} up")
            if rate is not None:
                for where, device in ((space, "eth0"), (switch, cable)):
                    _run(
                        f"tc -n {where} qdisc replace dev {device} root "
                        f"tbf rate {rate:.0f}bit burst {BURST} latency {QUEUE}"
                    )
        yield made
    finally:
        _delete(name for name in _spaces() if name.startswith(made.prefix))


def sweep() -> list[str]:
    """Remove the namespaces of runs that were killed; their names."""
    left = [name for name in _spaces() if (match := _NAME.match(name)) and not _lives(int(match[1]), match[2])]
    _delete(left)
    return left


def started(pid: int) -> str:
    """When a process started, in the kernel's ticks: with its number, it names one process. "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _lives(pid: int, start: str) -> bool:
    return started(pid) == start


def _spaces() -> list[str]:
    done = subprocess.run([_tool("ip"), "netns", "list"], capture_output=True, text=True, check=False)
    return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]


def _delete(names: Iterator[str] | list[str]) -> None:
    for name in list(names):
        subprocess.run([_tool("ip"), "netns", "delete", name], capture_output=True, check=False)


def _tool(name: str) -> str:
    return shutil.which(name) or name


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise NoNamespaces(f"{command}: {lines[0]}")
