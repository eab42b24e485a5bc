"""Peers on a Redis or Valkey server: who is alive, who holds what, and what was learned of sources.

Theory of operation. Each daemon keeps one key of its own alive there (``peer:ID``, its record), and one entry in a
sorted set that has no times but an order (``ring``: datacenter, then id). A *look* is one round trip: the script renews
the own key, walks the ring from the own place on, own datacenter first, and returns the records of up to NEIGHBOURS
that live; a digest says "as before" in a few bytes. So a fleet of thousands costs the server a bounded step a host,
and no host more connections than it can use. Whose key has run out is struck from the ring by whoever looks next.

A blob's holders are two sorted sets by time of expiry (``all:BLOB``, ``some:BLOB``); who of them lives the peers' keys
tell, so a dead host is nobody's holder as soon as its key has run out. What one host announces is gathered and sent
together; all of it is sent again well before it expires, and at once when the look finds the own key gone: the server
has lost it, and so everything else.

A name derived from the cluster key keeps clusters on one server apart. What comes back is bounded in size and believed
as an address only: the handshake proves. What was learned carries a MAC under the cluster key.

Losing the server changes nothing: the last view stays, a line in the log says so once, and looks go on at growing
intervals until it answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import random
from collections.abc import Iterable
from itertools import islice
from typing import Any

from blake3 import blake3

from weightcache.address import Address, RedisUrl, parse_host
from weightcache.directory.base import MAX_TAUGHT, Changed, Member, View
from weightcache.directory.redis_link import Link, Script, Unanswered
from weightcache.log import fields
from weightcache.version import __version__

TTL = 10.0  # seconds for which a peer is believed to live
LOOKS = (0.15, 0.3)  # of TTL, between two looks
CROWD = 1000  # peers; in a larger fleet TTL and looks stretch in proportion
NEIGHBOURS = 256  # members of a view
BLOB_SECONDS = 600.0  # for which an announced blob is believed
TAUGHT_SECONDS = 7 * 86400
PAUSES = (0.25, 4.0)  # seconds between attempts to reach the server: first, longest
START_SECONDS = 3.0
GATHER_SECONDS = 0.05  # what is announced within this time is sent together
BATCH = 256  # blobs in one message
MAX_RECORD = 512  # bytes
_MAC = 32

log = logging.getLogger(__name__)

_LOOK = Script("""
local prefix, ttl, me, place, record, known, limit = unpack(ARGV)
local ring, lived = prefix .. 'ring', 1
if record ~= '' then
  lived = redis.call('EXISTS', prefix .. 'peer:' .. me)
  redis.call('SET', prefix .. 'peer:' .. me, record, 'EX', ttl)
  redis.call('ZADD', ring, 0, place .. me)
  redis.call('EXPIRE', ring, 86400)
end
local names = {}
local function walk(from, to)
  local room = tonumber(limit) - #names
  for _, name in ipairs(redis.call('ZRANGEBYLEX', ring, from, to, 'LIMIT', 0, room)) do names[#names + 1] = name end
end
walk('(' .. place .. me, '(' .. place .. '~')
walk('[' .. place, '(' .. place .. me)
walk('(' .. place .. '~', '+')
walk('-', '(' .. place)
local records, keys = {}, {}
for i, name in ipairs(names) do keys[i] = prefix .. 'peer:' .. string.sub(name, -32) end
if #keys > 0 then
  for i, found in ipairs(redis.call('MGET', unpack(keys))) do
    if found then records[#records + 1] = found else redis.call('ZREM', ring, names[i]) end
  end
end
local digest, count = redis.sha1hex(table.concat(records, '\\n')), redis.call('ZCARD', ring)
if digest == known then return {lived, count, digest} end
return {lived, count, digest, records}
""")

_LEAVE = Script("""
local prefix, me, place = unpack(ARGV)
redis.call('DEL', prefix .. 'peer:' .. me)
redis.call('ZREM', prefix .. 'ring', place .. me)
""")

_ANNOUNCE = Script("""
local prefix, me, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = tonumber(redis.call('TIME')[1])
for i = 4, #ARGV do
  local how, blob = string.sub(ARGV[i], 1, 1), string.sub(ARGV[i], 2)
  local all, some = prefix .. 'all:' .. blob, prefix .. 'some:' .. blob
  if how == 'a' then all, some = some, all end
  redis.call('ZREM', all, me)
  if how == '-' then redis.call('ZREM', some, me) else
    redis.call('ZADD', some, now + ttl, me)
    redis.call('EXPIRE', some, ttl)
  end
end
""")

_HOLDERS = Script("""
local prefix, me, blob, many = unpack(ARGV)
local now, found = tonumber(redis.call('TIME')[1]), {}
for _, kind in ipairs({'all:', 'some:'}) do
  local key, keys = prefix .. kind .. blob, {}
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  for _, id in ipairs(redis.call('ZRANDMEMBER', key, many)) do
    if id ~= me then keys[#keys + 1] = prefix .. 'peer:' .. id end
  end
  if #keys > 0 then
    for _, record in ipairs(redis.call('MGET', unpack(keys))) do
      if record then found[#found + 1] = record end
    end
  end
end
return found
""")

_TEACH = Script("""
local key, ttl, mac, data = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('GETRANGE', key, 0, 31) == mac then return redis.call('EXPIRE', key, ttl) end
if data == '' then return 0 end
redis.call('SET', key, mac .. data, 'EX', ttl)
return 1
""")

_LEARNED = Script("""
local key, ttl, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
if redis.call('STRLEN', key) > most then return false end
redis.call('EXPIRE', key, ttl)
return redis.call('GET', key)
""")


class RedisDirectory:
    """The daemons of the same cluster that keep themselves alive on the server at ``url``. A Registry, too."""

    def __init__(self, url: RedisUrl, datacenter: str, key: bytes | None, ttl: float = TTL) -> None:
        self._link = Link(url)
        self._name = url.public
        self._datacenter, self._ttl = datacenter, ttl
        self._only_here = key is None
        tag = blake3(key or b"", derive_key_context="weightcache 2026 redis cluster name").hexdigest(length=8)
        self._prefix = f"weightcache:{{{tag}}}:"
        self._mac_key = blake3(key or b"", derive_key_context="weightcache 2026 taught").digest()
        self._id = self._record = ""  # without a record: it looks, and is not seen
        self._view: View = frozenset()
        self._digest = b""
        self._stretch = 1.0
        self._changed: Changed | None = None
        self._held: dict[bytes, str] = {}  # blob -> how it is announced: "a" all, "s" some
        self._news: dict[bytes, str] = {}  # likewise, and not sent yet; "-": not any more
        self._again = 0.0  # when all of it is announced again (the loop's time)
        self._has_news = asyncio.Event()
        self._looked = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self.trouble = ""

    # -- Directory

    async def start(self, me: Member, changed: Changed) -> None:
        if me.node_id is None:
            raise ValueError("on Redis a daemon announces its node id")
        self._changed, self._id = changed, me.node_id.hex()
        if me.port:
            self._record = "\0".join((self._datacenter, self._id, me.host, str(me.port), __version__))
        self._keeper = asyncio.create_task(self._keep(), name=f"directory {self._name}")
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._looked.wait()
        except TimeoutError:
            log.warning("directory slow", extra=fields(directory=self._name))

    async def close(self) -> None:
        self._changed = None
        if self._keeper is None:
            return
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        self._keeper = None
        if self._record and not self.trouble:
            with contextlib.suppress(Unanswered):
                await self._link.run(_LEAVE, self._prefix, self._id, self._place)
        await self._link.close()

    def view(self) -> View:
        return self._view

    @property
    def _place(self) -> str:
        return f"{self._datacenter}\0"

    async def _keep(self) -> None:
        """Look, and announce, until cancelled."""
        pause = PAUSES[0]
        while True:
            try:
                await self._look()
                await self._tell()
            except Unanswered as error:
                if not self.trouble:
                    log.warning("directory lost, last known view kept", extra=fields(why=str(error)))
                self.trouble = str(error)
                wait = pause * random.uniform(0.5, 1.5)
                pause = min(2 * pause, PAUSES[1])
            else:
                if self.trouble:
                    log.info("directory answers again", extra=fields(directory=self._name))
                self.trouble = ""
                pause = PAUSES[0]
                wait = self._ttl * self._stretch * random.uniform(*LOOKS)
            self._looked.set()
            await self._announce_for(wait)

    async def _announce_for(self, seconds: float) -> None:
        """Let time pass; what is announced meanwhile is sent, if somebody takes it."""
        with contextlib.suppress(TimeoutError, Unanswered):
            async with asyncio.timeout(seconds):
                while True:
                    await self._has_news.wait()
                    await asyncio.sleep(GATHER_SECONDS)
                    if self.trouble:
                        await asyncio.Event().wait()
                    await self._tell()

    async def _look(self) -> None:
        ttl = max(1, round(self._ttl * self._stretch))
        told = (self._prefix, ttl, self._id, self._place, self._record)
        reply = await self._link.run(_LOOK, *told, self._digest, NEIGHBOURS)
        match reply:
            case [int() as lived, int() as count, bytes() as digest, *rest]:
                self._stretch = min(max(1.0, count / CROWD), 100.0)
                if not lived:  # the first time, or the server has lost it: all that it knew, then
                    self._news = self._held | self._news
                    self._again = self._next_time()
                match rest:
                    case [list() as records]:
                        self._digest = digest
                        self._see(frozenset(self._members(records[:NEIGHBOURS])))
            case _:
                raise Unanswered(f"{self._name}: its answer is malformed")

    def _see(self, view: View) -> None:
        if view != self._view and self._changed is not None:
            self._view = view
            self._changed(view)

    def _members(self, records: Iterable[Any]) -> list[Member]:
        """The peers that records name; what is none is left out."""
        return [member for record in records if (member := self._member(record)) is not None]

    def _member(self, record: Any) -> Member | None:
        if not isinstance(record, bytes) or len(record) > MAX_RECORD:
            return None
        try:
            datacenter, name, host, port, _ = record.decode().split("\0")
            node_id, address = bytes.fromhex(name), Address(parse_host(host), int(port))
        except ValueError:
            return None
        ours = len(node_id) == 16 and name != self._id and 0 < address.port < 65536 and not address.is_wildcard
        if not ours or (self._only_here and not address.is_loopback):
            return None
        return Member(*address, node_id, datacenter[:64])

    # -- Registry

    def announce(self, blobs: Iterable[bytes], *, complete: bool) -> None:
        self._hold(dict.fromkeys(blobs, "a" if complete else "s"))

    def withdraw(self, blobs: Iterable[bytes]) -> None:
        self._hold(dict.fromkeys((blob for blob in blobs if blob in self._held), "-"))

    def _hold(self, changes: dict[bytes, str]) -> None:
        fresh = {blob: how for blob, how in changes.items() if self._held.get(blob) != how}
        if not self._record or not fresh:
            return
        self._news.update(fresh)
        for blob, how in fresh.items():
            if how == "-":
                del self._held[blob]
            else:
                self._held[blob] = how
        self._has_news.set()

    def _next_time(self) -> float:
        return asyncio.get_running_loop().time() + BLOB_SECONDS * random.uniform(0.2, 0.4)

    async def _tell(self) -> None:
        """Send what is announced, and all of it again when its time has come."""
        if asyncio.get_running_loop().time() >= self._again:
            self._news = self._held | self._news
            self._again = self._next_time()
        self._has_news.clear()
        while self._news:
            batch = dict(islice(self._news.items(), BATCH))
            rows = (f"{how}{blob.hex()}" for blob, how in batch.items())
            await self._link.run(_ANNOUNCE, self._prefix, self._id, BLOB_SECONDS, *rows)
            self._news = {blob: how for blob, how in self._news.items() if batch.get(blob) != how}

    async def holders(self, blob: bytes, limit: int) -> list[Member]:
        """A quarter of them may be of other datacenters, more if there are not enough of this one."""
        reply = await self._ask(_HOLDERS, self._prefix, self._id, blob.hex(), 4 * limit)
        if not isinstance(reply, list):
            return []
        found = list(dict.fromkeys(self._members(reply[: 8 * limit])))
        near = [member for member in found if member.datacenter == self._datacenter]
        far = [member for member in found if member.datacenter != self._datacenter]
        near = near[: max(limit - len(far), limit - limit // 4)]
        return near + far[: limit - len(near)]

    async def teach(self, name: str, data: bytes) -> bool:
        if not data or len(data) > MAX_TAUGHT:
            return False
        mac = self._mac(name, data)
        told = (self._prefix + name, TAUGHT_SECONDS, mac)
        return bool(await self._ask(_TEACH, *told, b"") or await self._ask(_TEACH, *told, data))

    async def learned(self, name: str) -> bytes | None:
        reply = await self._ask(_LEARNED, self._prefix + name, TAUGHT_SECONDS, MAX_TAUGHT + _MAC)
        if not isinstance(reply, bytes) or len(reply) <= _MAC:
            return None
        mac, data = reply[:_MAC], reply[_MAC:]
        if not hmac.compare_digest(mac, self._mac(name, data)):
            log.warning("what the directory has learned is not of this cluster", extra=fields(name=name))
            return None
        return data

    def _mac(self, name: str, data: bytes) -> bytes:
        return blake3(name.encode() + b"\0" + data, key=self._mac_key).digest()

    async def _ask(self, script: Script, *arguments: bytes | str | float) -> Any:
        """A reply, or None from a server that gives none; while it is in trouble it is not waited for."""
        if self.trouble:
            return None
        try:
            return await self._link.run(script, *arguments)
        except Unanswered as error:
            log.info("directory asked in vain", extra=fields(why=str(error)))
            return None
