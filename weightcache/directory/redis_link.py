"""The connection to a Redis or Valkey server: scripts in, bounded replies out, and every failure in one line.

Whoever runs the server may send anything. So a reply is read within a budget of bytes, no text of the server's is
shown but escaped and cut, and nothing that was sent to it (a password!) can come back in a message.
"""

from __future__ import annotations

import os
import ssl
from hashlib import sha1
from typing import Any

import redis.asyncio
from redis._parsers import _AsyncRESP2Parser
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, InvalidResponse, NoScriptError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from weightcache.address import RedisUrl

SECONDS = 2.0  # to connect, and for each answer
CONNECTIONS = 4
MAX_SAID = 200  # characters of what the server says that are shown
WAY_OUT = "see its address, user and password in: discover"


class Unanswered(Exception):
    """The server did not do what it was asked. One line, without secrets."""


class _BoundedParser(_AsyncRESP2Parser):
    """Reads no reply of more than ``limit`` bytes."""

    limit = 40 << 20  # a manifest, and something

    async def read_response(self, disable_decoding: bool = False) -> Any:
        self._left = self.limit
        return await super().read_response(disable_decoding)

    async def _read(self, length: int) -> bytes:
        self._spend(length)
        return bytes(await super()._read(length))

    async def _readline(self) -> bytes:
        line = bytes(await super()._readline())
        self._spend(len(line) + 2)
        return line

    def _spend(self, length: int) -> None:
        self._left -= length
        if length < 0 or self._left < 0:
            raise InvalidResponse("too long a reply")


class Link:
    """One server. ``run`` is all that it does."""

    def __init__(self, url: RedisUrl) -> None:
        self._url = url
        self._name = f"{url.scheme} {url.address}"
        kind = redis.asyncio.SSLConnection if url.tls else redis.asyncio.Connection
        self._pool = redis.asyncio.BlockingConnectionPool(
            connection_class=kind,
            max_connections=CONNECTIONS,
            timeout=SECONDS,
            host=url.address.host,
            port=url.address.port,
            db=url.database,
            username=url.user,
            password=url.password,
            protocol=2,
            parser_class=_BoundedParser,
            socket_timeout=SECONDS,
            socket_connect_timeout=SECONDS,
            # A pooled connection may have been closed since: that alone is worth a second try.
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        )
        self._client = redis.asyncio.Redis(connection_pool=self._pool)

    async def run(self, script: Script, *arguments: bytes | str | float) -> Any:
        """What ``script`` returns. Raises Unanswered."""
        try:
            try:
                return await self._client.evalsha(script.digest, 0, *arguments)
            except NoScriptError:
                return await self._client.eval(script.text, 0, *arguments)
        except (RedisError, OSError, ValueError, RecursionError) as error:
            if isinstance(error, InvalidResponse | ValueError | RecursionError):
                await self._pool.disconnect()  # nobody knows where in its stream the next reply would begin
            raise Unanswered(f"{self._name}: {self._why(error)}") from None

    def _why(self, error: Exception) -> str:
        cause = error.__cause__ or error.__context__
        match error:
            case AuthenticationError():
                return f"the user or password is refused; {WAY_OUT}"
            case InvalidResponse() | ValueError() | RecursionError():
                return f"what answers there is no Redis; {WAY_OUT}"
            case RedisTimeoutError() | TimeoutError():
                return f"no answer within {SECONDS:g} s; is it running, and reachable from here?"
            case _ if isinstance(cause, ssl.SSLError):
                return f"TLS: {self._said(cause.reason or cause)}; see its certificate, and the scheme in: discover"
            case OSError() | RedisConnectionError():
                failed = cause if isinstance(cause, OSError) and cause.strerror else error
                why = failed.strerror if isinstance(failed, OSError) else None
                if isinstance(failed, OSError) and failed.errno is not None and failed.errno > 0:
                    why = os.strerror(failed.errno)  # asyncio's own text is longer, and says less
                return f"{self._said(why or error)}; is it running, and reachable from here?"
            case ResponseError():
                return f"it says {self._said(error)!r}; {WAY_OUT}"
        return f"{type(error).__name__}; {WAY_OUT}"

    def _said(self, text: object) -> str:
        """What may be shown of a text that the server may have written."""
        password = self._url.password
        shown = str(text).replace(password, "***") if password else str(text)
        return "".join(char if char.isprintable() else "?" for char in shown)[:MAX_SAID]

    async def close(self) -> None:
        await self._client.aclose()
        await self._pool.disconnect()


class Script:
    """A Lua script. Its arguments are all in ARGV: keys are made from the first, the cluster's prefix."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = sha1(text.encode(), usedforsecurity=False).hexdigest()
