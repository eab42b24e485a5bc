"""The daemon: a node behind HTTP on a Unix socket, for workers, the command line, Prometheus, and a browser.

JSON in, JSON out; what takes a while (load, verify, publish) answers a line of JSON at a time. A load's leases last as
long as its connection. An error is ``{"error": CLASS, "message": ONE LINE}`` with a status to match; in the middle of a
stream it is the last line.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web

from weightcache.config import Config, parse_address
from weightcache.core.manifest import Manifest
from weightcache.core.patterns import MAX_PATTERN, MAX_PATTERNS, Patterns
from weightcache.core.snapshot import FileEntry
from weightcache.errors import (
    ConfigError,
    DaemonError,
    FormatError,
    SourceDenied,
    SourceError,
    SourceNotFound,
    StoreFull,
    UnknownBlob,
    WeightcacheError,
    to_wire,
)
from weightcache.log import fields
from weightcache.net.sockets import reason
from weightcache.node.loading import Loading
from weightcache.node.node import Node
from weightcache.node.report import Report

log = logging.getLogger(__name__)

NEWS_SECONDS = 0.01  # what lands within this time is told together
PROGRESS_SECONDS = 0.2
STOP_SECONDS = 1.0  # that connections get to end by themselves
MAX_BODY = 1 << 20

_NODE = web.AppKey("node", Node)
# Requests, each with the stream that is its answer, if that has begun.
_UNDER_WAY = web.AppKey("under_way", dict["asyncio.Task[Any]", web.StreamResponse | None])
_STATUS: tuple[tuple[type[WeightcacheError], int], ...] = (
    (SourceNotFound, 404),
    (UnknownBlob, 404),
    (SourceDenied, 403),
    (SourceError, 400),
    (ConfigError, 400),
    (FormatError, 400),
    (StoreFull, 507),
    (WeightcacheError, 502),
)

Json = dict[str, Any]
News = dict[int, list[tuple[int, int]]]  # by file: bytes [begin, end) that are had, and not told of yet


def build_app(node: Node) -> web.Application:
    """The whole HTTP face of a node."""
    app = web.Application(client_max_size=MAX_BODY, middlewares=[_errors])
    app[_NODE] = node
    app[_UNDER_WAY] = {}
    app.on_shutdown.append(_hang_up)
    app.add_routes(
        [
            web.get("/healthz", _health),
            web.get("/metrics", _metrics),
            web.get("/v1/status", _status),
            web.get("/v1/peers", _peers),
            web.get("/v1/ls", _ls),
            web.post("/v1/load", _load),
            web.post("/v1/files", _files),
            web.post("/v1/path", _path),
            web.post("/v1/pin", _pin),
            web.post("/v1/unpin", _unpin),
            web.post("/v1/evict", _evict),
            web.post("/v1/verify", _verify),
            web.post("/v1/manifest", _manifest),
            web.post("/v1/publish", _publish),
        ]
    )
    return app


def build_monitor(node: Node) -> web.Application:
    """Only what a monitor and its operator need: nothing that could be done, no bytes of a blob."""
    app = web.Application(client_max_size=1024)
    app[_NODE] = node
    app.add_routes([web.get("/", _page), web.get("/healthz", _health), web.get("/metrics", _metrics)])
    return app


# -- requests


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    request.app[_UNDER_WAY][_this()] = None
    try:
        return await handler(request)
    except WeightcacheError as error:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        _log_failure(request, error)
        if (begun := request.app[_UNDER_WAY][_this()]) is None:
            return web.json_response(_error(error), status=status)
        await _say(begun, {"event": "error"} | _error(error))
        return begun
    finally:
        del request.app[_UNDER_WAY][_this()]


def _this() -> asyncio.Task[Any]:
    """The request that is being answered."""
    task = asyncio.current_task()
    assert task is not None
    return task


def _log_failure(request: web.Request, error: WeightcacheError) -> None:
    """For the operator. Not a warning: who asked is told, and what a command says of it is one line."""
    name, message = to_wire(error)
    log.info("request failed", extra=fields(path=request.path, error=name, why=message))


async def _hang_up(app: web.Application) -> None:
    """The daemon stops: a load may go on for minutes, and would be waited for."""
    for task in app[_UNDER_WAY]:
        task.cancel()


def _error(error: BaseException) -> Json:
    name, message = to_wire(error)
    return {"error": name, "message": message}


async def _body(request: web.Request, **types: type | tuple[type, ...]) -> Json:
    """The request's JSON object with just these keys; absent ones are None. Raises ConfigError."""
    try:
        body = json.loads(await request.text() or "{}")
    except ValueError as error:
        raise ConfigError(f"{request.path}: the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{request.path}: the body is no JSON object")
    for key, value in body.items():
        if key not in types or not (value is None or isinstance(value, types[key])):
            raise ConfigError(f"{request.path}: {key!r} is unknown here or of a wrong type; known: {', '.join(types)}")
    for key in types:
        body.setdefault(key, None)
    return body


def _names(body: Json, path: str) -> list[str]:
    names = body["names"]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: 'names' must be a list of sources or blob ids")
    return list(names)


def _patterns(body: Json, path: str) -> Patterns:
    for key in ("allow", "ignore"):
        given = body[key] or []
        if len(given) > MAX_PATTERNS or not all(isinstance(text, str) and len(text) <= MAX_PATTERN for text in given):
            limits = f"{MAX_PATTERNS} patterns of {MAX_PATTERN} characters"
            raise ConfigError(f"{path}: {key!r} must be a list of at most {limits}")
    return Patterns.of(body["allow"], body["ignore"])


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"ok": True})


async def _metrics(request: web.Request) -> web.Response:
    from weightcache.metrics import CONTENT_TYPE, render  # only who scrapes pays for it

    return web.Response(body=render(request.app[_NODE]), headers={"Content-Type": CONTENT_TYPE})


async def _page(request: web.Request) -> web.Response:
    from weightcache.dashboard import page

    node = request.app[_NODE]
    return web.Response(text=page(node.status(), node.peers()), content_type="text/html")


async def _status(request: web.Request) -> web.Response:
    return web.json_response(request.app[_NODE].status())


async def _peers(request: web.Request) -> web.Response:
    return web.json_response(request.app[_NODE].peers())


async def _ls(request: web.Request) -> web.Response:
    return web.json_response(await request.app[_NODE].listing())


async def _path(request: web.Request) -> web.Response:
    body = await _body(request, source=str, allow=list, ignore=list)
    path = await request.app[_NODE].path(body["source"] or "", _patterns(body, request.path))
    return web.json_response({"path": str(path)})


async def _files(request: web.Request) -> web.Response:
    body = await _body(request, source=str, revalidate=bool, local=bool)
    how = {"revalidate": bool(body["revalidate"]), "local": bool(body["local"])}
    return web.json_response(await request.app[_NODE].files(body["source"] or "", **how))


async def _pin(request: web.Request) -> web.Response:
    return await _set_pin(request, on=True)


async def _unpin(request: web.Request) -> web.Response:
    return await _set_pin(request, on=False)


async def _set_pin(request: web.Request, *, on: bool) -> web.Response:
    names = _names(await _body(request, names=list), request.path)
    infos = await asyncio.to_thread(request.app[_NODE].upkeep.pin, names, on=on)
    rows = [{"blob": info.blob.hex(), "path": info.name, "size": info.size, "pinned": info.pinned} for info in infos]
    return web.json_response(rows)


async def _evict(request: web.Request) -> web.Response:
    body = await _body(request, names=list, need=int)
    if not body["names"] and not body["need"]:
        raise ConfigError("/v1/evict: give 'names' of what is to go, or 'need', the bytes to be freed")
    names = _names(body, request.path) if body["names"] else None
    return web.json_response(await request.app[_NODE].upkeep.evict(names, body["need"] or 0))


async def _manifest(request: web.Request) -> web.Response:
    body = await _body(request, source=str)
    found = await request.app[_NODE].manifests(body["source"] or "")
    return web.json_response(await asyncio.to_thread(lambda: [_show(*item) for item in found]))


def _show(entry: FileEntry, manifest: Manifest) -> Json:
    chunks = []
    for index, (offset, length) in enumerate(manifest.plan):
        name = manifest.id(index)
        chunks.append({"offset": offset, "length": length, "id": name.hex() if name else None})
    return {
        "path": entry.path,
        "source": entry.source.public,
        "version": entry.version,
        "size": entry.size,
        "blob": entry.blob.hex(),
        "checked": manifest.checked,
        "chunks": chunks,
    }


# -- streams


async def _lines(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    request.app[_UNDER_WAY][_this()] = response
    return response


async def _say(response: web.StreamResponse, line: Json) -> None:
    await response.write(json.dumps(line).encode() + b"\n")


async def _verify(request: web.Request) -> web.StreamResponse:
    body = await _body(request, names=list, deep=bool, repair=bool)
    upkeep = request.app[_NODE].upkeep
    blobs = await asyncio.to_thread(upkeep.chosen, _names(body, request.path) if body["names"] else None)
    response = await _lines(request)
    await _say(response, {"event": "verifying", "blobs": len(blobs)})
    async for outcome in upkeep.verify(blobs, deep=bool(body["deep"]), repair=body["repair"] is not False):
        await _say(response, {"event": "blob"} | dataclasses.asdict(outcome))
    await _say(response, {"event": "done"})
    return response


async def _load(request: web.Request) -> web.StreamResponse:
    body = await _body(request, source=str, revalidate=bool, single=bool, hold=bool, allow=list, ignore=list)
    patterns = _patterns(body, request.path)
    news: News = {}
    arrived = asyncio.Event()

    def on_had(file: int, begin: int, end: int) -> None:
        news.setdefault(file, []).append((begin, end))
        arrived.set()

    node = request.app[_NODE]
    revalidate = bool(body["revalidate"])
    async with node.load(body["source"] or "", on_had, revalidate=revalidate, patterns=patterns) as loading:
        await loading.opened(single=bool(body["single"]))  # what fails before the first byte has a status of its own
        response = await _lines(request)
        await _say(response, loading.describe())
        report = await _finished(response, loading, news, arrived)
        await _tell_once(response, news)
        told = report.to_json()
        _log_load(told)
        done = {"event": "done", "report": told}
        if body["hold"]:
            await _say(response, done)
            await asyncio.Event().wait()  # the leases last until the client is gone, which cancels this
    await _say(response, done)  # who holds nothing may evict it from here on
    return response


def _log_load(report: Json) -> None:
    came = report["bytes_by_source"]
    facts = {"local": came["local"], "peers": sum(came["peer"].values()), "origin": came["origin"]}
    log.info("loaded", extra=fields(source=report["source"], seconds=report["seconds"], **facts))


async def _publish(request: web.Request) -> web.StreamResponse:
    body = await _body(request, source=str, to=str, force=bool)
    node = request.app[_NODE]
    place = node.publisher.check(body["to"] or "beside")
    arrived = asyncio.Event()
    # The version that is published is to be the current one.
    async with node.load(body["source"] or "", lambda *news: arrived.set(), revalidate=True) as loading:
        files = node.publisher.files(await loading.opened())
        response = await _lines(request)
        await _say(response, loading.progress() | {"event": "publishing", "files": len(files)})
        await _finished(response, loading, {}, arrived)
        for entry in files:
            outcome = await node.publisher.publish(entry, place, force=bool(body["force"]))
            await _say(response, {"event": "file"} | outcome)
    await _say(response, {"event": "done"})
    return response


async def _finished(response: web.StreamResponse, loading: Loading, news: News, arrived: asyncio.Event) -> Report:
    """Wait for a load, and tell of it meanwhile."""
    teller = asyncio.ensure_future(_tell(response, loading.progress, news, arrived))
    try:
        return await loading.finished()
    finally:
        teller.cancel()
        await asyncio.gather(teller, return_exceptions=True)


async def _tell(response: web.StreamResponse, progress: Callable[[], Json], news: News, arrived: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    told = 0.0
    while True:
        await arrived.wait()
        await asyncio.sleep(NEWS_SECONDS)
        arrived.clear()
        await _tell_once(response, news)
        if loop.time() - told >= PROGRESS_SECONDS:
            told = loop.time()
            await _say(response, progress())


async def _tell_once(response: web.StreamResponse, news: News) -> None:
    told = dict(news)
    news.clear()
    for file, ranges in told.items():
        await _say(response, {"event": "had", "file": file, "ranges": ranges})


# -- running it


@contextlib.asynccontextmanager
async def serving(node: Node, path: Path) -> AsyncIterator[None]:
    """Answer on a Unix socket for as long as the block runs. Raises DaemonError if somebody else does already."""
    with _told(path):
        _clear(path)
    runner = web.AppRunner(build_app(node), handler_cancellation=True, access_log=None, shutdown_timeout=STOP_SECONDS)
    await runner.setup()
    try:
        with _told(path):
            await web.UnixSite(runner, str(path)).start()
            os.chmod(path, 0o660)
        yield
    finally:
        await runner.cleanup()
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what the disk refuses a socket into an error that says where."""
    try:
        yield
    except OSError as error:
        raise DaemonError(f"socket {path}: {reason(error)}; choose another --socket") from None


def _clear(path: Path) -> None:
    """Remove what a daemon that was killed left at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_socket():
        if not path.exists():
            return
        raise DaemonError(f"socket {path}: something that is no socket is there; choose another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)
            return
    raise DaemonError(f"another daemon answers at {path}; stop it, or choose another --socket")


async def run(config: Config, ready: Callable[[Node], None]) -> None:
    """Run a daemon until SIGTERM or SIGINT. ``ready`` is called once it answers."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    node = Node(config)
    await node.start()
    try:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(serving(node, config.socket_path))
            if config.metrics is not None:
                await stack.enter_async_context(_monitoring(node, config.metrics))
            log.info("daemon ready", extra=fields(socket=str(config.socket_path), pid=os.getpid()))
            ready(node)
            await stop.wait()
            log.info("daemon stopping", extra=fields(pid=os.getpid()))
    finally:
        await node.stop()


@contextlib.asynccontextmanager
async def _monitoring(node: Node, where: str) -> AsyncIterator[None]:
    address = parse_address(where)
    runner = web.AppRunner(build_monitor(node), access_log=None, shutdown_timeout=STOP_SECONDS)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, address.host, address.port).start()
        except OSError as error:
            raise DaemonError(f"metrics: cannot listen on {address}: {reason(error)}; choose another") from None
        yield
    finally:
        await runner.cleanup()


def main(config: Config, ready: Callable[[Node], None]) -> None:
    """Run a daemon on uvloop, to its end."""
    uvloop.run(run(config, ready))
