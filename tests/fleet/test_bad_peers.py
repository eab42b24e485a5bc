"""Peers that lie or fail: every load ends with the right bytes, says who failed it, and that peer is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import pytest

from tests.fleet.bad_peer import BadPeer, read
from tests.fleet.daemons import Daemon, Json, from_peers
from tests.fleet.weights import tensors
from tests.servers.loop import wait_until
from tests.servers.s3 import S3Server
from weightcache.errors import UnknownBlob

MIB = 1 << 20
_numbers = count()


@dataclass
class World:
    """An honest host that knows the files; a victim that knows only liars, and one that knows the honest host, too."""

    s3: S3Server
    honest: Daemon
    lonely: Daemon
    guarded: Daemon

    def publish(self) -> tuple[str, bytes]:
        """A new file that the honest host has; its source and bytes."""
        number = next(_numbers)
        data = tensors(6, MIB, seed=number)
        self.s3.put("fleet", f"lies/{number}.safetensors", data)
        source = f"s3://fleet/lies/{number}.safetensors"
        self.honest.pull(source)
        self.s3.proxy.reset_counts()
        return source, data


@pytest.fixture(scope="module")
def world(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root, env = tmp_path_factory.mktemp("lies"), s3_server.env()
    with (
        Daemon(root / "honest", env=env) as honest,
        Daemon(root / "lonely", env=env) as lonely,
        Daemon(root / "guarded", env=env, peers=(honest,)) as guarded,
    ):
        guarded.meets(honest)
        yield World(s3_server, honest, lonely, guarded)
        s3_server.proxy.heal()


def row(host: Daemon, peer: BadPeer) -> Json:
    """What ``weightcache peers`` says of a peer."""
    with host.client() as client:
        (found,) = [line for line in client.peers() if line["address"] == peer.address]
    return found


def reasons(report: Json, peer: BadPeer) -> str:
    return " | ".join(line for line in report["fallbacks"] if f"peer {peer.address}:" in line)


# What the peer does, and words of the reason that the report gives.
LIES = {
    "wrong bytes": "mismatch",
    "own id": "mismatch",
    "wrong length": "length",
    "garbage": "garbage",
    "stranger": "garbage",
    "no manifest": "manifest",
    "other manifest": "another blob's",
    "no snapshot": "snapshot",
    "climbing": "not a path a snapshot may hold",
    "absolute": "not a path a snapshot may hold",
    "foreign": "no file of this source",
    "local": "no file of this source",
    "odd": "malformed",
}


# Lies about chunks, when an honest peer has them, too: then nothing comes from the origin.
GUARDED = ["wrong bytes", "own id", "wrong length", "garbage", "stranger", "climbing"]
CASES = [*((lie, "origin") for lie in LIES), *((lie, "peer") for lie in GUARDED)]


@pytest.mark.parametrize(("lie", "elsewhere"), CASES)
def test_a_liar_changes_no_byte_and_is_not_asked_again(world: World, lie: str, elsewhere: str) -> None:
    (source, data), (second, more) = world.publish(), world.publish()
    victim = world.lonely if elsewhere == "origin" else world.guarded
    with BadPeer(lie) as peer:
        peer.copy(world.honest, source, data)
        peer.copy(world.honest, second, more)
        peer.meet(victim)

        report = victim.pull(source)

        assert read(report) == data
        assert LIES[lie] in reasons(report, peer)
        assert (report["bytes_by_source"]["origin"] > 0) is (elsewhere == "origin")
        shown = row(victim, peer)
        assert shown["state"] == "resting"
        assert shown["resting_seconds"] > 500
        assert LIES[lie] in shown["why"]

        before = peer.asked.copy()
        report = victim.pull(second)
        assert read(report) == more
        assert peer.address not in report["bytes_by_source"]["peer"]
        assert peer.asked - before == {}
        assert reasons(report, peer)  # why it did not come from there


@pytest.mark.parametrize(("fault", "word"), [("silence", "stalled"), ("reset", "reset")])
@pytest.mark.parametrize("elsewhere", ["origin", "peer"])
def test_a_peer_that_fails_is_left_alone_and_then_tried_with_care(
    world: World, fault: str, word: str, elsewhere: str
) -> None:
    (source, data), (second, more) = world.publish(), world.publish()
    victim = world.lonely if elsewhere == "origin" else world.guarded
    with BadPeer(fault) as peer:
        peer.copy(world.honest, source, data)
        peer.copy(world.honest, second, more)
        peer.meet(victim)

        report = victim.pull(source)
        assert read(report) == data
        assert word in reasons(report, peer)
        assert "left alone" in reasons(report, peer)

        before = peer.asked["get"]
        report = victim.pull(second)
        assert read(report) == more
        assert peer.asked["get"] - before <= 2  # it rests; when it is tried again, then with one chunk


def test_a_peer_that_answers_no_call_costs_one_wait(world: World) -> None:
    (source, data), (second, more) = world.publish(), world.publish()
    with BadPeer("mute") as peer:
        peer.copy(world.honest, source, data)
        peer.meet(world.lonely)

        report = world.lonely.pull(source)
        assert read(report) == data
        assert "did not answer 'find'" in reasons(report, peer)
        assert row(world.lonely, peer)["state"] == "resting"

        before = peer.asked.copy()
        report = world.lonely.pull(second)
        assert read(report) == more
        assert peer.asked - before == {}
        assert report["seconds"] < 1.5


@pytest.mark.parametrize("word", ["missing", "unknown"])
def test_a_peer_without_what_it_announced_is_named(world: World, word: str) -> None:
    source, data = world.publish()
    with BadPeer(word) as peer:
        peer.copy(world.honest, source, data)
        peer.meet(world.lonely)
        report = world.lonely.pull(source)
        assert read(report) == data
        assert word in reasons(report, peer)
        assert peer.asked["get"] <= 7  # nothing twice


def test_a_peer_that_is_always_busy_is_given_up(world: World) -> None:
    source, data = world.publish()
    with BadPeer("busy") as peer:
        peer.copy(world.honest, source, data)
        peer.meet(world.lonely)
        report = world.lonely.pull(source)
        assert read(report) == data
        assert "busy" in reasons(report, peer)
        assert report["seconds"] < 30


def test_forged_ids_do_not_outlive_the_origins_digest(world: World) -> None:
    """A manifest that is all wrong, and bytes to match: only the origin can tell, and nobody else is blamed for it."""
    source, data = world.publish()
    with BadPeer("wrong ids") as liar, BadPeer() as honest:
        liar.copy(world.honest, source, data)
        honest.copy(world.honest, source, data, holes=frozenset({3}))
        liar.meet(world.lonely)
        honest.meet(world.lonely)

        with world.lonely.client() as client:
            client.pull(source)
            wait_until(lambda: row(world.lonely, liar)["state"] == "resting", 20, "the lie to be found")
            with pytest.raises(UnknownBlob):
                client.path(source)

        before = liar.asked.copy()
        report = world.lonely.pull(source)
        assert read(report) == data
        assert "is not what its origin has" in reasons(report, liar)
        assert report["bytes_by_source"]["peer"].keys() == {honest.address}
        assert row(world.lonely, honest)["state"] == "connected"
        assert liar.asked - before == {}


def test_forged_ids_are_found_when_the_origin_is_read(world: World) -> None:
    """The forger has not all of it: what the origin gives for the rest contradicts him."""
    source, data = world.publish()
    with BadPeer("wrong ids") as liar:
        liar.copy(world.honest, source, data, holes=frozenset({3}))
        liar.meet(world.lonely)
        with world.lonely.client() as client:
            with pytest.raises(Exception, match="is not what its origin has; load it again") as failure:
                client.pull(source)
            assert liar.address in str(failure.value)
            report = client.pull(source)
        assert read(report) == data
        assert from_peers(report) == 0


def test_a_manifest_of_a_file_that_is_here_already_is_not_believed(world: World) -> None:
    """Ids that name bytes on this very disk would bring another file's content, and not move a byte."""
    (source, data), (other, more) = world.publish(), world.publish()
    world.lonely.pull(other)
    wait_until(lambda: _settled(world.lonely, other), 20, "the other file to be settled")
    with BadPeer("wrong ids") as liar:
        liar.copy(world.honest, source, data)
        liar.claim(source, more)
        liar.meet(world.lonely)
        report = world.lonely.pull(source)
        assert read(report) == data
        assert "is not what its origin has" in reasons(report, liar)


def _settled(host: Daemon, source: str) -> bool:
    with host.client() as client:
        return any(blob["durable"] for blob in client.ls()["blobs"] if source.endswith(f"/{blob['name']}"))
