"""Who is alive, behind one interface: a list, a DNS name, or the LAN."""

from __future__ import annotations

from weightcache.config import Config, parse_address, parse_discover
from weightcache.directory.base import Changed, Directory, Member, View
from weightcache.directory.dns import DnsDirectory
from weightcache.directory.static import StaticDirectory
from weightcache.directory.steady import SteadyDirectory

__all__ = ["Changed", "Directory", "Member", "View", "open_directory"]


def open_directory(config: Config, key: bytes | None) -> Directory:
    """The directory that ``config.discover`` asks for. ``key`` is the cluster's; it tells clusters on one LAN apart."""
    kind, name, port = parse_discover(config.discover)
    listen = parse_address(config.listen)
    if kind == "zeroconf":
        from weightcache.directory.lan import LanDirectory  # zeroconf is large, and most do without

        interface = config.advertised if listen.is_wildcard else listen.host
        return SteadyDirectory(LanDirectory(interface, config.datacenter, key))
    if kind == "dns":
        return SteadyDirectory(DnsDirectory(name, port or listen.port))
    return StaticDirectory(config.peers)
