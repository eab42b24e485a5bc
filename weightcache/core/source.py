"""A source: where bytes come from, as a user writes it, in one canonical spelling.

    s3://bucket/key            gs://bucket/key        az://container/key
    hf://org/name[@rev][/file] https://host/path      file:///absolute/path

A path that ends in "/" (or is empty) names everything below it; the origin decides for the rest.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote, urlsplit

from weightcache.errors import SourceError

SCHEMES = ("s3", "gs", "az", "hf", "https", "http", "file")
MAX_SOURCE = 4096  # characters, as written and as spelled here

_HF = re.compile(
    r"^(?P<org>[A-Za-z0-9_.-]{1,96})/(?P<name>[A-Za-z0-9_.-]{1,96}?)(?:@(?P<rev>[^/@][^/@]*))?(?:/(?P<path>.*))?$"
)
_BUCKET = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{1,254}$")


@dataclass(frozen=True, slots=True)
class Source:
    """One source. ``authority``: bucket, container, host[:port] or ``org/name``; ``path``: decoded, no leading slash.

    ``revision`` is what was asked for on a hub ("main" unless given), "" elsewhere; ``query`` only for http(s).
    """

    scheme: str
    authority: str
    path: str
    revision: str = ""
    query: str = ""

    def __str__(self) -> str:
        path = quote(self.path, safe="/@:+=,~!$&'()*;")
        if self.scheme == "file":
            return f"file:///{path}"
        if self.scheme == "hf":
            # A revision such as refs/pr/1 holds slashes: they are quoted, so that the file's path stays apart.
            return f"hf://{self.authority}@{quote(self.revision, safe='')}" + (f"/{path}" if path else "")
        return f"{self.scheme}://{self.authority}/{path}" + (f"?{self.query}" if self.query else "")

    @property
    def is_tree(self) -> bool:
        """Whether the spelling itself says "everything below": an empty path, or one that ends in a slash."""
        return not self.path or self.path.endswith("/")

    @property
    def is_local(self) -> bool:
        """Whether it means something else on every host: no other is asked about it, or told."""
        return self.scheme == "file"

    @property
    def public(self) -> str:
        """The spelling for logs and reports: a query (it may be a signature) is left out."""
        return str(replace(self, query="")) + ("?…" if self.query else "")

    def at(self, revision: str) -> Source:
        """The same source pinned to ``revision`` (a hub's commit)."""
        return replace(self, revision=revision)

    def child(self, path: str) -> Source:
        """The source of one file below this one; ``path`` is relative to it."""
        base = self.path if self.is_tree else self.path + "/"
        return replace(self, path=(base + path) if base else path)


def is_source(text: str) -> bool:
    """Whether ``text`` is written as a source (``scheme://``) and not as a plain local path."""
    return "://" in text[:16]


def parse_source(text: str) -> Source:
    """Parse a source as a user wrote it. Raises SourceError that names what is wrong with it."""
    if len(text) <= MAX_SOURCE:
        source = _parse(text)
        if len(str(source)) <= MAX_SOURCE:
            return source
    raise SourceError(f"{_shown(text)}: a source of more than {MAX_SOURCE} characters")


def _parse(text: str) -> Source:
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise SourceError(f"{_shown(text)}: unknown scheme; a source starts with one of {known}")
    if any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in unquote(rest)):
        raise SourceError(f"{_shown(text)}: control characters in a source")
    if scheme == "hf":
        return _parse_hf(text, rest)
    query = ""
    if scheme in ("https", "http"):
        try:
            split = urlsplit(text)
            _ = split.port
        except ValueError as error:
            raise SourceError(f"{_shown(text)}: {error}") from None
        if "@" in split.netloc:
            raise SourceError(f"{scheme}://…@{split.hostname}: credentials in a source; set them in the configuration")
        authority, path, query = split.netloc.lower(), split.path, split.query
        if not split.hostname:
            raise SourceError(f"{_shown(text)}: no host")
    elif scheme == "file":
        if not rest.startswith("/"):
            raise SourceError(f"{_shown(text)}: a file source is file:///absolute/path")
        authority, path = "", rest
    else:
        authority, _, path = rest.partition("/")
        if not _BUCKET.match(authority):
            raise SourceError(
                f"{_shown(text)}: a bucket's name of 2 to 255 letters, digits, '.', '_' or '-' is expected"
            )
    return Source(scheme, authority, _clean(text, unquote(path)), query=query)


def _parse_hf(text: str, rest: str) -> Source:
    match = _HF.match(rest)
    if not match:
        raise SourceError(f"{_shown(text)}: a hub source is hf://org/name[@revision][/file]")
    if "." in (match["org"], match["name"]) or any(pair in match[part] for pair in ("..", "--") for part in (1, 2)):
        raise SourceError(f"{_shown(text)}: a hub source is hf://org/name[@revision][/file]")
    revision = unquote(match["rev"] or "main")
    if ".." in revision.split("/"):
        raise SourceError(f"{_shown(text)}: {revision!r} is not a revision")
    return Source(
        "hf", f"{match['org']}/{match['name']}", _clean(text, unquote(match["path"] or "")), revision=revision
    )


def _clean(text: str, path: str) -> str:
    path = path.lstrip("/")
    parts = path.split("/")
    if ".." in parts or "." in parts:
        raise SourceError(f"{_shown(text)}: '.' and '..' are not allowed in a source")
    if not path:
        return ""
    return posixpath.normpath(path) + ("/" if path.endswith("/") else "")


def _shown(text: str) -> str:
    """What an error may repeat of a source: no query, no credentials, bounded."""
    head, _, _ = text.partition("?")
    scheme, separator, rest = head.partition("://")
    authority, slash, path = rest.partition("/")
    if scheme.lower() != "hf" and "@" in authority:
        authority = "…@" + authority.rpartition("@")[2]
    shown = f"{scheme}{separator}{authority}{slash}{path}"
    return repr(shown if len(shown) <= 200 else shown[:200] + "…")
