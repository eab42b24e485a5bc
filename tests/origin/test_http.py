from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers.liar import Liar
from tests.servers.nginx import NginxServer
from tests.servers.proxy import FaultProxy
from weightcache.core.source import parse_source
from weightcache.errors import OriginUnavailable, SourceChanged, SourceDenied, SourceError, SourceNotFound
from weightcache.origin import Origins
from weightcache.origin.base import read_whole
from weightcache.tools.local import free_ports

Make = Callable[..., Origins]
BODY = random.Random(3).randbytes(3_000_001)


@pytest.fixture(autouse=True)
def body(served: Path) -> Path:
    path = served / "big model.bin"
    path.write_bytes(BODY)
    return path


async def test_ranges_of_a_real_server(nginx: NginxServer, origins: Make) -> None:
    ours = origins()
    snapshot = await ours.resolve(parse_source(nginx.url("big%20model.bin")))
    (entry,) = snapshot.files
    assert (snapshot.single, entry.path, entry.size, entry.ranged) == (True, "big model.bin", len(BODY), True)
    assert entry.version.startswith("etag:")
    for begin, end in ((0, len(BODY)), (0, 1), (len(BODY) - 1, len(BODY)), (1_000_000, 2_500_000)):
        assert await read_whole(ours, entry, begin, end) == BODY[begin:end]


@pytest.mark.parametrize(
    ("mood", "kind", "ranged"),
    [
        ("plain", "etag", True),
        ("notime", "etag", True),
        ("norange", "etag", False),
        ("notag", "modified", True),
        ("nothing", "once", False),
        ("nothing-norange", "once", False),
    ],
)
async def test_what_a_server_states_decides_how_it_is_read(
    mood: str, kind: str, ranged: bool, nginx: NginxServer, origins: Make
) -> None:
    ours = origins()
    source = parse_source(nginx.url("big%20model.bin", mood))
    (entry,) = (await ours.resolve(source)).files
    assert (entry.version.partition(":")[0], entry.ranged, entry.size) == (kind, ranged, len(BODY))
    parts = [bytes(piece) async for piece in ours.stream(entry)]
    assert b"".join(parts) == BODY
    assert max(map(len, parts)) <= 1 << 20
    (again,) = (await ours.resolve(source)).files
    assert (again.blob == entry.blob) == (kind != "once")  # nothing may take two unknown states for one


@pytest.mark.parametrize("mood", ["plain", "notime", "notag", "norange"])
async def test_a_file_replaced_underneath_is_an_error(mood: str, nginx: NginxServer, origins: Make, body: Path) -> None:
    ours = origins()
    (entry,) = (await ours.resolve(parse_source(nginx.url("big%20model.bin", mood)))).files
    body.write_bytes(bytes(len(BODY)))
    os.utime(body, (1_900_000_000, 1_900_000_000))
    with pytest.raises(SourceChanged, match=r"big%20model\.bin changed"):
        await (read_whole(ours, entry, 5, 10) if entry.ranged else anext(ours.stream(entry)))


async def test_a_file_that_grows_while_it_is_streamed_once_is_an_error(
    nginx: NginxServer, origins: Make, body: Path
) -> None:
    ours = origins()
    (entry,) = (await ours.resolve(parse_source(nginx.url("big%20model.bin", "nothing")))).files
    body.write_bytes(BODY + b"more")
    with pytest.raises(SourceChanged):
        _ = [piece async for piece in ours.stream(entry)]


async def test_an_empty_file(nginx: NginxServer, origins: Make, served: Path) -> None:
    (served / "empty.bin").write_bytes(b"")
    ours = origins()
    (entry,) = (await ours.resolve(parse_source(nginx.url("empty.bin")))).files
    assert entry.size == 0
    assert await ours.head(entry) is None


async def test_statuses_become_errors_that_say_what_to_do(nginx: NginxServer, origins: Make) -> None:
    ours = origins()
    signed = "?X-Amz-Signature=verysecret"
    for mood, error in (("gone", SourceNotFound), ("private", SourceDenied), ("broken", OriginUnavailable)):
        with pytest.raises(error) as failed:
            await ours.resolve(parse_source(nginx.url("big%20model.bin", mood) + signed))
        assert "big%20model.bin" in str(failed.value)
        assert "verysecret" not in str(failed.value)
    with pytest.raises(OriginUnavailable) as busy:
        await ours.resolve(parse_source(nginx.url("x", "busy")))
    assert busy.value.retry_after == 7.0
    with pytest.raises(SourceError, match="name one file"):
        await ours.resolve(parse_source(nginx.url("")))
    (port,) = free_ports(1)
    with pytest.raises(OriginUnavailable, match="refused"):
        await ours.resolve(parse_source(f"http://127.0.0.1:{port}/model.bin{signed}"))


async def test_redirects(nginx: NginxServer, origins: Make, liar: Liar) -> None:
    ours = origins()
    (entry,) = (await ours.resolve(parse_source(nginx.url("big%20model.bin", "moved")))).files
    assert str(entry.source) == nginx.url("big%20model.bin", "moved")
    assert await read_whole(ours, entry, 10, 20) == BODY[10:20]
    with pytest.raises(SourceError, match="more than 5 times"):
        await ours.resolve(parse_source(nginx.url("x", "loop")))
    with pytest.raises(SourceDenied, match=r"elsewhere\.invalid/: plain http"):
        await ours.resolve(parse_source(nginx.url("x", "away")))
    liar.lie = "downgrade"
    with pytest.raises(SourceError, match="no plain web address"):
        await ours.resolve(parse_source(liar.url()))
    narrow = origins(allow=(nginx.url("", "moved"),))
    with pytest.raises(SourceDenied, match=r"/plain/.*not allow-listed"):
        await narrow.resolve(parse_source(nginx.url("big%20model.bin", "moved")))


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        ("tag", SourceChanged),
        ("weak", SourceChanged),
        ("no-tag", SourceChanged),
        ("total", SourceChanged),
        ("whole", SourceError),
        ("shifted", SourceError),
        ("no-range", SourceError),
        ("gzip", SourceError),
        ("short", OriginUnavailable),
    ],
)
async def test_a_lie_is_never_served(lie: str, error: type[Exception], liar: Liar, origins: Make) -> None:
    ours = origins()
    (entry,) = (await ours.resolve(parse_source(liar.url()))).files
    assert await read_whole(ours, entry, 1000, 51_000) == liar.body[1000:51_000]
    assert liar.seen[-1]["if-match"] == '"truth"'
    liar.lie = lie
    with pytest.raises(error, match=r"model\.safetensors"):
        await read_whole(ours, entry, 1000, 51_000)


async def test_more_than_was_asked_for_is_cut_off(liar: Liar, origins: Make) -> None:
    ours = origins()
    (entry,) = (await ours.resolve(parse_source(liar.url()))).files
    liar.lie = "long"
    assert await read_whole(ours, entry, 1000, 51_000) == liar.body[1000:51_000]


async def test_a_weak_tag_is_compared_though_it_cannot_be_sent(liar: Liar, origins: Make) -> None:
    ours = origins()
    liar.lie = "weak"
    (entry,) = (await ours.resolve(parse_source(liar.url()))).files
    assert entry.version == "weak:truth"
    assert await read_whole(ours, entry, 0, 100) == liar.body[:100]
    liar.tag = '"another"'
    with pytest.raises(SourceChanged):
        await read_whole(ours, entry, 0, 100)


async def test_a_size_that_is_not_stated_is_refused(liar: Liar, origins: Make) -> None:
    liar.lie = "no-length"
    with pytest.raises(SourceError, match="Content-Length"):
        await origins().resolve(parse_source(liar.url()))


async def test_stalls_and_resets_are_retryable(nginx: NginxServer, origins: Make) -> None:
    ours = origins(timeout=0.3)
    with FaultProxy(nginx.port) as proxy:
        (entry,) = (await ours.resolve(parse_source(f"http://127.0.0.1:{proxy.port}/plain/big%20model.bin"))).files
        for spoil in (lambda: proxy.stall("big", after=100_000), lambda: proxy.reset("big", after=100_000)):
            spoil()
            with pytest.raises(OriginUnavailable):
                await asyncio.wait_for(read_whole(ours, entry, 0, entry.size), 10)
            proxy.heal()
            spoil()
            with pytest.raises(OriginUnavailable):
                _ = [piece async for piece in ours.stream(entry)]
            proxy.heal()
        assert await read_whole(ours, entry, 0, entry.size) == BODY
