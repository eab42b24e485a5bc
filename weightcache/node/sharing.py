"""Chunks of a blob that peers have as part of other blobs: of a fine-tune, what it has in common with its base.

Only where ids are known before the bytes. Everybody is asked about a sample of them; who has any, about all. The
answers are no more than hints: a chunk that comes is hashed against its id, and one that does not is sought elsewhere.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence

from weightcache.node.incoming import Shared
from weightcache.node.swarm import MAX_IDS, Peer, Place, Swarm

SAMPLE = 64  # ids that every peer is asked about: at 5% in common, 1 of 25 peers that have it is overlooked
ASKED_ALL = 8  # peers that are asked about all: those that had most of the sample
SHARES_SECONDS = 1.0  # that a load waits for their answers


async def elsewhere(swarm: Swarm, wanted: Mapping[int, bytes]) -> Shared:
    """Where peers have the chunks ``wanted`` (index -> id), as far as they tell within SHARES_SECONDS."""
    found: Shared = {}
    peers = [peer for peer in swarm.askable() if peer.bulk is not None]
    if not wanted or not peers:
        return found

    async def ask(peer: Peer, chunks: Sequence[int]) -> None:
        for first in range(0, len(chunks), MAX_IDS):
            part = chunks[first : first + MAX_IDS]
            places: list[Place | None] = await swarm.shares(peer, [wanted[chunk] for chunk in part])
            for chunk, place in zip(part, places, strict=True):
                if place is not None:
                    found.setdefault(peer.id, {})[chunk] = place

    async def search() -> None:
        sample = random.sample(sorted(wanted), min(SAMPLE, len(wanted)))
        await asyncio.gather(*(ask(peer, sample) for peer in peers))
        rest = sorted(wanted.keys() - set(sample))
        best = sorted((peer for peer in peers if peer.id in found), key=lambda peer: -len(found[peer.id]))
        if rest:
            await asyncio.gather(*(ask(peer, rest) for peer in best[:ASKED_ALL]))

    searching = asyncio.ensure_future(search())
    await asyncio.wait([searching], timeout=SHARES_SECONDS)
    searching.cancel()
    await asyncio.gather(searching, return_exceptions=True)
    return found
