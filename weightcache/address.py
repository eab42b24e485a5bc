"""Addresses as people write them: HOST:PORT, and the URL of a Redis server. ValueError says what is expected."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import NamedTuple

REDIS = {"redis": 6379, "rediss": 6379, "valkey": 6379, "valkeys": 6379}  # schemes, and the port of each
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")
_SECRET = re.compile(r"^([A-Za-z]+:(?://)?).*@", re.DOTALL)  # the user and password of a URL
_HOW_REDIS = "redis://[user:password@]host[:port][/database] is expected, special characters in %-escapes"


class Address(NamedTuple):
    """A host (a name, or an IP without brackets) and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it. Of names only localhost is trusted to be."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for every interface, and so for nothing that a peer could connect to."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


def parse_text(value: object) -> str:
    """Text without the space around it. Raises ValueError."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text is expected")
    return value.strip()


def parse_host(value: object) -> str:
    """A host's name or IP address, without brackets. Raises ValueError."""
    text = parse_text(value)
    try:
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    if not _HOST.fullmatch(text) or text.replace(".", "").isdigit():  # only digits and dots: a broken IP address
        raise ValueError("a host name or an IP address is expected")
    return text


def parse_address(value: object) -> Address:
    """``HOST:PORT``, an IPv6 address in brackets. Raises ValueError."""
    host, _, port = parse_text(value).rpartition(":")
    naked = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not host or naked or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError("HOST:PORT is expected, an IPv6 address in brackets")
    return Address(parse_host(host), int(port))


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A Redis or Valkey server, and who asks it. ``public`` is what may be shown."""

    scheme: str
    address: Address
    database: int = 0
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    @property
    def tls(self) -> bool:
        return self.scheme in ("rediss", "valkeys")

    @property
    def public(self) -> str:
        return f"{self.scheme}://{self.address}/{self.database}"


def parse_redis(value: object) -> RedisUrl:
    """``redis://[user:password@]host[:port][/db]``, or rediss, valkey, valkeys. The ValueError tells no secret."""
    from urllib.parse import unquote, urlsplit  # only who has such a URL pays for it

    text = parse_text(value)
    try:
        url = urlsplit(text)
        port = url.port or REDIS[url.scheme]
        host = parse_host(url.hostname or "")
    except (ValueError, KeyError):
        raise ValueError(_HOW_REDIS) from None
    database = re.fullmatch(r"/?([0-9]{0,5})", url.path)
    if database is None or url.query or url.fragment or Address(host, 0).is_wildcard or "@" in (url.username or ""):
        raise ValueError(_HOW_REDIS)
    user, password = (unquote(part) if part else None for part in (url.username, url.password))
    return RedisUrl(url.scheme, Address(host, port), int(database[1] or 0), user, password)


def without_secrets(value: object) -> str:
    """A setting's value as it may be shown: what a URL holds before its host is left out."""
    return _SECRET.sub(r"\1***@", str(value))
