"""Two ends of a link joined in memory, and strangers who write to one."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcache.core.layout import CHUNK, MAX_CHUNKS
from weightcache.core.wire import (
    BULK_LIMIT,
    FIELDS,
    HANDSHAKE_LIMIT,
    REASONS,
    TRANSITIONS,
    Frame,
    Kind,
    Link,
    Port,
    Role,
    State,
)
from weightcache.errors import AuthError, ProtocolError

C2S, S2C = b"c" * 32, b"s" * 32
OVERHEAD = 5 + 16


def put(link: Link, data: bytes) -> list[Frame]:
    """Give a link bytes as they might arrive; the frames they complete. It never makes room for more than a frame."""
    frames = []
    while data:
        room = link.space()
        assert 0 < len(room) <= max(link.limit, HANDSHAKE_LIMIT) + OVERHEAD
        part, data = data[: len(room)], data[len(room) :]
        room[: len(part)] = part
        link.filled(len(part))
        while (frame := link.receive()) is not None:
            frames.append(frame)
    return frames


def pair(port: Port, limit: int | None = None) -> tuple[Link, Link]:
    """A client and a server that have shaken hands."""
    client, server = Link(Role.CLIENT, port, limit), Link(Role.SERVER, port, limit)
    client.rekey(sending=C2S, receiving=S2C)
    server.rekey(sending=S2C, receiving=C2S)
    for end, other, kind, fields in (
        (client, server, Kind.HELLO, (b"magic", 1, 1, [])),
        (server, client, Kind.WELCOME, (b"id", b"nonce")),
        (client, server, Kind.INFO, (b"i am the client",)),
        (server, client, Kind.INFO, (b"i am the server",)),
    ):
        (frame,) = put(other, end.send(kind, *fields))
        assert frame.fields == list(fields)
    assert client.state is server.state is State.OPEN
    return client, server


def in_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


numbers = st.integers(0, (1 << 63) - 1)
names = st.binary(min_size=32, max_size=32)
plain = (
    st.none() | st.booleans() | numbers | st.floats(allow_nan=False) | st.binary(max_size=200) | st.text(max_size=50)
)
bodies = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner))
kinds = st.text(min_size=1, max_size=64)
talk = st.one_of(
    st.tuples(st.just(Kind.CALL), numbers, kinds, bodies),
    st.tuples(st.just(Kind.ANSWER), numbers, bodies),
    st.tuples(st.just(Kind.ERROR), numbers, st.text(max_size=20), st.text(max_size=200)),
    st.tuples(st.just(Kind.NOTIFY), kinds, bodies),
    st.sampled_from([(Kind.PING,), (Kind.PONG,)]),
)
gets = st.tuples(st.just(Kind.GET), numbers, names, st.integers(0, MAX_CHUNKS - 1))
refusals = st.tuples(st.just(Kind.NO), numbers, st.sampled_from(REASONS), numbers)


@given(frames=st.lists(st.tuples(st.sampled_from(Role), talk), max_size=8), cuts=st.lists(st.integers(0, 1 << 20)))
def test_control_frames_arrive_as_sent_however_they_are_cut(
    frames: list[tuple[Role, tuple[Any, ...]]], cuts: list[int]
) -> None:
    ends = dict(zip(Role, pair(Port.CONTROL), strict=True))
    for role in Role:
        sent = [frame for author, frame in frames if author is role]
        data = b"".join(ends[role].send(*frame) for frame in sent)
        got = [frame for piece in in_pieces(data, cuts) for frame in put(ends[role.other], piece)]
        assert [(frame.kind, *frame.fields) for frame in got] == sent


@given(asked=st.lists(gets, max_size=6), refused=st.lists(refusals, max_size=6), cuts=st.lists(st.integers(0, 1 << 16)))
def test_bulk_frames_arrive_as_sent_however_they_are_cut(
    asked: list[tuple[Any, ...]], refused: list[tuple[Any, ...]], cuts: list[int]
) -> None:
    client, server = pair(Port.BULK)
    for end, other, sent in ((client, server, asked), (server, client, refused)):
        data = b"".join(end.send(*frame) for frame in sent)
        got = [frame for piece in in_pieces(data, cuts) for frame in put(other, piece)]
        assert [(frame.kind, *frame.fields) for frame in got] == sent


@given(chunks=st.lists(st.binary(min_size=1, max_size=9000), min_size=1, max_size=4), size=st.integers(1, 6000))
def test_raw_bytes_pass_between_frames(chunks: list[bytes], size: int) -> None:
    client, server = pair(Port.BULK)
    stream = b""
    for number, chunk in enumerate(chunks):
        stream += server.send(Kind.DATA, number, len(chunk), bytes(32)) + chunk
        with pytest.raises(ProtocolError, match="in state bytes"):
            server.send(Kind.NO, number, "busy", 0)
        server.moved(len(chunk))
    got: list[bytes] = []
    while stream:
        room = client.space()
        part, stream = stream[: min(size, len(room))], stream[min(size, len(room)) :]
        room[: len(part)] = part
        client.filled(len(part))
        while True:
            if raw := bytes(client.take(CHUNK)):
                got[-1] += raw
                client.moved(len(raw))
            elif client.receive() is not None:
                got.append(b"")
            else:
                break
    assert got == chunks
    assert client.state is server.state is State.OPEN


def test_requests_are_received_while_a_chunk_is_sent() -> None:
    client, server = pair(Port.BULK)
    server.send(Kind.DATA, 1, 100, bytes(32))
    (frame,) = put(server, client.send(Kind.GET, 2, bytes(32), 0))
    assert frame.fields[0] == 2
    server.moved(99)
    assert server.state is State.BYTES
    server.moved(1)
    assert server.state is State.OPEN


@pytest.mark.parametrize("port", Port)
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("state", State)
def test_what_the_table_lacks_is_refused_at_both_ends(port: Port, role: Role, state: State) -> None:
    for kind in FIELDS:
        if (role, kind) in TRANSITIONS[port].get(state, {}):
            continue
        author, reader = Link(role, port), Link(role.other, port)
        for end in (author, reader):
            end.rekey(sending=C2S, receiving=C2S)
            end.state = state
        with pytest.raises(ProtocolError, match=kind.name):
            author.send(kind)
        body = msgpack.packb([])
        with pytest.raises(ProtocolError):
            put(reader, seal(C2S, 0, kind, body))


def seal(key: bytes, sequence: int, kind: int, body: bytes) -> bytes:
    """A frame written from the description, not by the code under test."""
    from blake3 import blake3

    mac = blake3(struct.pack("<QIB", sequence, len(body), kind) + body, key=key).digest()[:16]
    return struct.pack("<IB", len(body), kind) + body + mac


def test_the_format_is_the_one_described() -> None:
    client, _ = pair(Port.BULK)
    assert client.send(Kind.GET, 7, bytes(32), 3) == seal(C2S, 2, 32, msgpack.packb([7, bytes(32), 3]))


def test_no_frame_can_be_changed_dropped_repeated_reordered_or_sent_back() -> None:
    def sent() -> tuple[Link, Link, bytes, bytes]:
        client, server = pair(Port.CONTROL)
        return client, server, client.send(Kind.NOTIFY, "a", 1), client.send(Kind.NOTIFY, "b", 2)

    client, server, first, second = sent()
    assert len(put(server, first + second)) == 2
    for position in range(5, len(first)):
        _, server, first, _ = sent()
        changed = bytearray(first)
        changed[position] ^= 1
        with pytest.raises(AuthError):
            put(server, bytes(changed))
    for order in ((1,), (0, 0), (1, 0)):
        _, server, *frames = sent()
        with pytest.raises(AuthError):
            put(server, b"".join(frames[i] for i in order))
    client, _, first, _ = sent()
    with pytest.raises(AuthError):
        put(client, first)


@given(st.binary(max_size=20000), st.booleans())
def test_hostile_bytes_end_in_an_error_and_hold_no_more_than_the_limit(data: bytes, opened: bool) -> None:
    link = pair(Port.BULK)[1] if opened else Link(Role.SERVER, Port.CONTROL)
    link.rekey(receiving=C2S)
    try:
        frames = put(link, data)
    except ProtocolError:
        return
    assert frames == []
    assert len(data) < max(BULK_LIMIT, HANDSHAKE_LIMIT) + OVERHEAD


@pytest.mark.parametrize("claimed", [HANDSHAKE_LIMIT + 1, 1 << 31, (1 << 32) - 1])
def test_a_frame_that_is_too_long_is_refused_by_its_header(claimed: int) -> None:
    with pytest.raises(ProtocolError, match="at most 4096"):
        put(Link(Role.SERVER, Port.CONTROL), struct.pack("<IB", claimed, 1))


def test_a_large_frame_passes_and_memory_follows_what_came() -> None:
    client, server = pair(Port.CONTROL, 4 << 20)
    data = client.send(Kind.NOTIFY, "manifest", bytes(3 << 20))
    room = server.space()
    room[:1000] = data[:1000]
    server.filled(1000)
    assert server.receive() is None
    assert len(server.space()) < 1 << 20  # though the header claims 3 MiB
    (frame,) = put(server, data[1000:])
    assert frame.fields[1] == bytes(3 << 20)
    assert len(server.space()) < 1 << 20  # and is given back
    with pytest.raises(ProtocolError, match="at most 4194304"):
        client.send(Kind.NOTIFY, "manifest", bytes(4 << 20))
    (frame,) = put(server, client.send(Kind.NOTIFY, "still", "here"))
    assert frame.fields == ["still", "here"]


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1", b"\xdd\xff\xff\xff\xff", msgpack.packb({}), msgpack.packb([1, bytes(32)]),
        msgpack.packb([1, bytes(31), 0]), msgpack.packb([-1, bytes(32), 0]), msgpack.packb([1, bytes(32), MAX_CHUNKS]),
        msgpack.packb([True, bytes(32), 0]), msgpack.packb([1, "x" * 32, 0]), b"\x91" * 4000,
    ],
)  # fmt: skip
def test_a_malformed_body_is_an_error_though_its_mac_is_right(body: bytes) -> None:
    _, server = pair(Port.BULK)
    with pytest.raises(ProtocolError, match="GET"):
        put(server, seal(C2S, 2, Kind.GET, body))


def test_a_length_beyond_a_chunk_is_an_error() -> None:
    client, _ = pair(Port.BULK)
    with pytest.raises(ProtocolError, match="DATA"):
        put(client, seal(S2C, 2, Kind.DATA, msgpack.packb([1, CHUNK + 1, bytes(32)])))


def test_keys_do_not_show() -> None:
    client, _ = pair(Port.BULK)
    assert "cccc" not in repr(client)
    assert "cccc" not in str(vars(type(client)))
