"""One daemon's directory, run by tests in a network namespace: ADDRESS PORT NODE_ID KEY TTL, until stdin closes."""

from __future__ import annotations

import asyncio
import json
import sys

from weightcache.directory.base import Member, View
from weightcache.directory.lan import LanDirectory


def tell(view: View) -> None:
    members = [(member.host, member.port, (member.node_id or b"").hex()) for member in view]
    print(json.dumps(members), flush=True)


async def main(address: str, port: str, node_id: str, key: str, ttl: str) -> None:
    directory = LanDirectory(address, "test", key.encode() or None, int(ttl))
    try:
        await directory.start(Member(address, int(port), bytes.fromhex(node_id)), tell)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await directory.close()


asyncio.run(main(*sys.argv[1:]))
