"""``https://`` and ``http://``: single objects on any web server, each answer held against what was resolved."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from email.utils import format_datetime
from typing import TYPE_CHECKING

from weightcache.config import OriginConfig
from weightcache.core.ids import Buffer
from weightcache.core.published import beside
from weightcache.core.snapshot import FileEntry, Snapshot
from weightcache.core.source import Source, parse_source
from weightcache.errors import SourceError
from weightcache.origin import web
from weightcache.origin.base import (
    Came,
    Room,
    allowance,
    fresh,
    one_file,
    refused,
    strong_tag,
    too_long,
    unwritable,
    version_of,
)
from weightcache.origin.plain import PlainClient

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from yarl import URL


class HttpOrigin:
    """One object per source. ``admit`` raises for a redirect's target that the configuration refuses."""

    def __init__(self, config: OriginConfig, admit: Callable[[Source], None]) -> None:
        self._timeout = config.timeout
        self._admit = admit
        self._plain = PlainClient(config.timeout, config.streams)
        self._session: ClientSession | None = None

    async def resolve(self, source: Source) -> Snapshot:
        """Ask for the first byte: the answer shows size, version and whether ranges work, just as reads will see it.

        (A HEAD shows none of this reliably, and a signed address for GET refuses it.)
        """
        if source.is_tree:
            raise SourceError(f"{source.public}: a web server lists no directory; name one file")
        probe = {"Range": "bytes=0-0"}
        async with self._get(source, probe) as response:
            if response.status in (200, 206):
                answer = web.read_answer(source, response)
                if response.status == 200 or (answer.begin, answer.end) == (0, 1):
                    return one_file(source, _entry(source, answer, ranged=response.status == 206))
            elif response.status != 416:
                raise refused(source, response.status, retry_after=web.retry_after(response))
        # An empty object has no first byte (416); a wrong range is no range.
        async with self._get(source, {}) as response:
            if response.status != 200:
                raise refused(source, response.status, retry_after=web.retry_after(response))
            return one_file(source, _entry(source, web.read_answer(source, response), ranged=False))

    async def read(self, entry: FileEntry, begin: int, end: int, room: Room, came: Came) -> None:
        headers = {"Range": f"bytes={begin}-{end - 1}", **_condition(entry)}
        async with self._get(entry.source, headers) as response:
            await web.read_range(entry, response, begin, end, room, came, self._timeout)

    async def stream(self, entry: FileEntry) -> AsyncGenerator[Buffer, None]:
        async with self._get(entry.source, _condition(entry)) as response:
            answer = web.checked(entry, response)
            if answer.end - answer.begin != entry.size:
                raise SourceError(f"{entry.source.public}: asked for the whole, its server answers a part")
            async for piece in web.flow(entry.source, response, entry.size):
                yield piece

    async def beside(self, entry: FileEntry, limit: int) -> bytes | None:
        if entry.source.query:  # perhaps a signature, which is good for one address
            return None
        source = beside(entry.source)
        async with self._get(source, {}) as response:
            if response.status in (401, 403, 404, 410):
                return None
            if response.status != 200:
                raise refused(source, response.status)
            size = web.read_answer(source, response).total
            if size > limit:
                raise too_long(source, limit)
            parts: list[memoryview] = []
            await web.fill(source, response, 0, size, fresh, allowance(self._timeout, size), parts.append)
            return b"".join(parts)

    async def publish(self, entry: FileEntry, data: bytes, *, replace: bool) -> bool:
        raise unwritable(entry, "nothing can be written to a web server")

    async def close(self) -> None:
        self._plain.close()
        if self._session:
            await self._session.close()

    @asynccontextmanager
    async def _get(self, source: Source, headers: dict[str, str]) -> AsyncIterator[web.Reply]:
        from yarl import URL

        url = URL(str(source), encoded=True)
        for _ in range(web.MAX_REDIRECTS + 1):
            async with self._ask(source, url, headers) as response:
                if response.status not in web.REDIRECTS:
                    yield response
                    return
                url = web.redirect(source, url, response)
            self._admit(parse_source(str(url)))
        raise SourceError(f"{source.public}: redirected more than {web.MAX_REDIRECTS} times")

    @asynccontextmanager
    async def _ask(self, source: Source, url: URL, headers: dict[str, str]) -> AsyncIterator[web.Reply]:
        if url.scheme == "http" and web.proxy_for(url) is None:
            with web.errors(source):
                async with self._plain.get(url, headers | web.HEADERS) as reply:
                    yield reply
            return
        if self._session is None:
            self._session = web.open_session(self._timeout)
        async with web.ask(self._session, source, "GET", url, headers) as response:
            yield response


def _entry(source: Source, answer: web.Answer, *, ranged: bool) -> FileEntry:
    version = version_of(answer.tag, answer.modified)
    if not version:  # nothing tells one state from another: it can only be read in one go
        version, ranged = f"once:{secrets.token_hex(16)}", False
    return FileEntry(source.path.rpartition("/")[2], source, version, answer.total, ranged=ranged)


def _condition(entry: FileEntry) -> dict[str, str]:
    if tag := strong_tag(entry):
        return {"If-Match": tag}
    kind, _, value = entry.version.partition(":")
    if kind == "modified":
        return {"If-Unmodified-Since": format_datetime(datetime.fromisoformat(value), usegmt=True)}
    return {}
