"""Handshakes between two ends joined in memory: who gets in, and what everybody else is told."""

from __future__ import annotations

import pytest

from weightcache.core.ids import PLAN_VERSION
from weightcache.core.wire import MAX_INFO, Kind, Link, Port, Role, State
from weightcache.errors import AuthError, ProtocolError
from weightcache.net import handshake
from weightcache.net.handshake import Handshake, ItselfError

KEY = b"the key of this cluster"
ANNE, BERT = b"anne" * 4, b"bert" * 4


def end(role: Role, node: bytes, key: bytes | None = KEY, port: Port = Port.BULK, **more: bytes) -> Handshake:
    return Handshake(Link(role, port), key, node, b"info of " + node, **more)


def give(to: Handshake, data: bytes) -> bytes:
    """Deliver bytes; what the end answers."""
    to.link.space()[: len(data)] = data
    to.link.filled(len(data))
    return to.advance()


def shake(client: Handshake, server: Handshake) -> None:
    data = client.start()
    assert server.start() == b""
    while data:
        data = give(client, give(server, data))


@pytest.mark.parametrize("port", Port)
@pytest.mark.parametrize("key", [KEY, None])
def test_two_who_know_the_key_know_each_other(port: Port, key: bytes | None) -> None:
    client, server = end(Role.CLIENT, ANNE, key, port), end(Role.SERVER, BERT, key, port)
    shake(client, server)
    assert client.done
    assert server.done
    assert (client.peer_id, client.peer_info) == (BERT, b"info of " + BERT)
    assert (server.peer_id, server.peer_info) == (ANNE, b"info of " + ANNE)
    if port is Port.BULK:
        give(server, client.link.send(Kind.GET, 1, bytes(32), 2))
        frame = server.link.receive()
        assert frame is not None
        assert frame.fields == [1, bytes(32), 2]


@pytest.mark.parametrize(("ours", "theirs"), [(KEY, b"another"), (KEY, None), (None, KEY)])
def test_a_stranger_is_told_nothing(ours: bytes | None, theirs: bytes | None) -> None:
    server = end(Role.SERVER, BERT, ours)
    with pytest.raises(AuthError):
        give(server, end(Role.CLIENT, ANNE, theirs).start())
    assert server.farewell == b""


def test_a_server_that_does_not_know_the_key_is_found_out() -> None:
    client = end(Role.CLIENT, ANNE)
    hello = client.start()
    impostor = end(Role.SERVER, BERT, b"another")
    impostor.link.rekey(receiving=handshake._derive(KEY, handshake._HELLO))  # it let the hello pass
    with pytest.raises(AuthError):
        give(client, give(impostor, hello))


def test_a_replayed_hello_leads_nowhere() -> None:
    client, server = end(Role.CLIENT, ANNE), end(Role.SERVER, BERT)
    hello = client.start()
    info = give(client, give(server, hello))
    again = end(Role.SERVER, BERT)
    assert give(again, hello)  # it cannot know yet
    with pytest.raises(AuthError):
        give(again, info)
    assert not again.done


def test_what_an_end_sent_cannot_be_turned_against_it() -> None:
    client, server = end(Role.CLIENT, ANNE), end(Role.SERVER, BERT)
    hello = client.start()
    with pytest.raises(AuthError):
        give(end_that_said_hello := client, hello)
    assert not end_that_said_hello.done
    welcome = give(server, hello)
    with pytest.raises(AuthError):
        give(server, welcome)


def test_a_frame_of_another_connection_is_refused() -> None:
    one, two = (end(Role.CLIENT, ANNE), end(Role.SERVER, BERT)), (end(Role.CLIENT, ANNE), end(Role.SERVER, BERT))
    welcomes = [give(server, client.start()) for client, server in (one, two)]
    with pytest.raises(AuthError):
        give(one[0], welcomes[1])


def test_a_node_does_not_talk_to_itself() -> None:
    client, server = end(Role.CLIENT, ANNE), end(Role.SERVER, ANNE)
    hello = client.start()
    with pytest.raises(ItselfError, match="own id"):
        give(server, hello)
    with pytest.raises(ItselfError, match="own id"):
        give(client, server.farewell)


def test_the_wrong_node_is_refused() -> None:
    client, server = end(Role.CLIENT, ANNE, expected=b"carl" * 4), end(Role.SERVER, BERT)
    with pytest.raises(ProtocolError, match="was expected"):
        give(client, give(server, client.start()))


def test_a_hello_for_the_other_port_is_refused() -> None:
    server = end(Role.SERVER, BERT, port=Port.CONTROL)
    with pytest.raises(ProtocolError, match="for the bulk port came to the control port"):
        give(server, end(Role.CLIENT, ANNE, port=Port.BULK).start())


@pytest.mark.parametrize(
    ("number", "value", "older_is_client"),
    [("PROTOCOL", 2, False), ("PLAN_VERSION", PLAN_VERSION + 1, False), ("PROTOCOL", 0, True)],
)
def test_another_version_is_named_on_both_sides(
    monkeypatch: pytest.MonkeyPatch, number: str, value: int, older_is_client: bool
) -> None:
    client, server = end(Role.CLIENT, ANNE), end(Role.SERVER, BERT)
    with monkeypatch.context() as patch:
        patch.setattr(handshake, number, value)
        hello = client.start()
    with pytest.raises(ProtocolError, match="upgrade " + ("the peer" if older_is_client else "this host")) as at_server:
        give(server, hello)
    assert str(value) in str(at_server.value)
    assert not isinstance(at_server.value, AuthError)
    with monkeypatch.context() as patch:
        patch.setattr(handshake, number, value)
        with pytest.raises(ProtocolError, match="upgrade " + ("this host" if older_is_client else "the peer")):
            give(client, server.farewell)
    assert client.link.state is State.CLOSED


def test_another_version_is_not_told_to_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = end(Role.CLIENT, ANNE, b"another"), end(Role.SERVER, BERT)
    with monkeypatch.context() as patch:
        patch.setattr(handshake, "PROTOCOL", 2)
        hello = client.start()
    with pytest.raises(AuthError):
        give(server, hello)
    assert server.farewell == b""


def test_what_an_end_says_of_itself_is_bounded() -> None:
    Handshake(Link(Role.CLIENT, Port.BULK), KEY, ANNE, bytes(MAX_INFO))
    with pytest.raises(ProtocolError, match="at most"):
        Handshake(Link(Role.CLIENT, Port.BULK), KEY, ANNE, bytes(MAX_INFO + 1))


def test_the_largest_introduction_passes() -> None:
    client = Handshake(Link(Role.CLIENT, Port.BULK), KEY, ANNE, b"c" * MAX_INFO)
    server = Handshake(Link(Role.SERVER, Port.BULK), KEY, BERT, b"s" * MAX_INFO)
    shake(client, server)
    assert (client.peer_info, server.peer_info) == (b"s" * MAX_INFO, b"c" * MAX_INFO)


def test_the_key_does_not_show() -> None:
    assert "cluster" not in repr(end(Role.CLIENT, ANNE))
