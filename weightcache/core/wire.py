"""The wire between two nodes: frames, the MAC on each, and a table of which may come when.

Theory of operation. A connection carries frames in both directions:

    length u32 (little-endian) | kind u8 | body: ``length`` bytes, a msgpack array | MAC: 16 bytes

The MAC is keyed BLAKE3 over (sequence number, header, body). Each direction has a key and a sequence of its own, so a
frame cannot be changed, dropped, repeated, reordered, or sent back to its author. The handshake (net/handshake.py)
brings the keys; until it is done no frame may exceed HANDSHAKE_LIMIT.

What may come when is TRANSITIONS: for each port, state x (who sends, what) -> next state; whatever it lacks is an
error. Both ends walk the same table, each with the frames in the order in which it sends and receives them. Frames
that may cross on their way therefore never change the state the other's depend on: GET is allowed while a chunk's
bytes flow.

On the bulk port a DATA frame states (request, length, chunk id), and ``length`` raw bytes follow it. They carry no
MAC: the chunk id does, and it names them. ``bytes_left`` counts them on both ends; when it is zero frames go on (the
pseudo-kind BYTES).

A Link is one end. It does no I/O: bytes go in by ``space`` and ``filled`` (a buffer for recv_into that never holds
more than one frame of the largest size allowed), frames come out of ``receive``; ``send`` gives the bytes of a frame.
After an error a link is useless: close the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import Enum, IntEnum
from hmac import compare_digest
from typing import Any, NamedTuple

import msgpack
from blake3 import blake3

from weightcache.core.ids import ID_BYTES
from weightcache.core.layout import CHUNK, MAX_CHUNKS
from weightcache.errors import AuthError, ProtocolError

MAC_BYTES = 16
HANDSHAKE_LIMIT = 4096  # bytes of a frame's body before both ends are known
BULK_LIMIT = 4096  # bytes of a frame's body on the bulk port
CONTROL_LIMIT = 16 << 20  # bytes of a frame's body on the control port, unless told otherwise
MAX_INFO = 4000  # bytes of what each end says of itself
MAX_KIND = 64  # characters of a call's or notice's kind

_HEADER = struct.Struct("<IB")
_SEALED = struct.Struct("<QIB")  # what the MAC covers before the body
_OVERHEAD = _HEADER.size + MAC_BYTES
_KEEP = 64 << 10  # bytes of buffer an idle control connection keeps


class Role(Enum):
    """Who sends: the end that connected, or the one that listened."""

    CLIENT = "client"
    SERVER = "server"

    @property
    def other(self) -> Role:
        return Role.SERVER if self is Role.CLIENT else Role.CLIENT


class Port(Enum):
    """What a connection is for. Each has a TCP port of its own, and a hello for the other is refused."""

    CONTROL = "control"
    BULK = "bulk"


class Kind(IntEnum):
    """What a frame is. HELLO, WELCOME and VERSION keep their numbers for good: every version must read them."""

    HELLO = 1  # [magic, protocol, plan version, [whatever this protocol says]]
    WELCOME = 2  # [server's id, server's nonce]
    VERSION = 3  # [protocol, plan version]: of a server that speaks another than the hello
    INFO = 4  # [bytes]: what an end says of itself; the client's is its proof of the key
    CALL = 16  # [call, kind, body]
    ANSWER = 17  # [call, body]
    ERROR = 18  # [call, class, message]
    NOTIFY = 19  # [kind, body]
    PING = 20  # []
    PONG = 21  # []
    GET = 32  # [request, blob, index]
    DATA = 33  # [request, length, chunk id], then `length` raw bytes
    NO = 34  # [request, reason, milliseconds to wait]
    BYTES = 255  # never a frame: the raw bytes after DATA have all passed


# Why a chunk is not sent: the sender lacks the chunk, lacks the blob, or has too much to do.
MISSING, UNKNOWN, BUSY = "missing", "unknown", "busy"
REASONS = (MISSING, UNKNOWN, BUSY)


class State(Enum):
    """What both ends wait for."""

    HELLO = "hello"
    WELCOME = "welcome"
    PROOF = "proof"
    INFO = "info"
    OPEN = "open"
    BYTES = "bytes"
    CLOSED = "closed"


_Event = tuple[Role, Kind]
_CLIENT, _SERVER = Role.CLIENT, Role.SERVER
_TALK = (Kind.CALL, Kind.ANSWER, Kind.ERROR, Kind.NOTIFY, Kind.PING, Kind.PONG)

_HANDSHAKE: dict[State, dict[_Event, State]] = {
    State.HELLO: {(_CLIENT, Kind.HELLO): State.WELCOME},
    State.WELCOME: {(_SERVER, Kind.WELCOME): State.PROOF, (_SERVER, Kind.VERSION): State.CLOSED},
    State.PROOF: {(_CLIENT, Kind.INFO): State.INFO},
    State.INFO: {(_SERVER, Kind.INFO): State.OPEN},
    State.CLOSED: {},
}

TRANSITIONS: dict[Port, dict[State, dict[_Event, State]]] = {
    Port.CONTROL: _HANDSHAKE | {
        State.OPEN: {(role, kind): State.OPEN for role in Role for kind in _TALK},
    },
    Port.BULK: _HANDSHAKE | {
        State.OPEN: {
            (_CLIENT, Kind.GET): State.OPEN,
            (_SERVER, Kind.NO): State.OPEN,
            (_SERVER, Kind.DATA): State.BYTES,
        },
        State.BYTES: {
            (_CLIENT, Kind.GET): State.BYTES,
            (_SERVER, Kind.BYTES): State.OPEN,
        },
    },
}  # fmt: skip


def _number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _index(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_CHUNKS


def _length(value: Any) -> bool:
    return type(value) is int and 0 < value <= CHUNK


def _name(value: Any) -> bool:
    return isinstance(value, bytes) and len(value) == ID_BYTES


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _kind(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_KIND


def _reason(value: Any) -> bool:
    return value in REASONS


def _binary(value: Any) -> bool:
    return isinstance(value, bytes)


def _info(value: Any) -> bool:
    return isinstance(value, bytes) and len(value) <= MAX_INFO


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _anything(value: Any) -> bool:
    return True


FIELDS: dict[Kind, tuple[Callable[[Any], bool], ...]] = {
    Kind.HELLO: (_binary, _number, _number, _list),
    Kind.WELCOME: (_binary, _binary),
    Kind.VERSION: (_number, _number),
    Kind.INFO: (_info,),
    Kind.CALL: (_number, _kind, _anything),
    Kind.ANSWER: (_number, _anything),
    Kind.ERROR: (_number, _text, _text),
    Kind.NOTIFY: (_kind, _anything),
    Kind.PING: (),
    Kind.PONG: (),
    Kind.GET: (_number, _name, _index),
    Kind.DATA: (_number, _length, _name),
    Kind.NO: (_number, _reason, _number),
}


class Frame(NamedTuple):
    """A frame whose MAC, place and fields have been checked; ``raw`` is the whole of it as it was sent."""

    kind: Kind
    fields: list[Any]
    raw: bytes


class Decoder:
    """Cuts a stream into frames by their headers alone. Holds at most one frame with a body of ``limit`` bytes.

    Memory follows the bytes that really came, not the length a header claims.
    """

    __slots__ = ("_begin", "_buffer", "_end", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray(min(limit, _KEEP) + _OVERHEAD)
        self._begin = self._end = 0

    def space(self) -> memoryview:
        """Where the next bytes go, at least one. Only after ``next`` gave None and ``take`` took what is raw."""
        held = self._end - self._begin
        if not held:
            self._begin = self._end = 0
            if len(self._buffer) > _KEEP + _OVERHEAD:
                self._buffer = bytearray(_KEEP + _OVERHEAD)
        elif self._end == len(self._buffer):
            # A new buffer and not a resized one: whoever filled the last view may still hold it.
            size = len(self._buffer) if self._begin else min(2 * len(self._buffer), self.limit + _OVERHEAD)
            buffer = bytearray(size)
            buffer[:held] = memoryview(self._buffer)[self._begin : self._end]
            self._buffer, self._begin, self._end = buffer, 0, held
        return memoryview(self._buffer)[self._end :]

    def filled(self, count: int) -> None:
        """``count`` bytes were written to the start of ``space``."""
        self._end += count

    def next(self) -> bytes | None:
        """The next whole frame as it was sent; None until more bytes come. Raises ProtocolError if it is too long."""
        held = self._end - self._begin
        if held < _HEADER.size:
            return None
        length, _ = _HEADER.unpack_from(self._buffer, self._begin)
        if length > self.limit:
            raise ProtocolError(f"a frame claims {length} bytes: at most {self.limit} are accepted here")
        total = length + _OVERHEAD
        if held < total:
            return None
        return bytes(self.take(total))

    def take(self, most: int) -> memoryview:
        """Up to ``most`` bytes that have come already, uncut. Valid until the next ``space``."""
        begin = self._begin
        self._begin = min(begin + most, self._end)
        return memoryview(self._buffer)[begin : self._begin]


class Link:
    """One end of a connection: see the theory of operation. Keys never leave it, nor show in its repr."""

    __slots__ = (
        "_decoder", "_received", "_receiving", "_sending", "_sent", "_table",
        "bytes_left", "limit", "port", "role", "state",
    )  # fmt: skip

    def __init__(self, role: Role, port: Port, limit: int | None = None) -> None:
        self.role = role
        self.port = port
        self.limit = limit or (BULK_LIMIT if port is Port.BULK else CONTROL_LIMIT)
        self.state = State.HELLO
        self.bytes_left = 0
        self._table = TRANSITIONS[port]
        self._decoder = Decoder(HANDSHAKE_LIMIT)
        self._sending = self._receiving = b""
        self._sent = self._received = 0

    def rekey(self, *, sending: bytes | None = None, receiving: bytes | None = None) -> None:
        """From now on frames are sealed, or checked, with another key (32 bytes), counted from zero."""
        if sending is not None:
            self._sending, self._sent = sending, 0
        if receiving is not None:
            self._receiving, self._received = receiving, 0

    def send(self, kind: Kind, *fields: Any) -> bytes:
        """The bytes of one frame. Raises ProtocolError, and changes nothing, if it may not come now or is too long."""
        following = self._after(self.role, kind)
        body = msgpack.packb(fields)
        limit = self.limit if self.state in (State.OPEN, State.BYTES) else HANDSHAKE_LIMIT
        if len(body) > limit:
            raise ProtocolError(f"{kind.name} of {len(body)} bytes: a frame holds at most {limit}")
        mac = _mac(self._sending, self._sent, kind, body)
        self._sent += 1
        self._enter(following, kind, fields)
        return b"".join((_HEADER.pack(len(body), kind), body, mac))

    def space(self) -> memoryview:
        """Where received bytes go, for ``recv_into``; then call ``filled``, and ``receive`` until it gives None."""
        return self._decoder.space()

    def filled(self, count: int) -> None:
        self._decoder.filled(count)

    def receive(self) -> Frame | None:
        """The next frame; None until more bytes come, and while raw bytes are to be received.

        Raises AuthError for a wrong MAC, ProtocolError for anything else the table or FIELDS do not allow.
        """
        if self.bytes_left and self.role is Role.CLIENT:
            return None
        raw = self._decoder.next()
        if raw is None:
            return None
        _, number = _HEADER.unpack_from(raw)
        body = memoryview(raw)[_HEADER.size : -MAC_BYTES]
        if not compare_digest(_mac(self._receiving, self._received, number, body), raw[-MAC_BYTES:]):
            raise AuthError(
                "a frame's MAC is wrong: the peer does not know the cluster key, or bytes were changed on the way"
            )
        self._received += 1
        try:
            kind = Kind(number)
        except ValueError:
            raise ProtocolError(f"a frame of unknown kind {number}") from None
        following = self._after(self.role.other, kind)
        fields = _unpack(kind, body)
        self._enter(following, kind, fields)
        return Frame(kind, fields, raw)

    def take(self, most: int) -> memoryview:
        """Raw bytes that came in the wake of a DATA frame, at most ``most``; report them with ``moved``."""
        return self._decoder.take(min(most, self.bytes_left))

    def moved(self, count: int) -> None:
        """``count`` of the raw bytes after DATA have been sent, or received."""
        self.bytes_left -= count
        if not self.bytes_left:
            self.state = self._after(_SERVER, Kind.BYTES)

    def _after(self, role: Role, kind: Kind) -> State:
        try:
            return self._table[self.state][role, kind]
        except KeyError:
            raise ProtocolError(
                f"{role.value} sent {kind.name} in state {self.state.value} ({self.port.value})"
            ) from None

    def _enter(self, state: State, kind: Kind, fields: Any) -> None:
        if kind is Kind.DATA:
            self.bytes_left = fields[1]
        if state is State.OPEN and self.state is State.INFO:
            self._decoder.limit = self.limit
        self.state = state


def _mac(key: bytes, sequence: int, kind: int, body: bytes | memoryview) -> bytes:
    return blake3(_SEALED.pack(sequence, len(body), kind), key=key).update(body).digest(length=MAC_BYTES)


def _unpack(kind: Kind, body: memoryview) -> list[Any]:
    try:
        fields = msgpack.unpackb(body, strict_map_key=False)
    except Exception as error:  # noqa: BLE001 - whatever hostile bytes make a decoder raise
        raise ProtocolError(f"{kind.name}: not msgpack ({type(error).__name__})") from None
    shape = FIELDS.get(kind)
    if shape is None or not isinstance(fields, list) or len(fields) != len(shape):
        raise ProtocolError(f"{kind.name}: malformed")
    for check, value in zip(shape, fields, strict=True):
        if not check(value):
            raise ProtocolError(f"{kind.name}: malformed")
    return fields
