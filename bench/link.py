"""A link of 1 Gbit/s: a network namespace, and the kernel's token bucket before it. Only root may make them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench import rivals, rounds
from bench.bare import Way
from bench.hosts import MB, connected_host, holder, nginx, pulling, write_random
from bench.limit import limit
from bench.run import Run
from bench.table import Row, Table, at_least
from tests.fleet.daemons import Daemon

TITLE = "one peer to one host, over a link of 1 Gbit/s"
ABOUT = (
    "The receiving host is in a network namespace of its own, and 'tc' shapes the only link to it. What the bare loop "
    "reaches is the link's payload rate. The daemons have a cluster key: every connection is proved, every frame MACed."
)
SHAPE = "tbf rate 1gbit burst 256kb latency 20ms"
HERE, THERE = "198.18.0.1", "198.18.0.2"  # of the range that is reserved for benchmarks


class Placed(Daemon):
    """A daemon that listens on a link's address and is started with ``prefix``."""

    def __init__(self, root: Path, ip: str, *options: str, prefix: tuple[str, ...] = ()) -> None:
        super().__init__(root, *options, interface=ip)
        self._prefix = prefix

    @property
    def address(self) -> str:
        return f"{self.interface}:{self.port}"

    def command(self) -> list[str]:
        return [*self._prefix, *super().command()]


@contextlib.contextmanager
def shaped() -> Iterator[tuple[str, ...]]:
    """The link; what a command is started with at its far end. Raises Unavailable."""
    if os.geteuid():
        raise rounds.Unavailable("only root may make network namespaces")
    ip, tc = (rivals.binary(name, "apt-get install iproute2") for name in ("ip", "tc"))
    space, near, far = f"bench{os.getpid()}", f"wcn{os.getpid()}", f"wcf{os.getpid()}"
    inside = (ip, "netns", "exec", space)
    commands = [
        f"{ip} netns add {space}",
        f"{ip} link add {near} type veth peer name {far} netns {space}",
        f"{ip} address add {HERE}/30 dev {near}",
        f"{ip} link set {near} up",
        *(f"{ip} -n {space} {what}" for what in (f"address add {THERE}/30 dev {far}", f"link set {far} up")),
        f"{ip} -n {space} link set lo up",
        f"{tc} qdisc replace dev {near} root {SHAPE}",
        f"{tc} -n {space} qdisc replace dev {far} root {SHAPE}",
    ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                raise rounds.Unavailable(f"{command}: {done.stderr.strip()}")
        yield inside
    finally:
        subprocess.run([ip, "netns", "delete", space], capture_output=True, check=False)  # the link goes with it


def link(run: Run) -> Table:
    """One peer to one host over a link of 1 Gbit/s."""
    try:
        with contextlib.ExitStack() as stack:
            table = _compare(run, stack)
    except rounds.Unavailable as error:
        table = Table("link", TITLE, ABOUT, rounds.COLUMNS, [Row("limit", skipped=str(error))])
    table.expect(at_least(0.95, "of the link's payload rate"), "weightcache", "ratio")
    return table


def _compare(run: Run, stack: contextlib.ExitStack) -> Table:
    enter = stack.enter_context
    inside = enter(shaped())
    size = run.size(400 * MB, 64 * MB)
    path = write_random(run.folder / "blob", size)
    key = run.folder / "key"
    key.write_text("known to this benchmark only")
    key.chmod(0o600)
    # The far end cannot ask the web server: what the near one saw an hour ago must do.
    options = (f"--cluster-key-file={key}", "--fresh=3600")
    server, _ = enter(nginx(run.folder))
    source = server.url("blob")
    sending = enter(holder(Placed(run.folder / "a", HERE, *options), [source]))
    far = Placed(run.folder / "b", THERE, *options, f"--peer={sending.daemon.address}", prefix=inside)
    receiving = enter(connected_host(far, [sending.daemon.address]))
    contenders = [
        enter(limit(path, run.folder, Way(sendfile=True), host=HERE, prefixes=((), inside))),
        pulling("weightcache", source, size, receiving, [sending]),
    ]
    return rounds.compare("link", f"{TITLE}, {size / MB:.0f} MB", ABOUT, contenders, run)
