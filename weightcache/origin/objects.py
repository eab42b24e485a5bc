"""``s3://``, ``gs://`` and ``az://`` through obstore.

Ranges of objects behind a plain ``http://`` endpoint come by signed addresses, straight into the reader's memory: 1.2
times as fast, at 0.8 of the CPU (``python -m bench origin``).

obstore sends ``If-Match`` but believes whatever comes back, so each answer's ETag, size and range are compared here.
Its own retries are off: one call is one attempt.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import timedelta
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from weightcache.config import OriginConfig
from weightcache.core.ids import Buffer
from weightcache.core.published import beside
from weightcache.core.snapshot import FileEntry, Snapshot
from weightcache.core.source import Source
from weightcache.errors import SourceDenied, SourceError, SourceNotFound
from weightcache.origin import web
from weightcache.origin.base import (
    PIECE,
    Came,
    Room,
    allowance,
    broke_off,
    changed,
    check_count,
    check_size,
    check_state,
    one_file,
    pieces,
    refused,
    strong_tag,
    too_long,
    tree,
    unavailable,
    unpermitted,
    version_of,
)
from weightcache.origin.plain import PlainClient

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta
    from obstore.store import AzureStore, GCSStore, S3Store

    Store = AzureStore | GCSStore | S3Store

# Where each client library reads another endpoint from: one that says http:// must be permitted to be that.
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_UNSIGNED = {"s3": "AWS_SKIP_SIGNATURE", "gs": "GOOGLE_SKIP_SIGNATURE", "az": "AZURE_SKIP_SIGNATURE"}
_TELLING = (408, 412, 416, 425, 429)  # of the statuses 3xx and 4xx: obstore's word on them would be no other
_SIGNED = timedelta(minutes=5)  # for which an address is good
_FOREVER = timedelta(days=7)  # obstore's limit on a whole request, which has ours for reads and none for streams

GATHERED = 256 << 10  # bytes that obstore hands over at a time, at least

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_KIND = re.compile(r"kind: (Connect|Request|Timeout|Interrupted|Decode)\b")
_IMPROPER = re.compile(r"source: (NotPartial|UnexpectedRange|NoContentRange|ParseContentRange|Header)\b")
_METADATA = re.compile(r"169\.254\.169\.254|metadata\.google\.internal|/latest/api/token|/latest/meta-data")
_MD5 = re.compile(r"etag:[0-9a-f]{32}")


class ObjectOrigin:
    """Object stores. Credentials, region and endpoint come from the variables that each store's own tools read."""

    def __init__(self, config: OriginConfig) -> None:
        self._timeout = config.timeout
        self._plain = PlainClient(config.timeout, config.streams)
        self._stores: dict[tuple[str, str], Store] = {}

    async def resolve(self, source: Source) -> Snapshot:
        import obstore

        store = self._store(source)
        if not source.is_tree:
            with _errors(source):
                try:
                    meta = await obstore.head_async(store, source.path)
                except FileNotFoundError:
                    meta = None  # perhaps things lie below it
            if meta is not None:
                digest = await self._stated_digest(store, source, version_of(meta["e_tag"], None))
                return one_file(source, _entry(source, source.path.rpartition("/")[2], meta, digest))
        return tree(source, _files(source, await self._list(store, source)))

    async def read(self, entry: FileEntry, begin: int, end: int, room: Room, came: Came) -> None:
        if not await self._read_plain(entry, begin, end, room, came):
            await self._read_pieces(entry, begin, end, came)

    async def _read_plain(self, entry: FileEntry, begin: int, end: int, room: Room, came: Came) -> bool:
        """By a signed address, if that is plain ``http://``; False when obstore is to read, or to say what is wrong."""
        import obstore
        from yarl import URL

        if entry.source.scheme != "s3" or not _may_be_plain("s3") or not _signs("s3"):
            return False
        try:
            async with asyncio.timeout(self._timeout):
                signed = await obstore.sign_async(self._store(entry.source), "GET", entry.source.path, _SIGNED)
        except (obstore.exceptions.BaseError, TimeoutError):  # nothing to sign with
            return False
        address = URL(signed, encoded=True)
        if address.scheme != "http" or web.proxy_for(address) is not None:
            return False
        headers = {"Range": f"bytes={begin}-{end - 1}"} | web.HEADERS
        if tag := strong_tag(entry):
            headers["If-Match"] = tag
        with web.errors(entry.source):
            async with self._plain.get(address, headers) as reply:
                if 300 <= reply.status < 500 and reply.status not in _TELLING:
                    return False
                await web.read_range(entry, reply, begin, end, room, came, self._timeout)
        return True

    async def _read_pieces(self, entry: FileEntry, begin: int, end: int, came: Came) -> None:
        left = end - begin
        with _errors(entry.source, entry):
            async with asyncio.timeout(allowance(self._timeout, left)):
                result = await self._get(entry, {"range": (begin, end)})
                if result.range != (begin, end):
                    raise SourceError(f"{entry.source.public}: asked for {(begin, end)}, it answers {result.range}")
                # In pieces, which are kept as they are: what it collects into one of 8 MiB is there twice meanwhile.
                async for part in result.stream(min_chunk_size=GATHERED):
                    came(piece := memoryview(part)[:left])
                    left -= len(piece)
                    if not left:  # more than an honest answer is given up
                        return
        raise broke_off(entry.source, end - begin - left, end - begin)

    async def stream(self, entry: FileEntry) -> AsyncGenerator[Buffer, None]:
        at = 0
        with _errors(entry.source, entry):
            result = await self._get(entry, {})
            async for part in result.stream(min_chunk_size=PIECE):
                at += len(part)
                if at > entry.size:
                    raise SourceError(f"{entry.source.public}: sends more than the {entry.size} bytes it stated")
                for piece in pieces(part):
                    yield piece
        if at < entry.size:
            raise broke_off(entry.source, at, entry.size)

    async def beside(self, entry: FileEntry, limit: int) -> bytes | None:
        import obstore

        source = beside(entry.source)
        data = bytearray()
        with _errors(source):
            async with asyncio.timeout(allowance(self._timeout, PIECE)):
                try:
                    result = await obstore.get_async(self._store(source), source.path)
                except FileNotFoundError:
                    return None
                async for part in result.stream(min_chunk_size=PIECE):
                    data += part
                    if len(data) > limit:
                        raise too_long(source, limit)
        return bytes(data)

    async def publish(self, entry: FileEntry, data: bytes, *, replace: bool) -> bool:
        import obstore
        from obstore import exceptions

        source = beside(entry.source)
        store = self._store(source)
        try:
            with _errors(source):
                async with asyncio.timeout(allowance(self._timeout, len(data))):
                    try:
                        mode: Literal["create", "overwrite"] = "overwrite" if replace else "create"
                        await obstore.put_async(store, source.path, data, mode=mode, use_multipart=False)
                    except (exceptions.NotSupportedError, NotImplementedError):  # it knows no condition
                        await obstore.put_async(store, source.path, data, use_multipart=False)
                    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                        return False
        except SourceDenied:
            raise unpermitted(entry) from None
        return True

    async def close(self) -> None:
        self._plain.close()
        self._stores.clear()

    async def _get(self, entry: FileEntry, options: dict[str, Any]) -> GetResult:
        import obstore

        options["if_match"] = strong_tag(entry)
        result = await obstore.get_async(self._store(entry.source), entry.source.path, options=options)  # type: ignore[arg-type]
        meta = result.meta
        check_state(entry, version_of(meta["e_tag"], meta["last_modified"]), meta["size"])
        return result

    async def _list(self, store: Store, source: Source) -> list[ObjectMeta]:
        import obstore

        found: list[ObjectMeta] = []
        with _errors(source):
            async for batch in obstore.list(store, source.path.rstrip("/") or None):
                found.extend(batch)
                check_count(source, len(found))
        return found

    def _store(self, source: Source) -> Store:
        from obstore import store

        made = self._stores.get((source.scheme, source.authority))
        if made is None:
            options: dict[str, Any] = {
                "client_options": {
                    "connect_timeout": timedelta(seconds=self._timeout),
                    "read_timeout": timedelta(seconds=self._timeout),
                    "timeout": _FOREVER,
                    "user_agent": "weightcache",
                },
                "retry_config": {"max_retries": 0},
            }
            if _may_be_plain(source.scheme):
                options["client_options"]["allow_http"] = True
            kind = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}[source.scheme]
            with _errors(source):
                made = self._stores[source.scheme, source.authority] = kind(source.authority, **options)
        return made

    async def _stated_digest(self, store: Store, source: Source, version: str) -> str:
        """What the store states of the whole object's bytes, or "".

        obstore keeps the headers to itself, so a signed HEAD asks for them. Whoever cannot sign, or is not answered,
        only goes without: the digest is a second check, after the version.
        """
        import obstore

        if not _signs(source.scheme) or (source.scheme == "s3" and not _MD5.fullmatch(version)):
            return ""
        try:
            async with asyncio.timeout(self._timeout):
                address = await obstore.sign_async(store, "HEAD", source.path, _SIGNED)
                headers = await asyncio.to_thread(_head, address, self._timeout)
        except (obstore.exceptions.BaseError, HTTPException, OSError, ValueError):
            return ""
        same = version_of(headers.get("etag"), None) == version
        return stated_digest(source.scheme, version, headers) if same else ""


def _may_be_plain(scheme: str) -> bool:
    """Whether an endpoint that is set for these stores says ``http://``."""
    return any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS[scheme])


def _signs(scheme: str) -> bool:
    """Whether requests to these stores are signed. Where not, obstore would still look for credentials to sign with."""
    return os.environ.get(_UNSIGNED[scheme], "").lower() not in ("1", "true", "on", "yes", "y")


def _head(address: str, timeout: float) -> dict[str, str]:
    """What an address answers to HEAD, names in lower case; nothing when that is no success.

    Not by aiohttp, which nothing else needs here: its import takes 8 MB and 0.13 s.
    """
    parts = urlsplit(address)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    with closing(kind(parts.netloc, timeout=timeout)) as connection:
        connection.request("HEAD", f"{parts.path}?{parts.query}")
        response = connection.getresponse()
        return {name.lower(): value for name, value in response.headers.items()} if response.status == 200 else {}


def stated_digest(scheme: str, version: str, headers: Mapping[str, str]) -> str:
    """The digest of the whole object that a store's answer to HEAD states, as ``md5:HEX`` or ``crc32c:HEX``, or "".

    An S3 ETag of one part is its MD5, unless it was encrypted with a key of KMS or of the customer.
    """
    if scheme == "s3":
        keys = "x-amz-server-side-encryption-customer-algorithm" in headers
        plain = headers.get("x-amz-server-side-encryption", "AES256") == "AES256" and not keys
        return f"md5:{version.removeprefix('etag:')}" if plain and _MD5.fullmatch(version) else ""
    if scheme == "gs":
        found = re.search(r"crc32c=([A-Za-z0-9+/]{6}==)", headers.get("x-goog-hash", ""))
        return f"crc32c:{base64.b64decode(found[1]).hex()}" if found else ""
    found = re.fullmatch(r"[A-Za-z0-9+/]{22}==", headers.get("content-md5", ""))
    return f"md5:{base64.b64decode(found[0]).hex()}" if found else ""


def _entry(source: Source, path: str, meta: ObjectMeta, digest: str = "") -> FileEntry:
    version = version_of(meta["e_tag"], meta["last_modified"])
    if not version:
        raise SourceError(
            f"{source.public}: its store states neither an ETag nor a time; it cannot be told when it changes"
        )
    return FileEntry(path, source, version, check_size(source, meta["size"]), digest)


def _files(source: Source, found: Iterable[ObjectMeta]) -> Iterator[FileEntry]:
    """The objects below ``source``, without the empty ones that stand for directories."""
    base = source.path.rstrip("/")
    below = [(meta["path"].removeprefix(base).lstrip("/"), meta) for meta in found]
    directories = {path[:at] for path, _ in below for at, char in enumerate(path) if char == "/"} | {""}
    for path, meta in below:
        if path not in directories:
            yield _entry(source.child(path), path, meta)
        elif meta["size"]:
            name = source.child(path).public if path else source.public
            raise SourceError(f"{name}: an object, and objects below it: no directory can hold both")


@contextmanager
def _errors(source: Source, entry: FileEntry | None = None) -> Iterator[None]:
    """Turn what obstore raises into our errors: status and code, as its texts hold addresses and whole bodies."""
    from obstore import exceptions

    try:
        yield
    except TimeoutError:
        raise unavailable(source, "no answer within the time limit") from None
    except (exceptions.BaseError, FileNotFoundError, ValueError) as error:
        text = str(error)
        status = _STATUS.search(text)
        code = _CODE.search(text)
        if _METADATA.search(text):  # it looked for credentials of the machine's own role, and there are none
            raise refused(source, 401, "no credentials found") from None
        if status and status[1] == "412" and entry:
            raise changed(entry, "something else") from None
        if status:
            raise refused(source, int(status[1]), code[1] if code else "") from None
        if isinstance(error, FileNotFoundError):
            raise SourceNotFound(f"{source.public}: nothing of that name") from None
        if isinstance(error, ValueError):
            raise SourceError(f"{source.public}: not a name its store can hold") from None
        if "redirect without LOCATION" in text:
            raise SourceError(f"{source.public}: the bucket is in another region; set AWS_REGION") from None
        if improper := _IMPROPER.search(text):
            raise SourceError(f"{source.public}: its store does not answer as it must ({improper[1]})") from None
        kind = _KIND.search(text)
        raise unavailable(source, f"connection failed ({kind[1].lower() if kind else 'unknown'})") from None
