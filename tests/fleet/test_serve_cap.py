"""A host that serves under a bandwidth cap is a slow host, not a failed one."""

from __future__ import annotations

import time
from pathlib import Path

from tests.fleet.daemons import Daemon, from_peers
from tests.fleet.weights import tensors
from tests.servers.s3 import S3Server
from weightcache.core.pace import BURST
from weightcache.core.turns import ORIGIN_READ

RATE = 40_000_000
COUNT = 6  # chunks


def test_peers_get_it_at_the_cap_and_blame_nobody(s3_server: S3Server, tmp_path: Path) -> None:
    data = tensors(COUNT, ORIGIN_READ, 11)
    s3_server.put("cap", "blob", data)
    env = s3_server.env()
    with Daemon(tmp_path / "a", f"--serve-bandwidth={RATE}", env=env) as a, Daemon(tmp_path / "b", peers=(a,)) as b:
        b.meets(a)
        a.pull("s3://cap/blob")
        began = time.monotonic()
        report = b.pull("s3://cap/blob")
        seconds = time.monotonic() - began
    assert Path(report["path"]).read_bytes() == data
    assert from_peers(report) == len(data)
    assert report["fallbacks"] == []
    assert seconds >= len(data) / RATE - BURST
