"""The hosts of a comparison: daemons started as a user starts them, the servers before them, and the files."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.rounds import Contender, timed
from tests.fleet.daemons import Daemon
from tests.servers.loop import wait_until
from tests.servers.nginx import NginxServer
from weightcache.client import SyncClient
from weightcache.config import Config

MB = 1_000_000
MEMORY = Path("/dev/shm")  # a tmpfs
BLOCK = 8 << 20


def write_random(path: Path, size: int) -> Path:
    """A file of which no chunk occurs twice: nothing of it is copied from what is there already."""
    draw = random.Random(size)
    block = bytearray(draw.randbytes(min(size, BLOCK)))
    with open(path, "wb") as file:
        for number, left in enumerate(range(size, 0, -BLOCK)):
            for at in range(0, len(block), 1 << 16):
                block[at : at + 8] = number.to_bytes(8, "little")
            file.write(block[:left])
    return path


@dataclass(slots=True)
class Host:
    """A daemon that runs, and a client that is connected to it."""

    daemon: Daemon
    client: SyncClient

    @property
    def pids(self) -> list[int]:
        assert self.daemon.process is not None
        return [self.daemon.process.pid]

    def pull(self, source: str, *, revalidate: bool = False) -> None:
        self.client.pull(source, revalidate=revalidate)

    def forget(self, source: str) -> None:
        """Evict a source, as soon as nothing of the daemon's own holds it."""
        blobs = {
            file["blob"] for shot in self.client.ls()["snapshots"] if shot["source"] == source for file in shot["files"]
        }
        here = {blob["blob"] for blob in self.client.ls()["blobs"]} & blobs
        if here:
            wait_until(lambda: not self.client.evict(sorted(here))["kept"], 60, f"eviction of {source}")


@contextlib.contextmanager
def host(
    root: Path,
    *options: str,
    peers: Iterable[Host] = (),
    known: Iterable[str] = (),
    env: dict[str, str] | None = None,
) -> Iterator[Host]:
    """A daemon that is ready and connected to ``peers``, and to those ``known`` by their address."""
    addresses = sorted({*known, *(peer.daemon.address for peer in peers)})
    daemon = Daemon(root, *options, *(f"--peer={address}" for address in addresses), env=env)
    with connected_host(daemon, addresses) as found:
        yield found


@contextlib.contextmanager
def connected_host(daemon: Daemon, peers: Iterable[str]) -> Iterator[Host]:
    """Start a daemon; wait until it is connected to the ``peers`` it was told of."""
    wanted = set(peers)
    with daemon, SyncClient(Config(store=daemon.store, socket=daemon.socket)) as client:

        def met() -> bool:
            return wanted <= {peer["address"] for peer in client.peers() if peer["state"] != "unreachable"}

        wait_until(met, 30, "the peers")
        yield Host(daemon, client)


@contextlib.contextmanager
def holder(daemon: Daemon, sources: Iterable[str]) -> Iterator[Host]:
    """Start a daemon that gets the sources first."""
    with connected_host(daemon, ()) as found:
        for source in sources:
            found.pull(source)
        yield found


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[tuple[NginxServer, list[int]]]:
    """A web server over ``folder``, and its process."""
    with NginxServer(folder, folder / "nginx") as server:
        yield server, [server.pid]


def pulling(name: str, source: str, size: int, to: Host, serving: Iterable[Host | int], note: str = "") -> Contender:
    """A pull of what ``serving`` have (hosts, or other processes)."""
    pids = [pid for one in serving for pid in (one.pids if isinstance(one, Host) else [one])]
    return Contender(
        name,
        size,
        lambda: timed(lambda: to.pull(source)),
        lambda: to.forget(source),
        sending=lambda: pids,
        receiving=lambda: to.pids,
        note=note,
    )
