"""What a registry adds to a swarm: it hears what this host holds, and names holders that are no neighbours.

In a fleet larger than a host's neighbours most holders of a blob are strangers. Who loads one therefore dials a few of
those that the registry names, and stays connected for as long as either likes; of such visits there is a bounded
number, and the oldest gives way.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence

from weightcache.config import Address
from weightcache.directory.base import Member, Registry
from weightcache.errors import WeightcacheError
from weightcache.log import fields
from weightcache.net.control import ControlConnection

log = logging.getLogger(__name__)

HOLDERS = 16  # that the registry is asked to name of one blob
LOOKED_UP = 32  # blobs of one load for which it is asked
MAX_VISITS = 256


class Rolls:
    """``has(blob)``: whether this host has all (True) or some (False) of a blob for others, or nothing (None).
    ``may_dial`` says whether a member is worth a visit; ``dial`` makes one."""

    def __init__(
        self,
        has: Callable[[bytes], bool | None],
        may_dial: Callable[[Member], bool],
        dial: Callable[[Address], Awaitable[ControlConnection]],
    ) -> None:
        self.registry: Registry | None = None
        self._has = has
        self._may_dial = may_dial
        self._dial = dial
        self._told: set[bytes] = set()  # blobs that this host is known to hold
        self._visits: dict[Address, asyncio.Task[None]] = {}  # oldest first

    def __contains__(self, blob: bytes) -> bool:
        return blob in self._told

    async def close(self) -> None:
        visits = list(self._visits.values())
        for visit in visits:
            visit.cancel()
        await asyncio.gather(*visits, return_exceptions=True)

    def tell(self, blobs: Iterable[bytes]) -> None:
        """Tell what this host now has of blobs."""
        if self.registry is None:
            return
        for blob in blobs:
            has = self._has(blob)
            if has is not None:
                self._told.add(blob)
                self.registry.announce([blob], complete=has)
            elif blob in self._told:
                self._told.discard(blob)
                self.registry.withdraw([blob])

    async def meet(self, blobs: Sequence[bytes]) -> list[Address]:
        """Dial holders of blobs; returns once each has answered, or cannot: their addresses."""
        registry = self.registry
        if registry is None:
            return []
        asked = random.sample(blobs, min(LOOKED_UP, len(blobs)))
        found = await asyncio.gather(*(registry.holders(blob, HOLDERS) for blob in asked))
        holders = [member for members in found for member in members if self._may_dial(member)]
        begun: dict[Address, asyncio.Event] = {}
        for address in dict.fromkeys(Address(member.host, member.port) for member in holders):
            if address in self._visits:
                continue
            if len(self._visits) >= MAX_VISITS:
                self._visits.pop(next(iter(self._visits))).cancel()
            begun[address] = asyncio.Event()
            self._visits[address] = asyncio.ensure_future(self._visit(address, begun[address]))
        await asyncio.gather(*(met.wait() for met in begun.values()))
        return list(begun)

    async def _visit(self, address: Address, met: asyncio.Event) -> None:
        connection: ControlConnection | None = None
        try:
            connection = await self._dial(address)
            met.set()
            await connection.closed()
        except (OSError, WeightcacheError) as error:
            log.info("holder unreachable", extra=fields(peer=str(address), why=str(error)))
        finally:
            met.set()
            if self._visits.get(address) is asyncio.current_task():
                del self._visits[address]
            elif connection is not None:
                connection.stream.close()  # it gave way to another
