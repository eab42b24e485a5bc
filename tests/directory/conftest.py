"""A LAN of network namespaces on a bridge, made and taken down by the test that asks for it."""

from __future__ import annotations

import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

PATIENCE = 20.0  # seconds
_numbers = itertools.count()


class Peer:
    """A process in a namespace of its own that runs a LanDirectory and prints each view it is told."""

    def __init__(self, namespace: str, address: str, port: int, node_id: bytes, key: str, ttl: int) -> None:
        self.me = (address, port, node_id.hex())
        script = Path(__file__).with_name("lan_peer.py")
        arguments = [address, str(port), node_id.hex(), key, str(ttl)]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ever: set[tuple[str, int, str]] = set()  # who was in any view
        self._views: queue.Queue[set[tuple[str, int, str]]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            view = {(host, port, node_id) for host, port, node_id in json.loads(line)}
            self.ever |= view
            self._views.put(view)

    def sees(self, *others: Peer) -> None:
        """Wait until the view is exactly ``others``."""
        expected = {other.me for other in others}
        deadline = time.monotonic() + PATIENCE
        view = None
        while view != expected:
            try:
                view = self._views.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{self.me} sees {view}, not {expected}") from None

    def leave(self) -> None:
        """End as a daemon does that was asked to stop: with a goodbye."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(PATIENCE) == 0

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def lan() -> Iterator[Callable[..., Peer]]:
    """Call it to start a peer on a host of its own: ``lan(port, node_id, key, ttl)``."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    name = f"wc{os.getpid() % 100000}n{next(_numbers)}"
    with ExitStack() as undo:

        def make(thing: str, how: str = "") -> None:
            _ip(f"{thing.replace(' ', ' add ', 1)} {how}")
            undo.callback(_ip, thing.replace(" ", " del ", 1))

        try:
            make(f"link {name}", "up type bridge")
            make(f"netns {name}h0")
        except RuntimeError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        hosts = itertools.count(1)

        def start(port: int, node_id: bytes, key: str = "", ttl: int = 30) -> Peer:
            number = next(hosts)
            namespace, address = f"{name}h{number}", f"10.77.0.{number}"
            make(f"netns {namespace}")
            make(f"link {name}v{number}", f"up master {name} type veth peer name eth0 netns {namespace}")
            for command in (
                "link set lo up",
                f"addr add {address}/24 dev eth0",
                "link set eth0 up",
                "route add default dev eth0",
            ):
                _ip(f"-n {namespace} {command}")
            peer = Peer(namespace, address, port, node_id, key, ttl)
            undo.callback(peer.stop)
            return peer

        yield start


def _ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {command}: {done.stderr.strip()}")
