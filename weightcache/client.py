"""What a worker calls: the daemon at its socket or, without one, a node embedded in this process, on the same store.

Either way the client speaks HTTP over a Unix socket, so there is one way of doing each thing. An embedded node holds
the store's lock only while there is work, so several processes without a daemon take turns on one store.

    async with Client() as client:                      with SyncClient() as client:
        report = await client.pull("hf://org/name")         report = client.pull("hf://org/name")
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from weightcache.config import Config, load_config, socket_folder
from weightcache.errors import DaemonError, StoreError, StoreInUse, from_wire
from weightcache.log import fields

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

log = logging.getLogger(__name__)

STORE_SECONDS = 600.0  # for which an embedded node waits for another process' to leave the store
STORE_POLL = 0.1
TELL_SECONDS = 2.0  # a wait so long is worth a word: a worker of this same process leaves the store sooner
MAX_LINE = 64 << 20  # bytes of one event: a snapshot of many files is large

Json = dict[str, Any]
Result = TypeVar("Result")
Progress = Callable[[Json], None]
Globs = Sequence[str] | str | None  # glob patterns over the paths of a snapshot's files


class Load:
    """A load in progress. ``snapshot`` says where the files lie (``files[i]["at"]``), mappable at once.

    Iterate it for events ("had", "progress", and last "done" with the report); a failure is raised. Its leases last
    until ``close``.
    """

    def __init__(self, response: ClientResponse, events: AsyncIterator[Json], snapshot: Json) -> None:
        self._response = response
        self._events = events  # the iterator that gave the snapshot: it may have read on
        self.snapshot = snapshot

    async def __aiter__(self) -> AsyncIterator[Json]:
        async for event in self._events:
            yield event
            if event["event"] == "done":
                return
        raise DaemonError("the daemon ended in the middle of a load; load again, what has arrived is kept")

    async def report(self, on_event: Progress | None = None) -> Json:
        """Wait until every byte is had. Returns the report."""
        async for event in self:
            if on_event is not None:
                on_event(event)
            if event["event"] == "done":
                return dict(event["report"])
        raise AssertionError("a load ends with 'done' or an error")

    def close(self) -> None:
        self._response.close()


class Client:
    """The asynchronous face. ``config`` (default: as the environment and the configuration file say) names the socket.

    ``embed`` False: where no daemon answers there is a DaemonError, and no node in this process; likewise once a daemon
    has answered, for the store is that daemon's. Every method raises the WeightcacheError that the daemon met;
    DaemonError when it cannot be reached or goes away.
    """

    def __init__(self, config: Config | None = None, *, embed: bool = True) -> None:
        self._config = config or load_config()
        self._may_embed = embed
        self._session: ClientSession | None = None
        self._connecting = asyncio.Lock()
        self._embedded = contextlib.AsyncExitStack()
        self._own = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the daemon, or end the embedded node and free the store."""
        async with self._connecting:  # who comes meanwhile waits for the store
            session, self._session = self._session, None
            embedded, self._embedded = self._embedded, contextlib.AsyncExitStack()
            self._own = False
            if session is not None:
                await session.close()
            await embedded.aclose()

    @property
    def embedded(self) -> bool:
        """Whether a node of this process' own answers, for want of a daemon."""
        return self._own

    @property
    def has_daemon(self) -> bool:
        """Whether a daemon has answered: one that has gone since may be restarting."""
        return not (self._own or self._may_embed)

    # -- loading

    async def load(
        self,
        source: str,
        *,
        revalidate: bool = False,
        single: bool = False,
        hold: bool = True,
        allow: Globs = None,
        ignore: Globs = None,
    ) -> Load:
        """Start a load; returns once its files may be mapped. ``single``: refuse what is not one file.

        ``revalidate``: ask the origin for the current version whatever is known. Without ``hold``, the leases end when
        all is had. ``allow``, ``ignore``: glob patterns; of a directory only those files are loaded that match one of
        ``allow`` (None: all) and none of ``ignore``. Raises SourceNotFound if that leaves none.
        """
        body = {"source": source, "revalidate": revalidate, "single": single, "hold": hold, **_globs(allow, ignore)}
        response = await self._request("POST", "/v1/load", body)
        events = _events(response)
        async for event in events:
            return Load(response, events, event)
        raise DaemonError("the daemon ended before the load began; load again")

    async def pull(
        self,
        source: str,
        on_event: Progress | None = None,
        *,
        revalidate: bool = False,
        allow: Globs = None,
        ignore: Globs = None,
    ) -> Json:
        """Bring a source here; returns the report. ``on_event`` hears of the snapshot, then of progress.

        All of it, unless ``allow`` and ``ignore`` say otherwise: see ``load``.
        """
        load = await self.load(source, revalidate=revalidate, hold=False, allow=allow, ignore=ignore)
        try:
            if on_event is not None:
                on_event(load.snapshot)
            return await load.report(on_event)
        finally:
            load.close()

    # -- everything else

    async def files(self, source: str, *, revalidate: bool = False, local: bool = False) -> Json:
        """What a source holds, without bringing it: ``revision``, ``directory``, ``files`` (path, size, here).

        ``local``: only this host is asked; UnknownBlob if it has never loaded of it.
        """
        return dict(await self._json("POST", "/v1/files", {"source": source, "revalidate": revalidate, "local": local}))

    async def path(self, source: str, *, allow: Globs = None, ignore: Globs = None) -> Path:
        """The real path of a complete file, or of a snapshot's directory; asks nobody but this host.

        Raises UnknownBlob unless every file that is meant is complete.
        """
        body = {"source": source, **_globs(allow, ignore)}
        return Path((await self._json("POST", "/v1/path", body))["path"])

    async def ls(self) -> Json:
        """Snapshots and blobs of the store."""
        return dict(await self._json("GET", "/v1/ls"))

    async def status(self) -> Json:
        return dict(await self._json("GET", "/v1/status"))

    async def peers(self) -> list[Json]:
        return list(await self._json("GET", "/v1/peers"))

    async def pin(self, names: Iterable[str]) -> list[Json]:
        """Keep what sources or blob ids name until ``unpin``; it must have been loaded."""
        return list(await self._json("POST", "/v1/pin", {"names": list(names)}))

    async def unpin(self, names: Iterable[str]) -> list[Json]:
        return list(await self._json("POST", "/v1/unpin", {"names": list(names)}))

    async def evict(self, names: Iterable[str] | None = None, need: int = 0) -> Json:
        """Remove what is named, or the least recently used until ``need`` bytes are freed; says what stays, and why."""
        body = {"names": list(names) if names is not None else None, "need": need}
        return dict(await self._json("POST", "/v1/evict", body))

    async def manifest(self, source: str) -> list[Json]:
        """The files of a source with their chunks; an id is None while nobody has read the chunk."""
        return list(await self._json("POST", "/v1/manifest", {"source": source}))

    async def publish(
        self, source: str, on_event: Progress | None = None, *, to: str = "beside", force: bool = False
    ) -> list[Json]:
        """Publish the manifests of a source, which is brought here if it is not; returns a row a file.

        ``to``: "beside" the objects, into the "fleet"'s directory, or a "file" of the caller's, whose content is the
        base64 in "data". A row's "state" is published, replaced, same, or error. ``force``: replace what differs.
        """
        rows = []
        async for event in _events(
            await self._request("POST", "/v1/publish", {"source": source, "to": to, "force": force})
        ):
            if on_event is not None:
                on_event(event)
            if event["event"] == "file":
                rows.append(event)
            if event["event"] == "done":
                return rows
        raise DaemonError("the daemon ended in the middle of publish; run it again")

    async def verify(
        self,
        names: Iterable[str] | None = None,
        on_event: Progress | None = None,
        *,
        deep: bool = False,
        repair: bool = True,
    ) -> list[Json]:
        """Read blobs again and mend them; returns a row a blob. ``deep``: by BLAKE3 instead of xxh3-128."""
        body = {"names": list(names) if names is not None else None, "deep": deep, "repair": repair}
        rows = []
        async for event in _events(await self._request("POST", "/v1/verify", body)):
            if on_event is not None:
                on_event(event)
            if event["event"] == "blob":
                rows.append(event)
            if event["event"] == "done":
                return rows
        raise DaemonError("the daemon ended in the middle of verify; run it again")

    async def _json(self, method: str, path: str, body: Json | None = None) -> Any:
        async with await self._request(method, path, body) as response:
            return await response.json()

    async def _request(self, method: str, path: str, body: Json | None = None) -> ClientResponse:
        from aiohttp import ClientError

        session = self._session or await self._connect()
        try:
            response = await session.request(method, f"http://daemon{path}", json=body)
        except (ClientError, OSError) as error:
            await self.close()  # whoever is there next time is found then
            raise DaemonError(f"the daemon at {self._config.socket_path} went away: {error}") from None
        if response.status != 200:
            async with response:
                await _raise(response)
        return response

    async def _connect(self) -> ClientSession:
        """A session with the daemon if there is one, else with a node of this process' own."""
        from aiohttp import ClientSession, ClientTimeout, UnixConnector

        async with self._connecting:  # who asks meanwhile gets the same one
            if self._session is None:
                path = self._config.socket_path
                if await _answers(path):
                    self._may_embed = False  # the store is a daemon's: one that restarts must find it free
                elif self._may_embed:
                    path = await self._embed()
                else:
                    raise DaemonError(f"no daemon answers at {path}; start one with: weightcache daemon")
                self._session = ClientSession(
                    connector=UnixConnector(str(path), limit=0), timeout=ClientTimeout(total=None), read_bufsize=1 << 20
                )
            return self._session

    async def _embed(self) -> Path:
        """Start a node on the store once nobody else has it; the socket to talk to it, or to a daemon's that came."""
        from weightcache.daemon import serving  # a worker beside a daemon needs none of it
        from weightcache.node.node import Node

        loop = asyncio.get_running_loop()
        began = loop.time()
        told = False
        async with contextlib.AsyncExitStack() as stack:
            while True:
                node = Node(self._config, serve=False)
                try:
                    await node.start()
                    break
                except StoreInUse as error:
                    if await _answers(self._config.socket_path):
                        self._may_embed = False
                        return self._config.socket_path
                    waited = loop.time() - began
                    if waited > STORE_SECONDS:
                        raise
                    if waited > TELL_SECONDS and not told:
                        log.warning("waiting for the store", extra=fields(why=str(error)))
                        told = True
                    await asyncio.sleep(STORE_POLL)
                except StoreError as error:  # who has no right to the store is a worker, whose daemon is not there
                    raise type(error)(f"no daemon answers at {self._config.socket_path}, and {error}") from None
            stack.push_async_callback(node.stop)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="weightcache-", dir=socket_folder()))
            path = Path(folder) / "node.sock"
            await stack.enter_async_context(serving(node, path))
            self._embedded = stack.pop_all()
        self._own = True
        return path


def _globs(allow: Globs, ignore: Globs) -> Json:
    return {
        key: [given] if isinstance(given, str) else None if given is None else list(given)
        for key, given in (("allow", allow), ("ignore", ignore))
    }


async def _answers(path: Path) -> bool:
    """Whether something listens on a Unix socket. Raises DaemonError if this user may not know."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except PermissionError as error:
        way_out = "it is for the daemon's user and group: be one of them, or choose another socket"
        raise DaemonError(f"socket {path}: {error.strerror}; {way_out}") from None
    except OSError:
        return False
    writer.close()
    return True


async def _raise(response: ClientResponse) -> None:
    text = await response.text()
    try:
        body = json.loads(text)
        raise from_wire(body["error"], body["message"])
    except (ValueError, KeyError, TypeError):
        raise DaemonError(f"the daemon answers {response.status}: {text[:200]}") from None


async def _events(response: ClientResponse) -> AsyncIterator[Json]:
    """The lines of a stream; an error among them is raised."""
    from aiohttp import ClientError

    held = bytearray()
    try:
        async for piece in response.content.iter_any():
            held += piece
            *lines, rest = held.split(b"\n")
            if len(rest) > MAX_LINE:
                raise DaemonError("the daemon sent a line without an end")
            held = bytearray(rest)
            for line in lines:
                event = json.loads(line)
                if event["event"] == "error":
                    raise from_wire(event["error"], event["message"])
                yield event
    except (ClientError, OSError) as error:
        raise DaemonError(f"the daemon went away: {error}") from None


class SyncClient:
    """The synchronous face: the same methods, for code without an event loop. It keeps one in a thread of its own."""

    def __init__(self, config: Config | None = None) -> None:
        from weightcache.portal import Portal

        self._portal = Portal()
        self._client = Client(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave; a second call does nothing."""
        if self._portal.alive:
            self._run(self._client.close())
            self._portal.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._portal.run(work)

    @property
    def embedded(self) -> bool:
        """See Client.embedded."""
        return self._client.embedded

    @property
    def has_daemon(self) -> bool:
        """See Client.has_daemon."""
        return self._client.has_daemon

    def pull(
        self,
        source: str,
        on_event: Progress | None = None,
        *,
        revalidate: bool = False,
        allow: Globs = None,
        ignore: Globs = None,
    ) -> Json:
        """See Client.pull. ``on_event`` is called in the client's thread."""
        return self._run(self._client.pull(source, on_event, revalidate=revalidate, allow=allow, ignore=ignore))

    @contextlib.contextmanager
    def holding(
        self, source: str, on_event: Progress | None = None, *, allow: Globs = None, ignore: Globs = None
    ) -> Iterator[Json]:
        """Like ``pull``, with leases on what it brought for as long as the block runs."""
        load = self._run(self._client.load(source, allow=allow, ignore=ignore))
        try:
            yield self._run(load.report(on_event))
        finally:
            self._portal.soon(load.close)

    def files(self, source: str, *, revalidate: bool = False, local: bool = False) -> Json:
        return self._run(self._client.files(source, revalidate=revalidate, local=local))

    def path(self, source: str, *, allow: Globs = None, ignore: Globs = None) -> Path:
        return self._run(self._client.path(source, allow=allow, ignore=ignore))

    def ls(self) -> Json:
        return self._run(self._client.ls())

    def status(self) -> Json:
        return self._run(self._client.status())

    def peers(self) -> list[Json]:
        return self._run(self._client.peers())

    def pin(self, names: Iterable[str]) -> list[Json]:
        return self._run(self._client.pin(names))

    def unpin(self, names: Iterable[str]) -> list[Json]:
        return self._run(self._client.unpin(names))

    def evict(self, names: Iterable[str] | None = None, need: int = 0) -> Json:
        return self._run(self._client.evict(names, need))

    def manifest(self, source: str) -> list[Json]:
        return self._run(self._client.manifest(source))

    def publish(
        self, source: str, on_event: Progress | None = None, *, to: str = "beside", force: bool = False
    ) -> list[Json]:
        return self._run(self._client.publish(source, on_event, to=to, force=force))

    def verify(
        self,
        names: Iterable[str] | None = None,
        on_event: Progress | None = None,
        *,
        deep: bool = False,
        repair: bool = True,
    ) -> list[Json]:
        return self._run(self._client.verify(names, on_event, deep=deep, repair=repair))
