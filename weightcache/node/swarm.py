"""The peers of this host, and what they tell each other: who has what, which state of a source was seen, manifests.

One authenticated control connection a pair of hosts, used from both ends. A host that loads a blob says ``want`` to its
peers; each answers what it has and, from then on, announces what it gets, in batches, until ``unwant``. So news of a
chunk costs one small message a batch and listener, and nobody hears of blobs that it does not load. Who says ``want``
is thereby known to load the blob itself; such peers tell each other what they read from the origin, before it comes.
In a large swarm only neighbours hear what a host gets (listeners.py): new ones hear what it has, at once.

    call   find SOURCE         -> the newest snapshot this host knows of it, or nil
    call   want [BLOB, ...]    -> for each: nil (nothing), or [what it has: true (all) or a set of chunks,
                                  chunks it reads from the origin now, or nil: it does not load the blob]
    call   manifest BLOB       -> the manifest, or nil; [the manifest] if others told it some of the ids in there
    call   shares [ID, ...]    -> for each chunk id: nil, or [a blob here that has such a chunk, its index there]
    notify unwant [BLOB, ...]; has BLOB (now complete); gone BLOB (evicted)
           got [BLOB, [chunk, ...]]; reads [BLOB, [chunk, ...]] (begun; none: ended)
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack

from weightcache.config import Address, parse_address
from weightcache.core.bitmap import ChunkSet
from weightcache.core.layout import MAX_CHUNKS
from weightcache.core.snapshot import is_blob_id
from weightcache.core.source import MAX_SOURCE
from weightcache.directory.base import Member
from weightcache.errors import ProtocolError, WeightcacheError
from weightcache.log import fields
from weightcache.net.control import ControlConnection, ControlServer, connect
from weightcache.net.handshake import ItselfError
from weightcache.node.listeners import Listeners
from weightcache.node.rolls import Rolls
from weightcache.node.trust import Trust

log = logging.getLogger(__name__)

ANNOUNCE_SECONDS = 0.02  # what a host gets within this time is announced together
REDIAL_SECONDS = (0.2, 10.0)  # between attempts to reach a member: first, longest
ASK_SECONDS = 2.0  # for a small answer
MANIFEST_SECONDS = 5.0
ASKED = 8  # peers that are asked about a source
MAX_WANTED = 4096  # blobs in one message
MAX_IDS = 4096  # chunk ids in one message

Body = Any
Place = tuple[bytes, int]  # a blob, and the index of a chunk in it


@dataclass(slots=True)
class State:
    """What a host has of a blob, as it states it. ``has``: all (True), or an encoded chunk set; empty when it has none
    and knows no plan yet. ``reads``: chunks on their way to it from the origin; None: it does not load the blob.
    ``got``: what it told since."""

    has: bytes | bool = b""
    reads: list[int] | None = None
    got: list[int] = field(default_factory=list)

    def encode(self) -> list[Any]:
        return [self.has, self.reads]


class Shelf(Protocol):
    """What a swarm tells of its own host, and whom it tells news of others."""

    def find(self, source: str) -> bytes | None:
        """The newest snapshot known of a source, encoded."""

    def state(self, blob: bytes) -> State | None: ...

    def manifest(self, blob: bytes) -> tuple[bytes, bool] | None:
        """The manifest, and whether this host has read itself whatever ids there are in it."""

    def places(self, ids: Sequence[bytes]) -> list[Place | None]:
        """Where peers can get chunks with these ids from this host. Called in a thread."""

    def peer_joined(self, peer: Peer) -> None: ...

    def peer_left(self, peer: Peer) -> None: ...

    def peer_state(self, peer: Peer, blob: bytes, state: State | None) -> None:
        """What a peer has of a blob (None: nothing); chunks and their set are unchecked."""

    def peer_got(self, peer: Peer, blob: bytes, chunks: Sequence[int]) -> None: ...

    def peer_reads(self, peer: Peer, blob: bytes, chunks: Sequence[int]) -> None:
        """A peer loads a blob, and has begun to read these chunks of it from the origin."""

    def peer_quits(self, peer: Peer, blob: bytes) -> None:
        """It does not load it any more."""


@dataclass(slots=True, eq=False)
class Peer:
    """Another daemon of the cluster, connected. ``name``: its control address, for people."""

    id: bytes
    name: str
    datacenter: str
    bulk: Address | None  # None: it serves nothing
    connection: ControlConnection
    remote: bool = False  # of another datacenter


@dataclass(frozen=True, slots=True)
class Info:
    """What a host says of itself when a connection opens."""

    datacenter: str
    control: str  # HOST:PORT to dial it at; "": it cannot be dialled
    bulk: str  # likewise; "": it serves nothing
    version: str

    def encode(self) -> bytes:
        return bytes(msgpack.packb([self.datacenter, self.control, self.bulk, self.version]))

    @classmethod
    def decode(cls, data: bytes) -> Info:
        try:
            fields = msgpack.unpackb(data)
        except Exception as error:  # noqa: BLE001 - whatever hostile bytes make a decoder raise
            raise ProtocolError(f"a peer's introduction is malformed: {type(error).__name__}") from None
        if not isinstance(fields, list) or len(fields) < 4 or not all(isinstance(f, str) for f in fields[:4]):
            raise ProtocolError("a peer's introduction is malformed")
        return cls(*fields[:4])


class Swarm:
    """This host among its peers; who does not ``listen`` serves nobody. ``remote``: it dials other datacenters, too."""

    def __init__(self, node_id: bytes, key: bytes | None, shelf: Shelf, trust: Trust, *, remote: bool = True) -> None:
        self._id = node_id
        self._key = key
        self._shelf = shelf
        self._trust = trust
        self._remote = remote
        self.rolls = Rolls(self._has, self._is_worth_a_visit, self._call_on)
        self._info = Info("", "", "", "")
        self._server: ControlServer | None = None
        self.peers: dict[bytes, Peer] = {}
        self._dialling: dict[Address, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listeners = Listeners(node_id)
        self._news: dict[bytes, list[int]] = {}  # blob -> chunks to announce
        self._flush: asyncio.TimerHandle | None = None
        self._untried: set[Address] = set()  # members that are being dialled for the first time
        self._tried = asyncio.Event()
        self._tried.set()
        self.troubles: dict[str, str] = {}  # member's address -> why it is not connected

    def listen(self, address: Address) -> int:
        """Take the address; returns the port. Raises DaemonError when it is taken."""
        self._server = ControlServer(
            address.host, address.port, self._key, self._id, self._introduce, self._handle, self._connected
        )
        return self._server.bind()

    async def introduce(self, info: Info) -> None:
        """Tell peers this of the host from now on. Only then are they accepted: who came earlier would believe for as
        long as it is connected that nothing is served here."""
        self._info = info
        if self._server is not None:
            await self._server.start()

    def _introduce(self) -> bytes:
        return self._info.encode()

    async def close(self) -> None:
        tasks = [*self._dialling.values(), *self._tasks]
        await self.rolls.close()
        for task in tasks:
            task.cancel()
        if self._flush is not None:
            self._flush.cancel()
        await asyncio.gather(*(peer.connection.close() for peer in self.peers.values()))
        if self._server is not None:
            await self._server.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- connections

    def members(self, view: Iterable[Member]) -> None:
        """The directory's view has changed: dial who is new, stop dialling who is gone."""
        wanted = {Address(member.host, member.port) for member in view if self._may_dial(member)}
        for address in list(self._dialling):
            if address not in wanted:
                self._dialling.pop(address).cancel()
                self.troubles.pop(str(address), None)
                self._has_tried(address)
        for address in sorted(wanted - self._dialling.keys()):
            self._untried.add(address)
            self._tried.clear()
            self._dialling[address] = asyncio.ensure_future(self._keep(address))

    def _may_dial(self, member: Member) -> bool:
        near = not member.datacenter or member.datacenter == self._info.datacenter
        return member.node_id != self._id and (near or self._remote)

    def _has_tried(self, address: Address) -> None:
        self._untried.discard(address)
        if not self._untried:
            self._tried.set()

    async def settled(self) -> None:
        """Wait until every member that the directory names has been dialled once: a host that has just started has
        no peers yet, and must not take that for having none."""
        await self._tried.wait()

    async def _keep(self, address: Address) -> None:
        """Stay connected to a member for as long as it is one."""
        pause = REDIAL_SECONDS[0]
        while True:
            try:
                peer = self._named(address)
                if peer is None:
                    peer = await self._dial(address)
                self.troubles.pop(str(address), None)
                pause = REDIAL_SECONDS[0]
                self._has_tried(address)
                await peer.connection.closed()
            except ItselfError:
                self._has_tried(address)
                return  # the member is this host
            except (OSError, WeightcacheError) as error:
                reason = str(error) or type(error).__name__
                if self.troubles.get(str(address)) != reason:
                    log.warning("peer unreachable", extra=fields(peer=str(address), why=reason))
                self.troubles[str(address)] = reason
                self._has_tried(address)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, REDIAL_SECONDS[1])

    def _named(self, address: Address) -> Peer | None:
        return next((peer for peer in self.peers.values() if peer.name == str(address)), None)

    def _is_worth_a_visit(self, member: Member) -> bool:
        address = Address(member.host, member.port)
        return self._may_dial(member) and address not in self._dialling and self._named(address) is None

    async def _call_on(self, address: Address) -> ControlConnection:
        return (await self._dial(address)).connection

    async def _dial(self, address: Address) -> Peer:
        """Connect to a member. It may be connected already, under another address or by a connection of its own."""
        connection = await connect(
            address.host, address.port, self._key, self._id, self._introduce, self._handle,
            functools.partial(self._connected, dialled=str(address)),
        )  # fmt: skip
        peer = self.peers.get(connection.peer_id)
        if peer is None:
            raise ProtocolError("it introduced itself in a way that this host does not understand")
        return peer

    def _connected(self, connection: ControlConnection, dialled: str = "") -> None:
        """A connection is up. Of two between the same hosts, both keep the one that the smaller id dialled."""
        try:
            info = Info.decode(connection.peer_info)
            # The receiver dials without a resolver: the address that this connection has will do.
            bulk = Address(connection.remote_host, parse_address(info.bulk).port) if info.bulk else None
        except (ProtocolError, ValueError) as error:
            log.warning("peer refused", extra=fields(peer=dialled, why=str(error)))
            self._spawn(connection.close())
            return
        other = self.peers.get(connection.peer_id)
        if other is not None and connection.dialled != (self._id < connection.peer_id):
            self._spawn(connection.close())
            return
        name = dialled or info.control or f"{connection.peer_id.hex()[:8]}"
        remote = info.datacenter != self._info.datacenter
        peer = Peer(connection.peer_id, name, info.datacenter, bulk, connection, remote)
        self.peers[peer.id] = peer
        self._spawn(self._until_closed(peer))
        if other is not None:
            self._spawn(other.connection.close())  # with it go calls that were under way: they are made again
        else:
            log.info("peer joined", extra=fields(peer=name, datacenter=info.datacenter))
        self._shelf.peer_joined(peer)

    async def _until_closed(self, peer: Peer) -> None:
        why = await peer.connection.closed()
        if self.peers.get(peer.id) is not peer:
            return
        del self.peers[peer.id]
        for blob in self._listeners.drop_all(peer.id):
            self._catch_up(blob)
        log.info("peer left", extra=fields(peer=peer.name, why=str(why or "it closed the connection")))
        self._shelf.peer_left(peer)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- what peers ask and tell

    async def _handle(self, connection: ControlConnection, kind: str, body: Body) -> Body:
        peer = self.peers.get(connection.peer_id)
        match kind, body:
            case "find", str() if len(body) <= MAX_SOURCE:
                return self._shelf.find(body)
            case "want", list() if len(body) <= MAX_WANTED:
                blobs = [_blob(item) for item in body]
                if peer is not None:
                    for blob in blobs:
                        self._listeners.add(blob, peer.id, remote=peer.remote)
                        self._shelf.peer_reads(peer, blob, [])
                states = [self._shelf.state(blob) for blob in blobs]
                return [state.encode() if state is not None else None for state in states]
            case "manifest", bytes():
                told = self._shelf.manifest(_blob(body))
                return None if told is None else told[0] if told[1] else [told[0]]
            case "shares", list() if len(body) <= MAX_IDS:
                return await asyncio.to_thread(self._shelf.places, [_blob(item) for item in body])
            case "unwant", list():
                for item in body:
                    self._listeners.drop(_blob(item), connection.peer_id)
                    self._catch_up(item)
                    if peer is not None:
                        self._shelf.peer_quits(peer, item)
            case "got" | "reads", [bytes() as blob, list() as chunks] if len(chunks) <= MAX_CHUNKS:
                if not _are_chunks(chunks):
                    raise ProtocolError("a chunk's index is no integer")
                if peer is not None:
                    tell = self._shelf.peer_got if kind == "got" else self._shelf.peer_reads
                    tell(peer, _blob(blob), chunks)
            case "has", bytes():
                if peer is not None:
                    self._shelf.peer_state(peer, _blob(body), State(True))
            case "gone", bytes():
                if peer is not None:
                    self._shelf.peer_state(peer, _blob(body), None)
            case _:
                raise ProtocolError(f"{kind!r} is no message of this version, or is malformed")
        return None

    def _catch_up(self, blob: bytes) -> None:
        """Tell new neighbours what there is."""
        new = self._listeners.new(blob)
        state = self._shelf.state(blob) if new else None
        if state is None:
            return
        if state.reads:
            self._notify(new, "reads", [blob, state.reads])
        if isinstance(state.has, bytes):
            self._notify(new, "got", [blob, list(ChunkSet.decode(state.has, 8 * len(state.has)))])
        else:
            self._notify(new, "has", blob)

    # -- what this host asks and tells

    async def find(self, source: str) -> list[tuple[Peer, bytes]]:
        """What a few peers know of a source: encoded snapshots, unchecked."""
        peers = self.askable()
        asked = random.sample(peers, min(ASKED, len(peers)))
        answers = await asyncio.gather(*(self._ask(peer, "find", source, _is_bytes) for peer in asked))
        return [(peer, answer) for peer, answer in zip(asked, answers, strict=True) if answer is not None]

    async def want(self, blobs: Sequence[bytes], peers: Iterable[Peer] | None = None) -> None:
        """Ask peers for news of blobs; what they have goes to the shelf as they answer."""

        async def ask(peer: Peer) -> None:
            for first in range(0, len(blobs), MAX_WANTED):
                part = list(blobs[first : first + MAX_WANTED])
                states = await self._ask(peer, "want", part, functools.partial(_are_states, len(part)))
                for blob, state in zip(part, states or (), strict=False):
                    if state is not None:
                        self._shelf.peer_state(peer, blob, State(*state))

        for blob in blobs:
            self._listeners.load(blob)
        meeting = [self._meet_holders(blobs)] if peers is None else []
        await asyncio.gather(*meeting, *(ask(peer) for peer in (self.askable() if peers is None else peers)))

    async def _meet_holders(self, blobs: Sequence[bytes]) -> None:
        met = map(self._named, await self.rolls.meet(blobs))
        await self.want(blobs, [peer for peer in met if peer is not None])

    def unwant(self, blobs: Sequence[bytes]) -> None:
        for blob in blobs:
            self._listeners.unload(blob)
        for peer in self.peers.values():
            peer.connection.notify("unwant", list(blobs))

    async def manifest(self, peer: Peer, blob: bytes) -> tuple[bytes, bool] | None:
        """A peer's manifest of a blob, and whether the peer vouches for every id in it."""
        told = await self._ask(peer, "manifest", blob, _is_manifest, MANIFEST_SECONDS)
        return (told, True) if isinstance(told, bytes) else (told[0], False) if told else None

    async def shares(self, peer: Peer, ids: Sequence[bytes]) -> list[Place | None]:
        """Where a peer has chunks with these ids (at most MAX_IDS)."""
        places = await self._ask(peer, "shares", list(ids), functools.partial(_are_places, len(ids)))
        return [None if place is None else (place[0], place[1]) for place in places or [None] * len(ids)]

    def askable(self) -> list[Peer]:
        """The peers that are not left alone now."""
        return [peer for peer in self.peers.values() if not self._trust.rest(peer.id)]

    async def _ask(
        self, peer: Peer, kind: str, body: Body, fits: Callable[[Body], bool], seconds: float = ASK_SECONDS
    ) -> Body:
        """One call; None from a peer that knows nothing, fails, or does not answer in time."""
        try:
            answer = await asyncio.wait_for(peer.connection.call(kind, body), seconds)
        except TimeoutError:
            self._trust.silent(peer.id, peer.name, f"it did not answer {kind!r} within {seconds:g} s")
        except (WeightcacheError, OSError):
            pass  # the connection is lost, or it cannot say
        else:
            if answer is None or fits(answer):
                return answer
            self._trust.lied(peer.id, peer.name, f"its answer to {kind!r} is malformed")
        return None

    def announce(self, blob: bytes, chunk: int) -> None:
        """Tell its neighbours among those that want it that this host now has a chunk."""
        if blob not in self.rolls:
            self.rolls.tell([blob])
        if blob in self._listeners:
            self._news.setdefault(blob, []).append(chunk)
            if self._flush is None:
                self._flush = asyncio.get_running_loop().call_later(ANNOUNCE_SECONDS, self._tell)

    def announce_reads(self, blob: bytes, chunks: Sequence[int]) -> None:
        """Tell who wants it what this host has begun to read, at once, before somebody else does; and a large swarm,
        where others wait for that, when nothing is left (no chunks)."""
        if chunks or self._listeners.are_many(blob):
            self._notify(self._listeners.all(blob), "reads", [blob, chunks])

    def announce_state(self, blob: bytes, *, has: bool) -> None:
        """Tell who wants it that this host has all of a blob, or nothing any more."""
        self._news.pop(blob, None)
        self.rolls.tell([blob])
        self._notify(self._listeners.all(blob), "has" if has else "gone", blob)

    def _has(self, blob: bytes) -> bool | None:
        state = self._shelf.state(blob)
        return state.has is True if state is not None and state.has else None

    def _tell(self) -> None:
        self._flush = None
        news, self._news = self._news, {}
        for blob, chunks in news.items():
            self._catch_up(blob)
            self._notify(self._listeners.neighbours(blob), "got", [blob, chunks])

    def _notify(self, peers: Iterable[bytes], kind: str, body: Body) -> None:
        for peer_id in peers:
            if (peer := self.peers.get(peer_id)) is not None:
                peer.connection.notify(kind, body)


def _is_bytes(answer: Body) -> bool:
    return isinstance(answer, bytes)


def _is_manifest(answer: Body) -> bool:
    return isinstance(answer, bytes) or (isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], bytes))


def _are_places(count: int, answer: Body) -> bool:
    whole = isinstance(answer, list) and len(answer) == count
    return whole and all(place is None or _is_place(place) for place in answer)


def _is_place(answer: Body) -> bool:
    match answer:
        case [bytes() as blob, int() as index]:
            return is_blob_id(blob) and type(index) is int and 0 <= index < MAX_CHUNKS
    return False


def _are_states(count: int, answer: Body) -> bool:
    whole = isinstance(answer, list) and len(answer) == count
    return whole and all(state is None or _is_state(state) for state in answer)


def _is_state(answer: Body) -> bool:
    match answer:
        case [True | bytes(), None | list() as reads]:
            return reads is None or (len(reads) <= MAX_CHUNKS and _are_chunks(reads))
    return False


def _are_chunks(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def _blob(item: Body) -> bytes:
    if not is_blob_id(item):
        raise ProtocolError("a blob's id is malformed")
    return item
