"""A link of 1 Gbit/s: network namespaces, and the kernel's token bucket between them. Only root may make them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from bench import rounds
from bench.bare import Way
from bench.hosts import MB, connected_host, holder, pulling, write_random
from bench.limit import limit
from bench.run import Run
from bench.standing import Standing
from bench.table import Row, Table, at_least
from tests.fleet.daemons import Daemon
from weightcache.tools.coldstart_net import NoNamespaces, network
from weightcache.tools.coldstart_origin import BUCKET, variables

TITLE = "one peer to one host, over a link of 1 Gbit/s"
ABOUT = (
    "Both hosts are in network namespaces of their own, and 'tc' shapes the only link between them. What the bare loop "
    "reaches is the link's payload rate. The daemons have a cluster key: every connection is proved, every frame MACed."
)
RATE = 1e9


class Placed(Daemon):
    """A daemon that listens on a link's address and is started with ``prefix``."""

    def __init__(
        self, root: Path, ip: str, *options: str, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> None:
        super().__init__(root, *options, interface=ip, env=env)
        self._prefix = prefix

    @property
    def address(self) -> str:
        return f"{self.interface}:{self.port}"

    def command(self) -> list[str]:
        return [*self._prefix, *super().command()]


def link(run: Run) -> Table:
    """One peer to one host over a link of 1 Gbit/s."""
    try:
        with contextlib.ExitStack() as stack:
            table = _compare(run, stack)
    except NoNamespaces as error:
        table = Table("link", TITLE, ABOUT, rounds.COLUMNS, [Row("limit", skipped=str(error))])
    table.expect(at_least(0.95, "of the link's payload rate"), "weightcache", "ratio")
    return table


def _compare(run: Run, stack: contextlib.ExitStack) -> Table:
    enter = stack.enter_context
    net = enter(network({"near": None, "far": RATE}))
    near, far = net.inside("near"), net.inside("far")
    size = run.size(400 * MB, 64 * MB)
    objects = run.folder / "objects"
    objects.mkdir()
    path = write_random(objects / "blob", size)
    key = run.folder / "key"
    key.write_text("known to this benchmark only")
    key.chmod(0o600)
    # The far end does not ask the origin: what the near one saw an hour ago must do.
    options = (f"--cluster-key-file={key}", "--fresh=3600")
    server = enter(Standing("weightcache.tools.coldstart_origin", str(objects), "127.0.0.1", prefix=near))
    env = variables(f"http://127.0.0.1:{json.loads(server.line())['port']}")
    source = f"s3://{BUCKET}/blob"
    sender = Placed(run.folder / "a", net.address["near"], *options, prefix=near, env=env)
    sending = enter(holder(sender, [source]))
    peer = f"--peer={sending.daemon.address}"
    receiver = Placed(run.folder / "b", net.address["far"], *options, peer, prefix=far)
    receiving = enter(connected_host(receiver, [sending.daemon.address]))
    contenders = [
        enter(limit(path, run.folder, Way(sendfile=True), host=net.address["near"], prefixes=(near, far))),
        pulling("weightcache", source, size, receiving, [sending]),
    ]
    return rounds.compare("link", f"{TITLE}, {size / MB:.0f} MB", ABOUT, contenders, run)
