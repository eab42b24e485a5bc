"""Which sources this host may read at all."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import replace
from urllib.parse import urlsplit

from weightcache.core.source import SCHEMES, Source, parse_source
from weightcache.errors import ConfigError, SourceDenied, SourceError


class Policy:
    """The allow-list: prefixes of canonical sources. Without any, every remote scheme is admitted.

    A prefix ends at a boundary: ``s3://bucket/a`` admits itself and what lies below it, not ``s3://bucket/ab``;
    ``https://host`` no other host or port. ``hf://org`` and ``hf://org/name`` admit every revision. Plain ``http://``
    is for this machine only, unless a prefix names it. ``file://`` has its own confinement (``file_roots``).
    """

    def __init__(self, allow: Iterable[str]) -> None:
        self._prefixes = tuple(_canonical(prefix) for prefix in allow)

    def admit(self, source: Source) -> None:
        """Raise SourceDenied, which says what to set, unless ``source`` may be read."""
        if source.scheme == "file":
            return
        if self._prefixes:
            if not any(_covers(prefix, name) for prefix in self._prefixes for name in _names(source)):
                raise SourceDenied(f"{source.public}: not allow-listed; add it, or a prefix of it, to origin.allow")
        elif source.scheme == "http" and not is_loopback(source.authority):
            raise SourceDenied(f"{source.public}: plain http is not protected; use https or list it in origin.allow")


def is_loopback(authority: str) -> bool:
    """Whether ``host[:port]`` is this machine itself."""
    host = urlsplit(f"//{authority}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _names(source: Source) -> tuple[str, ...]:
    name = str(replace(source, query=""))
    if source.scheme != "hf":
        return (name,)
    repository, _, rest = name.partition("@")
    return name, f"{repository}/{rest.partition('/')[2]}"  # as asked, and for prefixes that leave the revision open


def _covers(prefix: str, name: str) -> bool:
    return name.startswith(prefix) and (prefix.endswith("/") or name[len(prefix) :][:1] in ("", "/"))


def _canonical(prefix: str) -> str:
    scheme, separator, rest = prefix.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in SCHEMES or scheme == "file":
        raise ConfigError(f"origin.allow: {prefix!r} is not a prefix of remote sources, such as s3://bucket/models/")
    if not rest or scheme == "hf":  # a whole scheme; an organisation or repository, which no parser takes as a source
        return f"{scheme}://{rest}"
    try:
        return str(replace(parse_source(prefix), query=""))
    except SourceError as error:
        raise ConfigError(f"origin.allow: {error}") from None
