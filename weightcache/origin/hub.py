"""``hf://``: the Hugging Face hub, or what ``HF_ENDPOINT`` names.

Theory of operation. ``huggingface_hub`` lists a repository at the commit that the asked revision is now, in one
request; everything after that is pinned to the commit. A file's identity is the SHA-256 of its LFS object, or the git
blob id of a small file. To read one, the hub's resolver is asked once (it is rate-limited): it confirms commit,
identity and size and redirects to a signed address on a CDN, which is kept for all further ranges, and renewed once
when it answers 403, because it expired. What the CDN calls an ETag is not the hub's: of its answers range and total
size are compared, and the bytes in the end against the SHA-256. The token goes to the hub's own host, never to the
CDN's.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from weightcache.config import OriginConfig
from weightcache.core.ids import Buffer
from weightcache.core.published import beside, without_published
from weightcache.core.snapshot import FileEntry, Snapshot, check_path, folder_name
from weightcache.core.source import Source
from weightcache.errors import SourceDenied, SourceError, SourceNotFound, WeightcacheError
from weightcache.origin import web
from weightcache.origin.base import (
    Came,
    Room,
    allowance,
    changed,
    check_count,
    check_size,
    check_state,
    read_whole,
    refused,
    too_long,
    unavailable,
    unwritable,
)

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from yarl import URL

ADDRESSES = 4096  # kept at most
LISTED = 50_000  # the hub's listing of a repository is not to be relied on beyond this many files


@dataclass(slots=True)
class _Place:
    """Where a file's bytes are. The lock makes readers that start together ask the resolver once."""

    address: URL | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class HubOrigin:
    """Repositories of models, or one file of them. Files keep their paths in the repository, under one folder."""

    def __init__(self, config: OriginConfig) -> None:
        from yarl import URL

        self._timeout = config.timeout
        self._endpoint = URL((os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"))
        self._session: ClientSession | None = None
        self._places: OrderedDict[Source, _Place] = OrderedDict()
        self._beside: OrderedDict[Source, FileEntry] = OrderedDict()  # published manifests that were listed

    async def resolve(self, source: Source) -> Snapshot:
        commit, listed = await asyncio.to_thread(self._list, source)
        named = [entry for entry in listed if entry.path == source.path]
        below = source.path if source.is_tree else f"{source.path}/"
        files = named or sorted((f for f in listed if f.path.startswith(below)), key=lambda entry: entry.path)
        if not files:
            raise SourceNotFound(f"{source.public}: the repository has no such file or directory at {commit[:12]}")
        pinned = source.revision == commit
        folder = folder_name(source)
        return Snapshot(source, folder, commit, tuple(files), time.time(), immutable=pinned, single=bool(named))

    async def read(self, entry: FileEntry, begin: int, end: int, room: Room, came: Came) -> None:
        async with self._get(entry, {"Range": f"bytes={begin}-{end - 1}"}) as (response, answer):
            whole = (answer.begin, answer.end) == (0, entry.size)
            # The hub may answer with all of a small file that lies in git itself; a CDN never should.
            if (answer.begin, answer.end) != (begin, end) and not (whole and entry.version.startswith("etag:")):
                got = f"bytes {answer.begin} to {answer.end}"
                raise SourceError(f"{entry.source.public}: asked for bytes {begin} to {end}, the hub answers {got}")
            time_limit = allowance(self._timeout, answer.end - answer.begin)
            await web.fill(entry.source, response, begin - answer.begin, end - begin, room, time_limit, came)

    async def stream(self, entry: FileEntry) -> AsyncGenerator[Buffer, None]:
        async with self._get(entry, {}) as (response, answer):
            if answer.end - answer.begin != entry.size:
                raise SourceError(f"{entry.source.public}: asked for the whole, the hub answers a part")
            async for piece in web.flow(entry.source, response, entry.size):
                yield piece

    async def beside(self, entry: FileEntry, limit: int) -> bytes | None:
        """Only where a listing has shown that there is one: the resolver counts what it is asked."""
        found = self._beside.get(beside(entry.source))
        if found is None:
            return None
        if found.size > limit:
            raise too_long(found.source, limit)
        return await read_whole(self, found, 0, found.size) if found.size else b""

    async def publish(self, entry: FileEntry, data: bytes, *, replace: bool) -> bool:
        raise unwritable(entry, "nothing is written to a hub: that would be another commit")

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    # -- what a repository holds

    def _list(self, source: Source) -> tuple[str, list[FileEntry]]:
        """The commit that ``source.revision`` is now, and its files. Blocks for one request."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        try:
            info = HfApi(endpoint=str(self._endpoint)).model_info(
                source.authority, revision=source.revision, files_metadata=True, timeout=self._timeout
            )
        except HfHubHTTPError as error:
            raise _listing_refused(source, error) from None
        except HFValidationError:
            raise SourceError(f"{source.public}: not the name of a repository") from None
        except OfflineModeIsEnabled:
            raise SourceDenied(f"{source.public}: the hub is switched off; unset HF_HUB_OFFLINE") from None
        except Exception as error:  # noqa: BLE001 - whatever the hub's HTTP library raises, and malformed answers
            raise unavailable(source, f"the hub cannot be asked ({type(error).__name__})") from None
        siblings = info.siblings or []
        if not info.sha or len(siblings) >= LISTED:
            raise SourceError(f"{source.public}: {len(siblings)} files; the hub lists fewer than {LISTED} reliably")
        check_count(source, len(siblings))
        listed = list(_entries(source.at(info.sha), siblings))
        files = without_published(listed)
        kept = {entry.path for entry in files}
        for entry in listed:
            if entry.path not in kept:
                self._beside[entry.source] = entry
                if len(self._beside) > ADDRESSES:
                    self._beside.popitem(last=False)
        return info.sha, files

    # -- where its bytes are

    @asynccontextmanager
    async def _get(self, entry: FileEntry, headers: dict[str, str]) -> AsyncIterator[tuple[web.Reply, web.Answer]]:
        """A GET at the file's address, whose answer has been held against ``entry``."""
        stale: URL | None = None
        while True:
            url = await self._address(entry, stale)
            async with self._ask(entry.source, "GET", url, headers) as response:
                if response.status in (200, 206):
                    answer = web.read_answer(entry.source, response)
                    identity = entry.version if self._is_foreign(url) else _identity(entry, response)
                    check_state(entry, identity, answer.total)
                    yield response, answer
                    return
                if stale is not None or response.status != 403 or not self._is_foreign(url):
                    raise _refused(entry.source, response)
            stale = url

    async def _address(self, entry: FileEntry, stale: URL | None) -> URL:
        """The file's kept address, asked for anew when there is none but ``stale``."""
        place = self._places.setdefault(entry.source, _Place())
        self._places.move_to_end(entry.source)
        if len(self._places) > ADDRESSES:
            self._places.popitem(last=False)
        async with place.lock:
            if place.address is None or place.address is stale:
                place.address = await self._locate(entry)
            return place.address

    async def _locate(self, entry: FileEntry) -> URL:
        """Ask the resolver; redirects on its own host (a renamed repository) are followed, one to elsewhere is kept."""
        source = entry.source
        path = f"/{source.authority}/resolve/{source.revision}/{quote(source.path)}"
        url = self._endpoint.join(type(self._endpoint)(self._endpoint.raw_path.rstrip("/") + path, encoded=True))
        for _ in range(web.MAX_REDIRECTS + 1):
            async with self._ask(source, "HEAD", url, {}) as response:
                if response.status not in (200, *web.REDIRECTS):
                    raise _refused(source, response)
                target = url if response.status == 200 else web.redirect(source, url, response)
            if target is url or self._is_foreign(target):
                _check_resolved(entry, response)
                return target
            url = target
        raise SourceError(f"{source.public}: redirected more than {web.MAX_REDIRECTS} times")

    @asynccontextmanager
    async def _ask(self, source: Source, method: str, url: URL, headers: dict[str, str]) -> AsyncIterator[web.Reply]:
        if self._session is None:
            self._session = web.open_session(self._timeout)
        if not self._is_foreign(url):
            from huggingface_hub import get_token

            if token := await asyncio.to_thread(get_token):
                headers = {**headers, "Authorization": f"Bearer {token}"}
        async with web.ask(self._session, source, method, url, headers) as response:
            yield response

    def _is_foreign(self, url: URL) -> bool:
        return url.origin() != self._endpoint.origin()


def _entries(source: Source, siblings: list[Any]) -> Iterator[FileEntry]:
    for sibling in siblings:
        path = check_path(sibling.rfilename)
        version = f"sha256:{sibling.lfs.sha256}" if sibling.lfs else f"etag:{sibling.blob_id}"
        size = sibling.lfs.size if sibling.lfs else sibling.size
        if size is None or (not sibling.lfs and not sibling.blob_id):
            raise SourceError(f"{source.public}: the hub does not state size and identity of {path}")
        digest = version if sibling.lfs else ""
        yield FileEntry(path, replace(source, path=path), version, check_size(source, size), digest)


def _identity(entry: FileEntry, response: web.Reply) -> str:
    """The identity that the hub's own answer states, spelled as a version of the entry's kind."""
    tag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag") or ""
    return f"{entry.version.partition(':')[0]}:{tag.removeprefix('W/').strip(chr(34))}"


def _check_resolved(entry: FileEntry, response: web.Reply) -> None:
    commit = response.headers.get("X-Repo-Commit", "")
    if commit != entry.source.revision:
        raise changed(entry, f"at commit {commit[:40] or 'unknown'}")
    size = response.headers.get("X-Linked-Size", "")
    check_state(entry, _identity(entry, response), int(size) if size.isdecimal() else entry.size)


def _refused(source: Source, response: web.Reply) -> WeightcacheError:
    detail = response.headers.get("X-Error-Code", "")
    return refused(source, response.status, detail[:64], web.retry_after(response))


def _listing_refused(source: Source, error: Any) -> WeightcacheError:
    status = int(error.response.status_code)
    # The hub does not tell strangers whether a private repository exists.
    detail = "no such repository, or a private one" if status == 401 else error.response.headers.get("X-Error-Code", "")
    return refused(source, status, detail[:64])
