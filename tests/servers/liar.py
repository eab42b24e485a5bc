"""A web server that lies: everything a client must not believe, one lie at a time."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

LIES = frozenset(
    {
        "",  # honest
        "whole",  # answers a range with 200 and everything
        "tag",  # another ETag, though If-Match was sent
        "no-tag",  # no ETag any more
        "total",  # another total size in Content-Range
        "shifted",  # a Content-Range that was not asked for (of the same length)
        "no-range",  # 206 without Content-Range
        "short",  # ends in mid-body
        "long",  # more bytes than Content-Range says
        "gzip",  # Content-Encoding nobody wanted
        "no-length",  # 200, chunked: no size
        "weak",  # a weak ETag
        "downgrade",  # a redirect to file:///etc/passwd
    }
)


class Liar:
    """Serves ``body`` at every path. ``lie`` may be set at any time; ``seen`` are the requests' headers."""

    def __init__(self, body: bytes, tag: str = '"truth"') -> None:
        self.body = body
        self.tag = tag
        self.lie = ""
        self.seen: list[dict[str, str]] = []
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def url(self, name: str = "model.safetensors") -> str:
        return f"http://127.0.0.1:{self.port}/bucket/{name}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Liar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on lies: that is what they should do."""


def _handler(liar: Liar) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            lie = liar.lie
            assert lie in LIES, lie
            liar.seen.append({name.lower(): value for name, value in self.headers.items()})
            total = len(liar.body)
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            begin, end = (int(asked[1]), min(int(asked[2]) + 1, total)) if asked else (0, total)
            if lie == "downgrade":
                self._head(302, {"Location": "file:///etc/passwd", "Content-Length": "0"})
                return
            if lie in ("whole", "no-length"):
                asked, begin, end = None, 0, total
            data = liar.body[begin:end]
            if lie == "long":
                data += bytes(4096)
            headers = {"Last-Modified": "Sat, 01 Aug 2026 00:00:00 GMT"}
            if lie != "no-tag":
                headers["ETag"] = {"tag": '"lie"', "weak": f"W/{liar.tag}"}.get(lie, liar.tag)
            if asked and lie != "no-range":
                first, last = (begin + 1, end) if lie == "shifted" else (begin, end - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{total + (lie == 'total')}"
            if lie == "gzip":
                headers["Content-Encoding"] = "gzip"
            chunked = lie == "no-length"
            headers.update({"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(len(data))})
            self._head(206 if asked else 200, headers)
            if not body:
                return
            if chunked:
                data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
            if lie == "short":
                data = data[: len(data) // 2]
                self.close_connection = True
            self.wfile.write(data)

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
