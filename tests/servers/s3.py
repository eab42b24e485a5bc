"""A real S3 server: SeaweedFS's ``weed``, behind a FaultProxy that counts and breaks."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers.loop import SPAWNER
from tests.servers.proxy import FaultProxy
from weightcache.tools.seaweed import SECRET_KEY, Seaweed, variables


class S3Server(Seaweed):
    """One server with its data in ``directory``. ``proxy`` is what clients talk to (``env()`` says so); ``put`` is not.

    ``stop`` kills it, ``start`` starts it again on the same ports with the same data.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.proxy = FaultProxy(self.port)
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.proxy.port}"

    @property
    def direct(self) -> str:
        """The server's own endpoint, past the proxy."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def env(self, secret: str = SECRET_KEY) -> dict[str, str]:
        """The variables with which a client finds and may use this server."""
        return variables(self.endpoint, secret)

    def start(self) -> None:
        # From a thread that lasts: the server is killed when the thread that started it ends.
        SPAWNER.submit(super().start).result()

    def close(self) -> None:
        self.stop()
        self.proxy.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
