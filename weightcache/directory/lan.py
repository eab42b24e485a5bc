"""Peers on one LAN, by multicast DNS (zeroconf).

Theory of operation. A daemon announces a service instance named by its node id. The pointer to it lives for
many minutes (zeroconf does not take less), so a browser tells quickly who came and who said goodbye, but not who
crashed. The address behind it is given a short life: one task follows each name and asks for the address again when it
has run out; no answer, no peer. Questions and answers are multicast, so one host's asking serves all.

Who announces is not proved here: the handshake does that. Clusters with different keys on one LAN keep apart by a tag
that the key derives; nothing leads back from the tag to the key.
"""

from __future__ import annotations

import asyncio
import logging

from blake3 import blake3
from zeroconf import DNSQuestionType, Error, IPVersion, NonUniqueNameException, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from weightcache.directory.base import Changed, Member, View
from weightcache.directory.dns import resolve
from weightcache.errors import ConfigError
from weightcache.log import fields

SERVICE = "_weightcache._tcp.local."
MAX_NAMES = 4096  # followed at once; anybody on the LAN can invent names
_ANSWER = 3000  # milliseconds to wait for an answer

log = logging.getLogger(__name__)


def cluster_tag(key: bytes | None) -> str:
    """What the daemons of one cluster have in common in public (16 hex digits)."""
    return blake3(key or b"", derive_key_context="weightcache 2026 lan cluster tag").hexdigest(length=8)


class LanDirectory:
    """The daemons of the same cluster that announce themselves on the network of ``interface``.

    ``interface`` is a name or address of this host; multicast stays on its network. ``ttl``: seconds for which an
    address is believed; a peer that crashed is missed after 4/3 of it and 3 seconds at the latest.
    """

    def __init__(self, interface: str, datacenter: str, key: bytes | None, ttl: int = 30) -> None:
        self._interface, self._datacenter, self._ttl = interface, datacenter, ttl
        self._tag = cluster_tag(key).encode()
        self._node_id = b""
        self._members: dict[str, Member] = {}  # by the name of the instance
        self._following: dict[str, asyncio.Task[None]] = {}
        self._view: View = frozenset()
        self._changed: Changed | None = None
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None

    async def start(self, me: Member, changed: Changed) -> None:
        if me.node_id is None:
            raise ValueError("on a LAN a daemon announces its node id")
        self._node_id, self._changed = me.node_id, changed
        interface = await _address(self._interface)
        announced = AsyncServiceInfo(
            SERVICE,
            f"{me.node_id.hex()[:32]}.{SERVICE}",
            port=me.port,
            parsed_addresses=[await _address(me.host)],
            properties={b"id": me.node_id.hex().encode(), b"dc": self._datacenter.encode(), b"cluster": self._tag},
            host_ttl=self._ttl,
        )
        version = IPVersion.V6Only if ":" in interface else IPVersion.V4Only
        try:
            self._zeroconf = AsyncZeroconf(interfaces=[interface], ip_version=version)
            self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE, handlers=[self._heard])
            # Probing for the name takes half a second, in which the others answer the browser.
            self._announcing = await self._zeroconf.async_register_service(announced)  # a task: goes on by itself
        except NonUniqueNameException:
            raise ConfigError(
                f"zeroconf: another host announces this node's id {me.node_id.hex()[:12]}: was the store copied?"
            ) from None
        except (OSError, Error) as error:
            raise ConfigError(
                f"zeroconf cannot use {interface}: {error or type(error).__name__}: listen on this host's LAN address"
            ) from None

    async def close(self) -> None:
        self._changed = None
        for task in self._following.values():
            task.cancel()
        self._following.clear()
        if self._browser is not None:
            await self._browser.async_cancel()
            self._browser = None
        if self._zeroconf is not None:
            await self._zeroconf.async_close()  # says goodbye
            self._zeroconf = None

    def view(self) -> View:
        return self._view

    def _heard(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if name in self._following:
            self._following.pop(name).cancel()
        if state_change is ServiceStateChange.Removed:
            self._set(name, None)
        elif len(self._following) < MAX_NAMES:
            self._following[name] = asyncio.create_task(self._follow(zeroconf, name))
        else:
            log.warning("too many names announced on the LAN", extra=fields(ignored=name))

    async def _follow(self, zeroconf: Zeroconf, name: str) -> None:
        """Keep the entry of ``name`` true until cancelled."""
        while True:
            try:
                info = AsyncServiceInfo(SERVICE, name)
            except Error:  # a stranger's name, which no daemon would announce
                return
            answered = await info.async_request(zeroconf, _ANSWER, DNSQuestionType.QM)
            self._set(name, self._member(info) if answered else None)
            await asyncio.sleep(self._ttl / 3)

    def _member(self, info: AsyncServiceInfo) -> Member | None:
        """The peer that an announcement names; None: it is oneself, or none of this cluster."""
        try:
            node_id = bytes.fromhex((info.properties.get(b"id") or b"").decode())
        except ValueError:
            return None
        addresses = info.parsed_scoped_addresses()
        ours = info.properties.get(b"cluster") == self._tag and 0 < len(node_id) <= 32 and node_id != self._node_id
        return Member(addresses[0], info.port, node_id) if ours and addresses and info.port else None

    def _set(self, name: str, member: Member | None) -> None:
        if member is None:
            self._members.pop(name, None)
        else:
            self._members[name] = member
        view = frozenset(self._members.values())
        if view != self._view and self._changed is not None:
            self._view = view
            self._changed(view)


async def _address(host: str) -> str:
    """One IP address of ``host``, IPv4 if there is one: what a record can hold."""
    try:
        return min(await resolve(host), key=lambda address: (":" in address, address))
    except OSError as error:
        raise ConfigError(f"zeroconf: {host} has no address: {error.strerror or error}") from None
