"""How two nodes prove to each other that they know the cluster key, before anything moves.

Theory of operation. Four frames, each sealed under a key that the frames before it have shaped:

    client -> HELLO    [magic, protocol, plan version, [role, port, id, nonce]]   key: derived from the cluster key
    server -> WELCOME  [id, nonce]                                               key: the cluster key and HELLO
    client -> INFO     [bytes]                                                   key: the cluster key, HELLO and WELCOME
    server -> INFO     [bytes]                                                   likewise, another for this direction

Both ids, nonces, roles and versions are part of HELLO and WELCOME, and so of every later key: a frame of another
connection, or one that is sent back to its author, verifies under none. A server answers nothing to a HELLO whose MAC
is wrong. A replayed HELLO gets a WELCOME and no further: the session keys depend on a nonce that was new, and INFO is
the client's proof.

A server of another version says so, to a HELLO whose MAC is right, in VERSION. That much (outer form of HELLO,
WELCOME's key, VERSION) is the same in every version.

Without a cluster key both ends use a public one. The code path is the same; the configuration then allows loopback
only.

No I/O and no clock here: the caller moves the bytes and keeps the deadline (DEADLINE). When ``advance`` raises, send
``farewell`` (mostly empty) and close.
"""

from __future__ import annotations

import os
from typing import Any

from blake3 import blake3

from weightcache.core.ids import PLAN_VERSION, short
from weightcache.core.wire import MAX_INFO, Frame, Kind, Link, Role, State
from weightcache.errors import ProtocolError

PROTOCOL = 1
NODE_ID_BYTES = 16
NONCE_BYTES = 32
DEADLINE = 5.0  # seconds a handshake may take
PUBLIC_KEY = b"weightcache: no cluster key, loopback only"
UNANSWERED = "the peer closed the connection unanswered: its cluster key is another, or it has too many connections"

_MAGIC = b"weightcache"
_HELLO = "weightcache 2026 hello"
_WELCOME = "weightcache 2026 welcome"
_SESSION = {Role.CLIENT: "weightcache 2026 session client", Role.SERVER: "weightcache 2026 session server"}


class ItselfError(ProtocolError):
    """The peer has this node's own id: it is this host, reached by another address, or a copy of its store."""


class Handshake:
    """One end's part. ``link`` carries on once ``done``; ``peer_id`` and ``peer_info`` then say who the other is.

    ``key`` is the cluster key, if there is one. ``expected``: the only node id a client accepts from the server.
    """

    def __init__(
        self, link: Link, key: bytes | None, node_id: bytes, info: bytes, *, expected: bytes | None = None
    ) -> None:
        if len(info) > MAX_INFO:
            raise ProtocolError(f"info of {len(info)} bytes: at most {MAX_INFO} fit")
        self.link = link
        self.peer_id = b""
        self.peer_info = b""
        self.farewell = b""
        self._key = key or PUBLIC_KEY
        self._node_id = node_id
        self._info = info
        self._expected = expected
        self._hello = b""
        hello = _derive(self._key, _HELLO)
        if link.role is Role.CLIENT:
            link.rekey(sending=hello)
        else:
            link.rekey(receiving=hello)

    @property
    def done(self) -> bool:
        return self.link.state in (State.OPEN, State.BYTES)

    def start(self) -> bytes:
        """What to send first: a client's HELLO; a server says nothing."""
        if self.link.role is Role.SERVER:
            return b""
        rest = [Role.CLIENT.value, self.link.port.value, self._node_id, os.urandom(NONCE_BYTES)]
        self._hello = self.link.send(Kind.HELLO, _MAGIC, PROTOCOL, PLAN_VERSION, rest)
        self.link.rekey(receiving=_derive(self._key, _WELCOME, self._hello))
        return self._hello

    def advance(self) -> bytes:
        """Go as far as what came allows; returns what to send. Raises ProtocolError, AuthError, ItselfError."""
        answers = bytearray()
        while not self.done:
            frame = self.link.receive()
            if frame is None:
                break
            answers += self._STEPS[frame.kind](self, frame)
        return bytes(answers)

    def _on_hello(self, frame: Frame) -> bytes:
        magic, protocol, plan, rest = frame.fields
        if magic != _MAGIC:
            raise ProtocolError("a hello of something that is not weightcache")
        link = self.link
        link.rekey(sending=_derive(self._key, _WELCOME, frame.raw))
        if (protocol, plan) != (PROTOCOL, PLAN_VERSION):
            self.farewell = link.send(Kind.VERSION, PROTOCOL, PLAN_VERSION)
            raise _other_version(protocol, plan)
        self.peer_id = self._check_hello(rest)
        welcome = link.send(Kind.WELCOME, self._node_id, os.urandom(NONCE_BYTES))
        if self.peer_id == self._node_id:
            self.farewell = welcome  # from it the client learns the same
            raise _itself(self._node_id)
        self._open(frame.raw, welcome)
        return welcome

    def _check_hello(self, rest: list[Any]) -> bytes:
        match rest:
            case [Role.CLIENT.value, port, bytes(peer), bytes(nonce)]:
                if port != self.link.port.value:
                    raise ProtocolError(f"a hello for the {port!s:.20} port came to the {self.link.port.value} port")
                if len(peer) == NODE_ID_BYTES and len(nonce) == NONCE_BYTES:
                    return peer
        raise ProtocolError("HELLO: malformed")

    def _on_welcome(self, frame: Frame) -> bytes:
        peer, nonce = frame.fields
        if len(peer) != NODE_ID_BYTES or len(nonce) != NONCE_BYTES:
            raise ProtocolError("WELCOME: malformed")
        if peer == self._node_id:
            raise _itself(peer)
        if self._expected is not None and peer != self._expected:
            raise ProtocolError(f"node {short(peer)} answers where {short(self._expected)} was expected")
        self.peer_id = peer
        self._open(self._hello, frame.raw)
        return self.link.send(Kind.INFO, self._info)

    def _on_version(self, frame: Frame) -> bytes:
        raise _other_version(*frame.fields)

    def _on_info(self, frame: Frame) -> bytes:
        (self.peer_info,) = frame.fields
        return self.link.send(Kind.INFO, self._info) if self.link.role is Role.SERVER else b""

    def _open(self, hello: bytes, welcome: bytes) -> None:
        role = self.link.role
        sending, receiving = (_derive(self._key, _SESSION[end], hello, welcome) for end in (role, role.other))
        self.link.rekey(sending=sending, receiving=receiving)

    _STEPS = {Kind.HELLO: _on_hello, Kind.WELCOME: _on_welcome, Kind.VERSION: _on_version, Kind.INFO: _on_info}


def _derive(key: bytes, context: str, *transcript: bytes) -> bytes:
    """A key for one purpose (32 bytes), bound to the frames that went before."""
    purpose = blake3(key, derive_key_context=context).digest()
    return blake3(b"".join(transcript), key=purpose).digest()


def _other_version(protocol: int, plan: int) -> ProtocolError:
    theirs, ours = (protocol, plan), (PROTOCOL, PLAN_VERSION)
    older = "the peer" if theirs < ours else "this host"
    return ProtocolError(
        f"peer speaks protocol {protocol} (chunk plan {plan}), this host {PROTOCOL} ({PLAN_VERSION}): upgrade {older}"
    )


def _itself(node_id: bytes) -> ItselfError:
    return ItselfError(
        f"the peer has this node's own id {short(node_id)}: it is this host itself, or a copy of its store"
    )
