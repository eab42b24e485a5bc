"""A server that answers as the Hugging Face hub does, and the CDN it redirects to, on two ports.

Where a claim about the real hub matters, it is one that ``huggingface_hub`` itself relies on: the API's JSON, the
``X-Repo-Commit``, ``X-Linked-Etag`` and ``X-Linked-Size`` headers of a redirect, relative redirects of renamed
repositories, ``X-Error-Code`` beside 401, 403 and 404.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from aiohttp import web

from tests.servers.loop import LoopThread

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_LFS = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class _File:
    body: Path
    size: int
    sha256: str
    oid: str  # git's name of the blob

    @property
    def is_lfs(self) -> bool:
        return self.body.suffix in _LFS


@dataclass
class _Repository:
    commits: dict[str, dict[str, _File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str = ""


class HubServer:
    """``endpoint`` is for HF_ENDPOINT. ``counts``: requests by kind (info, tree, resolve, file, cdn)."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.cdn_logins: list[str] = []  # Authorization headers that reached the CDN: there must be none
        self.cdn_bytes = 0
        self.fail_with = 0  # a status that the hub (not the CDN) gives to everything, 0: none
        self._repositories: dict[str, _Repository] = {}
        self._moved: dict[str, str] = {}
        self._signature = 0
        self._linked: dict[str, _File] = {}
        self._thread = LoopThread("hub")
        self._runners: list[web.AppRunner] = []
        self.port = self._thread.run(self._start(self._hub()))
        self.cdn_port = self._thread.run(self._start(self._cdn()))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def publish(self, repository: str, directory: Path, branch: str = "main", token: str = "") -> str:
        """Commit the files below ``directory`` (read from there when asked for); return the commit's hash.

        With ``token``, the repository is private to who sends it.
        """
        files = {
            str(path.relative_to(directory)): _file(path) for path in sorted(directory.rglob("*")) if path.is_file()
        }
        commit = hashlib.sha1(repr((repository, sorted(files.items()))).encode()).hexdigest()
        found = self._repositories.setdefault(repository, _Repository())
        found.commits[commit] = files
        found.branches[branch] = commit
        found.token = token
        self._linked.update({file.sha256: file for file in files.values()})
        return commit

    def rename(self, old: str, new: str) -> None:
        """From now on ``old`` redirects to ``new``, relatively, as the hub does."""
        self._repositories[new] = self._repositories.pop(old)
        self._moved[old] = new

    def expire(self) -> None:
        """Let every address signed so far be answered with 403."""
        self._signature += 1

    def close(self) -> None:
        """Stop both servers; a second call does nothing."""
        while self._runners:
            self._thread.run(self._runners.pop().cleanup())
        self._thread.close()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _start(self, app: web.Application) -> int:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._runners.append(runner)
        return int(runner.addresses[0][1])

    # -- the hub

    def _hub(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/api/models/{org}/{name}/revision/{revision}", self._info)
        app.router.add_get("/api/models/{org}/{name}/tree/{revision}", self._tree)
        app.router.add_get("/{org}/{name}/resolve/{revision}/{path:.+}", self._resolve)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.fail_with:
            return web.Response(status=self.fail_with)
        name = f"{request.match_info.get('org')}/{request.match_info.get('name')}"
        if name in self._moved:
            target = request.raw_path.replace(name, self._moved[name], 1)
            return web.Response(status=307, headers={"Location": target})
        found = self._repositories.get(name)
        if found is None or (found.token and request.headers.get("Authorization") != f"Bearer {found.token}"):
            # Strangers learn nothing; whoever is known is told whether it is his token or the name.
            if "Authorization" not in request.headers:
                return web.Response(status=401, headers={"X-Error-Code": "RepoNotFound"})
            missing = web.Response(status=404, headers={"X-Error-Code": "RepoNotFound"})
            return missing if found is None else web.Response(status=403, headers={"X-Error-Code": "GatedRepo"})
        return await handler(request)

    def _commit(self, request: web.Request) -> tuple[str, dict[str, _File]]:
        found = self._repositories[f"{request.match_info['org']}/{request.match_info['name']}"]
        revision = request.match_info["revision"]
        commit = found.branches.get(revision, revision)
        if commit not in found.commits:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RevisionNotFound"})
        return commit, found.commits[commit]

    async def _info(self, request: web.Request) -> web.Response:
        self.counts["info"] += 1
        commit, files = self._commit(request)
        name = f"{request.match_info['org']}/{request.match_info['name']}"
        siblings = []
        for path, file in files.items():
            sibling: dict[str, object] = {"rfilename": path}
            if request.query.get("blobs"):
                sibling |= {"size": file.size, "blobId": file.oid}
                if file.is_lfs:
                    sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
            siblings.append(sibling)
        return web.json_response({"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings})

    async def _tree(self, request: web.Request) -> web.Response:
        self.counts["tree"] += 1
        _, files = self._commit(request)
        listed = []
        for path, file in files.items():
            item: dict[str, object] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
            if file.is_lfs:
                item["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            listed.append(item)
        return web.json_response(listed)

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        self.counts["resolve" if request.method == "HEAD" else "file"] += 1
        commit, files = self._commit(request)
        file = files.get(request.match_info["path"])
        if file is None:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": commit}
        if not file.is_lfs:
            return _bytes_of(file, request, {**headers, "ETag": f'"{file.oid}"'})
        address = f"http://127.0.0.1:{self.cdn_port}/{file.sha256}?Signature={self._signature}"
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "Location": address}
        return web.Response(status=302, headers=headers)

    # -- the CDN

    def _cdn(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/{sha256}", self._linked_file)
        return app

    async def _linked_file(self, request: web.Request) -> web.StreamResponse:
        self.counts["cdn"] += 1
        if login := request.headers.get("Authorization"):
            self.cdn_logins.append(login)
        if request.query.get("Signature") != str(self._signature):
            return web.Response(status=403, text="<Error><Code>AccessDenied</Code></Error>")
        file = self._linked[request.match_info["sha256"]]
        response = _bytes_of(file, request, {"ETag": '"of-the-cdn"'})
        self.cdn_bytes += response.content_length or 0
        return response


def _bytes_of(file: _File, request: web.Request, headers: dict[str, str]) -> web.Response:
    asked = request.http_range
    if asked.start is None:
        return web.Response(body=file.body.read_bytes(), headers=headers)
    begin, end = asked.start, min(asked.stop or file.size, file.size)
    with file.body.open("rb") as body:
        body.seek(begin)
        data = body.read(end - begin)
    headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{file.size}"}
    return web.Response(status=206, body=data, headers=headers)


def _file(path: Path) -> _File:
    data = path.read_bytes()
    return _File(
        path, len(data), hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    )
