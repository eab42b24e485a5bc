from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.origin.conftest import model
from tests.servers.nginx import NginxServer
from tests.servers.proxy import FaultProxy
from tests.servers.s3 import S3Server
from weightcache.core.layout import parse_header
from weightcache.core.source import parse_source
from weightcache.errors import SourceDenied
from weightcache.origin import Origins
from weightcache.origin.base import read_whole

Make = Callable[..., Origins]


async def test_a_small_file_leaves_its_origin_once(s3: S3Server, origins: Make) -> None:
    body = model(10_000)
    s3.put("bkt", "small.safetensors", body)
    ours = origins()
    (entry,) = (await ours.resolve(parse_source("s3://bkt/small.safetensors"))).files
    s3.proxy.reset_counts()
    head = await ours.head(entry)
    assert head == body[: len(body) - 10_000]
    assert [tensor.name for tensor in parse_header(head).tensors] == ["w"]
    assert await read_whole(ours, entry, 0, len(head)) == head
    assert await read_whole(ours, entry, len(head), entry.size) == body[len(head) :]
    assert b"".join([bytes(piece) async for piece in ours.stream(entry)]) == body
    assert await ours.head(entry) == head
    assert (s3.proxy.requests, s3.proxy.egress) == (1, len(body))


@pytest.mark.parametrize("padding", [0, 700_000])
async def test_a_large_file_leaves_its_origin_once(padding: int, s3: S3Server, origins: Make) -> None:
    body = model(2 << 20, padding=padding)
    s3.put("bkt", "large.safetensors", body)
    ours = origins()
    (entry,) = (await ours.resolve(parse_source("s3://bkt/large.safetensors"))).files
    s3.proxy.reset_counts()
    head = await ours.head(entry)
    assert head == body[: len(body) - (2 << 20)]
    assert s3.proxy.requests == (2 if padding else 1)
    assert await read_whole(ours, entry, 0, len(head)) == head
    assert await read_whole(ours, entry, len(head), 1 << 20) == body[len(head) : 1 << 20]
    assert await read_whole(ours, entry, 1 << 20, entry.size) == body[1 << 20 :]
    assert s3.proxy.egress == len(body)


async def test_what_is_no_safetensors_has_no_head(s3: S3Server, origins: Make) -> None:
    ours = origins()
    for key, body in {"zeros.bin": bytes(1000), "short.bin": b"{}", "empty.bin": b""}.items():
        s3.put("bkt", key, body)
        (entry,) = (await ours.resolve(parse_source(f"s3://bkt/{key}"))).files
        assert await ours.head(entry) is None


async def test_the_head_of_what_has_no_ranges_costs_no_second_transfer(
    nginx: NginxServer, served: Path, origins: Make
) -> None:
    body = model(64 << 20)
    (served / "streamed.safetensors").write_bytes(body)
    ours = origins()
    with FaultProxy(nginx.port) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/norange/streamed.safetensors"
        (entry,) = (await ours.resolve(parse_source(url))).files
        assert not entry.ranged
        assert await ours.head(entry) == body[: len(body) - (64 << 20)]
        # The probe and the head were each broken off: what was under way in buffers is all they cost.
        assert proxy.egress < len(body) // 2
    (served / "streamed.safetensors").unlink()


async def test_the_kept_starts_are_bounded(s3: S3Server, origins: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightcache.origin.router.KEPT", 1 << 20)
    bodies = {f"kept-{i}.bin": random.Random(i).randbytes(400_000) for i in range(5)}
    ours = origins()
    entries = {}
    for key, body in bodies.items():
        s3.put("bkt", key, body)
        (entries[key],) = (await ours.resolve(parse_source(f"s3://bkt/{key}"))).files
        await ours.head(entries[key])
    s3.proxy.reset_counts()
    for key, body in bodies.items():
        assert await read_whole(ours, entries[key], 0, 1000) == body[:1000]
    assert s3.proxy.egress == 1000  # of the first only: the other four were kept


async def test_every_call_is_held_against_the_allow_list(s3: S3Server, origins: Make) -> None:
    s3.put("bkt", "a/x", b"x")
    s3.put("bkt", "ab", b"x")
    ours = origins(allow=("s3://bkt/a",))
    assert (await ours.resolve(parse_source("s3://bkt/a/x"))).size == 1
    (outside,) = (await origins().resolve(parse_source("s3://bkt/ab"))).files
    for call in (
        ours.resolve(outside.source),
        ours.head(outside),
        read_whole(ours, outside, 0, 1),
        anext(ours.stream(outside)),
    ):
        with pytest.raises(SourceDenied, match=r"s3://bkt/ab: not allow-listed.*origin\.allow"):
            await call


def test_a_process_pays_only_for_the_origins_it_uses() -> None:
    script = (
        "import sys, weightcache.origin; from weightcache.config import OriginConfig;"
        "weightcache.origin.Origins(OriginConfig());"
        "print([name for name in ('aiohttp', 'obstore', 'huggingface_hub') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
