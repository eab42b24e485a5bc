"""Who is alive, behind one interface: a list, a DNS name, the LAN, or a Redis server."""

from __future__ import annotations

from weightcache.address import parse_redis
from weightcache.config import Config, parse_address, parse_discover
from weightcache.directory.base import Changed, Directory, Member, Registry, View, manifest_name, snapshot_name
from weightcache.directory.dns import DnsDirectory
from weightcache.directory.static import StaticDirectory
from weightcache.directory.steady import SteadyDirectory

__all__ = [
    "Changed",
    "Directory",
    "Member",
    "Registry",
    "View",
    "manifest_name",
    "open_directory",
    "registry_of",
    "snapshot_name",
]


def open_directory(config: Config, key: bytes | None) -> Directory:
    """The directory that ``config.discover`` asks for. ``key`` is the cluster's; it tells clusters on one LAN apart."""
    kind, name, port = parse_discover(config.discover)
    listen = parse_address(config.listen)
    if kind == "zeroconf":
        from weightcache.directory.lan import LanDirectory  # zeroconf is large, and most do without

        interface = config.advertised if listen.is_wildcard else listen.host
        return SteadyDirectory(LanDirectory(interface, config.datacenter, key))
    if kind == "redis":
        from weightcache.directory.redis import RedisDirectory  # redis is large, too

        return SteadyDirectory(RedisDirectory(parse_redis(config.discover), config.datacenter, key))
    if kind == "dns":
        return SteadyDirectory(DnsDirectory(name, port or listen.port))
    return StaticDirectory(config.peers)


def registry_of(directory: Directory) -> Registry | None:
    """What a directory can do besides telling who is alive; None: nothing."""
    inner = directory.inner if isinstance(directory, SteadyDirectory) else directory
    return inner if isinstance(inner, Registry) else None
