"""Peers on a real LAN find each other, and notice who leaves and who dies."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.directory.conftest import Peer
from weightcache.directory.base import Member
from weightcache.directory.lan import LanDirectory, cluster_tag
from weightcache.errors import ConfigError

Lan = Callable[..., Peer]
KEY = "a key of sixteen bytes or more"


def test_peers_find_each_other_and_notice_a_goodbye_and_a_crash(lan: Lan) -> None:
    one, two, three = (lan(7000 + number, bytes([number]) * 32, KEY, ttl=3) for number in range(3))
    one.sees(two, three)
    two.sees(one, three)
    three.sees(one, two)
    two.leave()
    one.sees(three)
    three.sees(one)
    three.process.kill()
    one.sees()


def test_clusters_with_different_keys_keep_apart(lan: Lan) -> None:
    ours = [lan(7000, bytes([number]) * 32, KEY) for number in (1, 2)]
    others = [lan(7000, bytes([number]) * 32, "another key on the same LAN") for number in (3, 4)]
    keyless = [lan(7000, bytes([number]) * 32) for number in (5, 6)]
    for one, two in (ours, others, keyless):
        one.sees(two)
        two.sees(one)
    for one, two in (ours, others, keyless):
        one.leave()
        two.sees()
        assert two.ever == {one.me}


def test_a_daemon_that_restarts_elsewhere_is_found_again(lan: Lan) -> None:
    one, two = lan(7000, b"1" * 32, KEY), lan(7001, b"2" * 32, KEY)
    one.sees(two)
    two.leave()
    one.sees()
    again = lan(7002, b"2" * 32, KEY)
    one.sees(again)


def test_the_tag_tells_clusters_apart_and_nothing_else() -> None:
    key = b"0123456789abcdef0123456789abcdef"
    assert cluster_tag(key) == cluster_tag(key) != cluster_tag(None)
    assert len(cluster_tag(key)) == 16
    assert cluster_tag(key).encode() not in key


async def test_an_address_that_is_not_this_hosts_is_refused_with_the_way_out() -> None:
    directory = LanDirectory("192.0.2.1", "default", None)
    with pytest.raises(ConfigError, match=r"zeroconf cannot use 192\.0\.2\.1.*listen"):
        await directory.start(Member("192.0.2.1", 1, b"i" * 32), lambda view: None)
    await directory.close()
