"""Daemons for the tests: real processes on loopback, each with a store of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from tests.servers.loop import accepts, spawn, wait_until
from weightcache.client import SyncClient
from weightcache.config import Config
from weightcache.tools.local import free_pair

Json = dict[str, Any]


class Named(Protocol):
    """A host that others know by its control address."""

    @property
    def address(self) -> str: ...


class Daemon:
    """One host. Its control port is known before it starts, so that hosts can name each other."""

    def __init__(
        self,
        root: Path,
        *options: str,
        peers: tuple[Daemon, ...] = (),
        env: dict[str, str] | None = None,
        interface: str = "127.0.0.1",
    ):
        self.store = root / "store"
        self.socket = root / "sock"
        self.log = root / "log"
        root.mkdir(parents=True, exist_ok=True)
        self.port = free_pair()
        self.bulk_port = self.port + 1
        self.options = [*options, *(f"--peer=127.0.0.1:{peer.port}" for peer in peers)]
        self.env = env or {}
        self.interface = interface
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def worker_env(self) -> dict[str, str]:
        """The variables with which a worker, or the command line, finds it."""
        return {"WEIGHTCACHE_STORE": str(self.store), "WEIGHTCACHE_SOCKET": str(self.socket)}

    def command(self) -> list[str]:
        where = [f"--store={self.store}", f"--socket={self.socket}", f"--listen={self.interface}:{self.port}"]
        return [sys.executable, "-m", "weightcache.tools", "daemon", *where, *self.options]

    def start(self) -> Self:
        """Start it (again); returns once it answers."""
        with self.log.open("ab") as log:
            process = spawn(self.command(), stdout=subprocess.DEVNULL, stderr=log, env=os.environ | self.env)
        self.process = process

        def ready() -> bool:
            assert process.poll() is None, f"the daemon ended: {self.log.read_text()}"
            return _answers(self.socket)

        wait_until(ready, 30, f"daemon {self.address}")
        return self

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        wait_until(lambda: not accepts(self.port) and not accepts(self.bulk_port), 10, "ports to be free")

    def stop(self) -> int:
        """SIGTERM, as an operator would; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    @contextmanager
    def client(self) -> Iterator[SyncClient]:
        with SyncClient(Config(store=self.store, socket=self.socket)) as client:
            yield client

    def pull(self, source: str, *, revalidate: bool = False) -> Json:
        with self.client() as client:
            return client.pull(source, revalidate=revalidate)

    def evict(self, source: str) -> int:
        """Evict what is about to be free of the daemon's own care; returns the bytes freed."""
        with self.client() as client:
            return wait_until(lambda: int(client.evict([source])["freed"]), 10, f"{source} to be evicted")

    def meets(self, *others: Named) -> None:
        """Wait until it is connected to others."""

        def met() -> bool:
            with self.client() as client:
                return {peer["address"] for peer in client.peers() if peer["state"] != "unreachable"} >= wanted

        wanted = {other.address for other in others}
        wait_until(met, 20, f"{self.address} to meet {wanted}")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def cli(*arguments: str, env: dict[str, str] | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [sys.executable, "-m", "weightcache.tools", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), timeout=timeout)


def slowly() -> dict[str, str]:
    """The environment of a daemon whose bulk processes land chunks slowly: see slowed/sitecustomize.py."""
    return {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "slowed"), os.environ.get("PYTHONPATH", "")])}


def written(pid: int) -> int:
    """Bytes that a process has written, to files and sockets, by ``pwrite`` and ``sendfile`` too."""
    (line,) = (line for line in Path(f"/proc/{pid}/io").read_text().splitlines() if line.startswith("wchar"))
    return int(line.split()[1])


def from_peers(report: Json) -> int:
    return sum(report["bytes_by_source"]["peer"].values())
