"""HTTP as plain web servers and the hub need it: one request, its answer's claims, its body in one buffer.

aiohttp, and not obstore: ETag, Content-Range and status of *every* answer must be seen, redirects included.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.request import getproxies, proxy_bypass

from weightcache.core.source import Source
from weightcache.errors import SourceError
from weightcache.origin.base import PIECE, broke_off, check_size, pieces, unavailable

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession
    from yarl import URL

REDIRECTS = frozenset((301, 302, 303, 307, 308))
MAX_REDIRECTS = 5
LONGEST_WAIT = 3600.0  # seconds: no Retry-After is believed beyond

_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a 200 or 206 claims: the object's total size, and which bytes [begin, end) of it follow."""

    total: int
    begin: int
    end: int
    tag: str | None
    modified: datetime | None


def open_session(timeout: float) -> ClientSession:
    """A client whose requests fail after ``timeout`` seconds without a byte, and bodies arrive as they were sent."""
    from aiohttp import ClientSession, ClientTimeout, DummyCookieJar

    return ClientSession(
        timeout=ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
        headers={"Accept-Encoding": "identity", "User-Agent": "weightcache"},
        auto_decompress=False,
        cookie_jar=DummyCookieJar(),
        read_bufsize=PIECE,
    )


@asynccontextmanager
async def ask(
    session: ClientSession, source: Source, method: str, url: URL, headers: dict[str, str]
) -> AsyncIterator[ClientResponse]:
    """One request, no redirect followed. A body that is not read to its end costs the connection, no more bytes."""
    # The environment's proxies, but not aiohttp's trust_env: it would send ~/.netrc logins along.
    proxy = None if proxy_bypass(url.host or "") else getproxies().get(url.scheme)
    with errors(source):
        async with session.request(method, url, headers=headers, allow_redirects=False, proxy=proxy) as response:
            yield response


@contextmanager
def errors(source: Source) -> Iterator[None]:
    """Turn what aiohttp raises into errors that name ``source`` (aiohttp's own texts may hold a signed address)."""
    from aiohttp import ClientError, ClientSSLError, InvalidURL

    try:
        yield
    except TimeoutError:
        raise unavailable(source, "no answer within the time limit") from None
    except (ClientSSLError, ssl.SSLError):
        raise SourceError(f"{source.public}: no trusted TLS connection; check the host's certificate") from None
    except InvalidURL:
        raise SourceError(f"{source.public}: not an address that can be asked") from None
    except (ClientError, OSError) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise unavailable(source, os.strerror(number) if number else type(error).__name__) from None


def redirect(source: Source, url: URL, response: ClientResponse) -> URL:
    """Where a redirect points to: another web address, and never from https to less."""
    from yarl import URL

    location = response.headers.get("Location", "")
    try:
        target = url.join(URL(location, encoded=True))
    except ValueError:
        target = URL()
    if target.scheme not in ("http", "https") or not target.host or target.user or target.password:
        raise SourceError(f"{source.public}: redirected to something that is no plain web address")
    if url.scheme == "https" and target.scheme != "https":
        raise SourceError(f"{source.public}: redirected from https to {target.scheme}://{target.host}; refused")
    return target


def read_answer(source: Source, response: ClientResponse) -> Answer:
    """The claims of a 200 or 206. Raises SourceError when they are missing or contradict each other."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise SourceError(
            f"{source.public}: sent compressed though that was declined; its bytes would not be the file's"
        )
    modified = http_date(headers.get("Last-Modified"))
    tag = headers.get("ETag")
    if response.status == 206:
        match = _RANGE.fullmatch(headers.get("Content-Range", "").strip())
        if not match:
            raise SourceError(f"{source.public}: answers a range without a proper Content-Range")
        first, last, total = (int(number) for number in match.groups())
        if not first <= last < total:
            raise SourceError(f"{source.public}: answers a range with the impossible {match[0]!r}")
        return Answer(check_size(source, total), first, last + 1, tag, modified)
    length = response.content_length
    if length is None:
        raise SourceError(f"{source.public}: its server states no Content-Length; the size must be known beforehand")
    return Answer(check_size(source, length), 0, length, tag, modified)


def http_date(text: str | None) -> datetime | None:
    """An HTTP date, or None for anything else."""
    try:
        found = parsedate_to_datetime(text or "")
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def retry_after(response: ClientResponse) -> float | None:
    """The seconds an answer asks to wait (``Retry-After``: a number or a date), at most LONGEST_WAIT."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:9])
    elif date := http_date(text):
        seconds = (date - datetime.now(UTC)).total_seconds()
    else:
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)


async def fill(source: Source, response: ClientResponse, skip: int, length: int, seconds: float) -> bytearray:
    """``length`` bytes of a body, after ``skip``, as one buffer; what follows them is not read.

    Raises OriginUnavailable when the body ends early, or takes longer than ``seconds``.
    """
    data = bytearray(length)
    at = -skip
    with errors(source):
        async with asyncio.timeout(seconds):
            async for part in response.content.iter_any():
                fresh = memoryview(part)[max(0, -at) :][: length - max(0, at)]
                data[max(0, at) : max(0, at) + len(fresh)] = fresh
                at += len(part)
                if at >= length:
                    return data
    raise broke_off(source, max(0, at), length)


async def flow(source: Source, response: ClientResponse, length: int) -> AsyncGenerator[memoryview, None]:
    """A body of exactly ``length`` bytes, in pieces of at most PIECE bytes."""
    at = 0
    with errors(source):
        async for part in response.content.iter_any():
            at += len(part)
            if at > length:
                raise SourceError(f"{source.public}: sends more than the {length} bytes it stated")
            for piece in pieces(part):
                yield piece
    if at < length:
        raise broke_off(source, at, length)
