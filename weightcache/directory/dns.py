"""Peers as the addresses of a DNS name: what a headless service of Kubernetes is."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Iterable

from weightcache.directory.base import Changed, Member, View
from weightcache.log import fields

Resolve = Callable[[str], Awaitable[Iterable[str]]]

log = logging.getLogger(__name__)


async def resolve(name: str) -> set[str]:
    """The addresses of ``name``, asked of the host's own resolver in a thread. Raises OSError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label that is empty or too long
        raise OSError(f"{name} is not the name of a host") from None
    return {str(address[0]) for *_, address in found}


class DnsDirectory:
    """The daemons at every address of ``name``, all on ``port``. Asks again about every ``interval`` seconds.

    A lookup that fails changes nothing: the name server may be what died.
    """

    def __init__(self, name: str, port: int, interval: float = 5.0, resolve: Resolve = resolve) -> None:
        self._name, self._port, self._interval, self._resolve = name, port, interval, resolve
        self._view: View = frozenset()
        self._asking: asyncio.Task[None] | None = None
        self._answered = asyncio.Event()

    async def start(self, me: Member, changed: Changed) -> None:
        self._asking = asyncio.create_task(self._ask(me, changed), name=f"dns {self._name}")
        try:
            async with asyncio.timeout(self._interval):
                await self._answered.wait()
        except TimeoutError:
            log.warning("name server slow", extra=fields(name=self._name))

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})

    def view(self) -> View:
        return self._view

    async def _ask(self, me: Member, changed: Changed) -> None:
        failing = False
        while True:
            try:
                addresses = await self._resolve(self._name)
            except OSError as error:
                if not failing:
                    log.warning("lookup failed, old view kept", extra=fields(name=self._name, why=str(error)))
                failing = True
            else:
                failing = False
                seen = frozenset(Member(address, self._port) for address in addresses) - {Member(me.host, me.port)}
                if seen != self._view:
                    self._view = seen
                    changed(seen)
            self._answered.set()
            # Spread out: a fleet that started together must not ask in step for ever.
            await asyncio.sleep(self._interval * random.uniform(0.5, 1.5))
