"""HTTP as web servers and the hub need it: one request, its answer's claims, its body in the caller's buffer.

aiohttp, and not obstore: ETag, Content-Range and status of *every* answer must be seen, redirects included. For
``http://`` origin/plain.py is faster still; both give a Reply.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, InvalidURL
from time import monotonic
from typing import TYPE_CHECKING, Protocol
from urllib.request import getproxies, proxy_bypass

from weightcache.core.snapshot import FileEntry
from weightcache.core.source import Source
from weightcache.errors import SourceError, WeightcacheError
from weightcache.origin.base import (
    PATIENCE,
    PIECE,
    Came,
    Room,
    allowance,
    broke_off,
    changed,
    check_size,
    check_state,
    refused,
    unavailable,
    version_of,
)

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession
    from yarl import URL

REDIRECTS = frozenset((301, 302, 303, 307, 308))
MAX_REDIRECTS = 5
FLOW = 256 << 10  # bytes of a streamed body at a time: whoever wants its start only is not sent much more
LONGEST_WAIT = 3600.0  # seconds: no Retry-After is believed beyond
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "weightcache"}  # bodies arrive as they were stored

_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a 200 or 206 claims: the object's total size, and which bytes [begin, end) of it follow."""

    total: int
    begin: int
    end: int
    tag: str | None
    modified: datetime | None


class Reply(Protocol):
    """An answer whose head has come. ``headers`` know no upper and lower case."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def content_length(self) -> int | None: ...

    async def take(self, buffer: memoryview) -> int:
        """The next bytes of the body: as many as ``buffer`` holds, or as come within PATIENCE; none at its end."""
        ...


class _SessionReply:
    """aiohttp's."""

    def __init__(self, response: ClientResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.content_length = response.content_length
        self._content = response.content

    async def take(self, buffer: memoryview) -> int:
        at, until = 0, monotonic() + PATIENCE
        while at < len(buffer) and (part := await self._content.read(len(buffer) - at)):
            buffer[at : at + len(part)] = part
            at += len(part)
            if monotonic() > until:
                break
        return at


def open_session(timeout: float) -> ClientSession:
    """A client whose requests fail after ``timeout`` seconds without a byte, and bodies arrive as they were sent."""
    from aiohttp import ClientSession, ClientTimeout, DummyCookieJar

    return ClientSession(
        timeout=ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
        headers=HEADERS,
        auto_decompress=False,
        cookie_jar=DummyCookieJar(),
        read_bufsize=PIECE,
    )


@asynccontextmanager
async def ask(
    session: ClientSession, source: Source, method: str, url: URL, headers: dict[str, str]
) -> AsyncIterator[Reply]:
    """One request, no redirect followed. A body that is not read to its end costs the connection, no more bytes."""
    proxy = proxy_for(url)
    with errors(source):
        async with session.request(method, url, headers=headers, allow_redirects=False, proxy=proxy) as response:
            yield _SessionReply(response)


def proxy_for(url: URL) -> str | None:
    """The environment's proxy; not aiohttp's trust_env, which would send ~/.netrc logins along."""
    return None if proxy_bypass(url.host or "") else getproxies().get(url.scheme)


@contextmanager
def errors(source: Source) -> Iterator[None]:
    """Turn what the clients raise into errors that name ``source`` (their own texts may hold a signed address)."""
    try:
        yield
    except TimeoutError:
        raise unavailable(source, "no answer within the time limit") from None
    except WeightcacheError:
        raise
    except Exception as error:
        aiohttp = sys.modules.get("aiohttp")  # who did not need it does not pay for it
        if isinstance(error, ssl.SSLError) or (aiohttp and isinstance(error, aiohttp.ClientSSLError)):
            raise SourceError(f"{source.public}: no trusted TLS connection; check the host's certificate") from None
        if isinstance(error, InvalidURL) or (aiohttp and isinstance(error, aiohttp.InvalidURL)):
            raise SourceError(f"{source.public}: not an address that can be asked") from None
        if not isinstance(error, OSError | HTTPException) and not (aiohttp and isinstance(error, aiohttp.ClientError)):
            raise
        number = error.errno if isinstance(error, OSError) else None
        raise unavailable(source, os.strerror(number) if number else type(error).__name__) from None


def redirect(source: Source, url: URL, response: Reply) -> URL:
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


def read_answer(source: Source, response: Reply) -> Answer:
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


def retry_after(response: Reply) -> float | None:
    """The seconds an answer asks to wait (``Retry-After``: a number or a date), at most LONGEST_WAIT."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:9])
    elif date := http_date(text):
        seconds = (date - datetime.now(UTC)).total_seconds()
    else:
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)


async def fill(source: Source, response: Reply, skip: int, length: int, room: Room, seconds: float, came: Came) -> None:
    """Take ``length`` bytes of a body, after ``skip`` bytes; what follows is not read. ``came`` is given each part.

    Raises OriginUnavailable when the body ends early, or takes longer than ``seconds``.
    """
    left, count = length, -1
    with errors(source):
        async with asyncio.timeout(seconds):
            while skip and (count := await response.take(memoryview(bytearray(skip)))):
                skip -= count
            while left and count:
                buffer = await room(left)
                while buffer and (count := await response.take(buffer)):
                    came(buffer[:count])
                    left -= count
                    buffer = buffer[count:]
    if left:
        raise broke_off(source, length - left, length)


def checked(entry: FileEntry, response: Reply) -> Answer:
    """The claims of an answer to a conditional GET; SourceChanged when they are not of the resolved version."""
    if response.status == 412:
        raise changed(entry, "something else")
    if response.status == 416:
        raise changed(entry, "shorter")
    if response.status not in (200, 206):
        raise refused(entry.source, response.status, retry_after=retry_after(response))
    answer = read_answer(entry.source, response)
    check_state(entry, version_of(answer.tag, answer.modified), answer.total)
    return answer


async def read_range(
    entry: FileEntry, response: Reply, begin: int, end: int, room: Room, came: Came, timeout: float
) -> None:
    """The body of a conditional GET for bytes [begin, end), as ``Origin.read`` brings it."""
    answer = checked(entry, response)
    if (answer.begin, answer.end) != (begin, end):
        got = f"bytes {answer.begin} to {answer.end}"
        raise SourceError(f"{entry.source.public}: asked for bytes {begin} to {end}, its server answers {got}")
    await fill(entry.source, response, 0, end - begin, room, allowance(timeout, end - begin), came)


async def flow(source: Source, response: Reply, length: int) -> AsyncGenerator[memoryview, None]:
    """A body of exactly ``length`` bytes, in pieces of at most PIECE bytes."""
    at, count = 0, -1
    while count:
        piece = memoryview(bytearray(FLOW))
        with errors(source):
            count = await response.take(piece)
        at += count
        if at > length:
            raise SourceError(f"{source.public}: sends more than the {length} bytes it stated")
        if count:
            yield piece[:count]
    if at < length:
        raise broke_off(source, at, length)
