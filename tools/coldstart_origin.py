"""The origin of a cold start: as much of S3 as reading takes, over one folder, counting what leaves it.

``python -m weightcache.tools.coldstart_origin FOLDER HOST`` serves the folder as the bucket ``coldstart`` and prints a
line of JSON, its port; each line of its input is answered with its counts so far. A process of its own, so that it can
live behind a link of its own: bytes go from the file to the socket in the kernel. Whoever asks is let in.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "coldstart"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_PIECE = 1 << 20  # bytes handed to the kernel at once: so often it is counted


class Counts:
    """Bytes of objects that were sent, and requests of any kind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sent = 0
        self.requests = 0

    def add(self, sent: int = 0, requests: int = 0) -> None:
        with self._lock:
            self.sent += sent
            self.requests += requests


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, folder: Path, host: str) -> None:
        super().__init__((host, 0), Handler)
        self.folder = folder
        self.counts = Counts()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""

    def files(self) -> dict[str, Path]:
        """Every object by its key."""
        return {str(path.relative_to(self.folder)): path for path in self.folder.rglob("*") if path.is_file()}


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.server.counts.add(requests=1)
        address = urlsplit(self.path)
        bucket, _, key = unquote(address.path).lstrip("/").partition("/")
        if bucket != BUCKET:
            self._say(404, b"<Error><Code>NoSuchBucket</Code></Error>", body)
        elif not key:
            prefix = parse_qs(address.query).get("prefix", [""])[0]
            self._say(200, self._listing(prefix), body)
        elif (path := self.server.files().get(key)) is None:
            self._say(404, b"<Error><Code>NoSuchKey</Code></Error>", body)
        else:
            self._file(path, body=body)

    def _say(self, status: int, text: bytes, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)

    def _listing(self, prefix: str) -> bytes:
        entries = []
        for key, path in sorted(self.server.files().items()):
            if key.startswith(prefix):
                status = path.stat()
                when = _iso(status.st_mtime)
                entries.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
                    f"<ETag>{_tag(status)}</ETag><Size>{status.st_size}</Size></Contents>"
                )
        shown = "".join(entries)
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{shown}</ListBucketResult>".encode()

    def _file(self, path: Path, *, body: bool) -> None:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            tag, wanted = _tag(status), self.headers.get("If-Match")
            if wanted is not None and wanted != tag:
                self._say(412, b"<Error><Code>PreconditionFailed</Code></Error>", body)
                return
            asked = _RANGE.fullmatch(self.headers.get("Range") or "")
            begin = int(asked[1]) if asked else 0
            end = min(int(asked[2]) + 1 if asked and asked[2] else status.st_size, status.st_size)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{status.st_size}")
            self.send_header("Content-Length", str(end - begin))
            self.send_header("ETag", tag)
            self.send_header("Last-Modified", formatdate(status.st_mtime, usegmt=True))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            self.wfile.flush()
            while body and begin < end:
                sent = os.sendfile(self.connection.fileno(), file.fileno(), begin, min(_PIECE, end - begin))
                if not sent:  # it has become shorter
                    self.close_connection = True
                    return
                begin += sent
                self.server.counts.add(sent=sent)


def _tag(status: os.stat_result) -> str:
    """As of an object that was stored in parts: no digest of the whole."""
    of = f"{status.st_ino} {status.st_size} {status.st_mtime_ns}".encode()
    return f'"{hashlib.md5(of, usedforsecurity=False).hexdigest()}-2"'


def _iso(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def variables(endpoint: str) -> dict[str, str]:
    """What the environment of a client must hold to find the server at ``endpoint``."""
    return {
        "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "anybody", "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    }  # fmt: skip


def main(folder: str, host: str) -> None:
    server = Server(Path(folder), host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"port": server.server_address[1]}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"sent": server.counts.sent, "requests": server.counts.requests}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
