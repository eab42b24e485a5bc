from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable
from urllib.parse import quote

import pytest

from tests.origin.conftest import model
from tests.servers.liar import Liar
from tests.servers.s3 import S3Server
from weightcache.core.source import parse_source
from weightcache.errors import OriginUnavailable, SourceChanged, SourceDenied, SourceError, SourceNotFound
from weightcache.origin import Origins
from weightcache.origin.base import read_whole, refused
from weightcache.origin.objects import stated_digest

Make = Callable[..., Origins]


async def test_an_object_is_one_file_and_its_ranges_are_its_bytes(s3: S3Server, origins: Make) -> None:
    body = random.Random(1).randbytes(9 << 20)
    tag = s3.put("bkt", "models/odd name #1%.bin", body)
    ours = origins()
    snapshot = await ours.resolve(parse_source("s3://bkt/models/odd name %231%25.bin"))
    (entry,) = snapshot.files
    assert snapshot.single
    assert (entry.path, entry.size, entry.version) == ("odd name #1%.bin", len(body), f"etag:{tag}")
    for begin, end in ((0, len(body)), (0, 1), (len(body) - 1, len(body)), (4_000_000, 9_000_000)):
        assert await read_whole(ours, entry, begin, end) == body[begin:end]
    assert b"".join([bytes(piece) async for piece in ours.stream(entry)]) == body
    assert max([len(piece) async for piece in ours.stream(entry)]) <= 1 << 20


async def test_the_etag_of_a_plain_object_is_its_md5(s3: S3Server, origins: Make) -> None:
    body = model()
    s3.put("bkt", "plain.safetensors", body)
    (entry,) = (await origins().resolve(parse_source("s3://bkt/plain.safetensors"))).files
    assert entry.digest == f"md5:{hashlib.md5(body).hexdigest()}"


def test_only_what_a_store_states_of_the_whole_object_is_a_digest() -> None:
    tag = "etag:" + "0f" * 16
    assert stated_digest("s3", tag, {}) == f"md5:{'0f' * 16}"
    assert stated_digest("s3", tag, {"x-amz-server-side-encryption": "AES256"}) == f"md5:{'0f' * 16}"
    assert stated_digest("s3", tag, {"x-amz-server-side-encryption": "aws:kms"}) == ""
    assert stated_digest("s3", tag, {"x-amz-server-side-encryption-customer-algorithm": "AES256"}) == ""
    assert stated_digest("s3", tag + "-2", {}) == ""
    assert (
        stated_digest("gs", tag, {"x-goog-hash": "crc32c=n03x6A==,md5=Ojk9c3dhfxgoKVVHYwFbHQ=="}) == "crc32c:9f4df1e8"
    )
    assert (
        stated_digest("az", tag, {"content-md5": "Ojk9c3dhfxgoKVVHYwFbHQ=="}) == "md5:3a393d7377617f182829554763015b1d"
    )
    assert stated_digest("gs", tag, {}) == stated_digest("az", tag, {}) == ""


async def test_a_prefix_is_every_object_below_it(s3: S3Server, origins: Make) -> None:
    files = {"model_index.json": b"{}", "unet/config.json": b"[]", "unet/deep/er/w.bin": b"w" * 5000, "vae/w.bin": b""}
    for name, body in files.items():
        s3.put("bkt", f"pipe/{name}", body)
    s3.put("bkt", "pipe-2/other.bin", b"not below pipe/")
    s3.put("bkt", "pipe/unet/", b"")  # what consoles leave where a directory was made
    ours = origins()
    for spelling in ("s3://bkt/pipe/", "s3://bkt/pipe"):
        snapshot = await ours.resolve(parse_source(spelling))
        assert not snapshot.single
        assert [entry.path for entry in snapshot.files] == sorted(files)
        for entry in snapshot.files:
            assert entry.size == len(files[entry.path])
            if entry.size:
                assert await read_whole(ours, entry, 0, entry.size) == files[entry.path]
    before = snapshot.revision
    s3.put("bkt", "pipe/unet/config.json", b"[1]")
    assert (await ours.resolve(parse_source("s3://bkt/pipe/"))).revision != before


async def test_an_object_that_is_replaced_is_an_error_that_names_it(s3: S3Server, origins: Make) -> None:
    old = s3.put("bkt", "replaced.bin", bytes(1000))
    ours = origins()
    (entry,) = (await ours.resolve(parse_source("s3://bkt/replaced.bin"))).files
    s3.put("bkt", "replaced.bin", b"x" * 1000)  # the same size: only the ETag tells
    with pytest.raises(SourceChanged, match=rf"s3://bkt/replaced\.bin changed.*{old}"):
        await read_whole(ours, entry, 0, 10)
    with pytest.raises(SourceChanged):
        _ = [piece async for piece in ours.stream(entry)]
    s3.delete("bkt", "replaced.bin")
    with pytest.raises(SourceNotFound):
        await read_whole(ours, entry, 0, 10)


async def test_what_is_not_there_is_named(s3: S3Server, origins: Make) -> None:
    s3.put("bkt", "there", b"x")
    ours = origins()
    with pytest.raises(SourceNotFound, match=r"s3://bkt/nowhere/model\.bin: neither an object nor anything below it"):
        await ours.resolve(parse_source("s3://bkt/nowhere/model.bin"))
    with pytest.raises(SourceNotFound, match="s3://no-such-bucket: no such bucket"):
        await ours.resolve(parse_source("s3://no-such-bucket/model.bin"))


async def test_wrong_credentials_say_what_to_set_and_never_what_was_set(
    s3: S3Server, origins: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("bkt", "private.bin", b"x")
    for name, value in s3.env(secret="a-wrong-secret").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SourceDenied, match="AWS_SECRET_ACCESS_KEY") as denied:
        await origins().resolve(parse_source("s3://bkt/private.bin"))
    assert "wrong-secret" not in str(denied.value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SourceDenied, match=r"no credentials found.*AWS_ACCESS_KEY_ID"):
        await origins().resolve(parse_source("s3://bkt/private.bin"))


def test_a_clock_that_is_wrong_is_no_matter_of_credentials() -> None:
    said = str(refused(parse_source("s3://bkt/model.bin"), 403, "RequestTimeTooSkewed"))
    assert "this host's clock is wrong" in said
    assert "AWS" not in said


class TestFaults:
    """Every fault is a retryable error within the time limit, of one request; the next attempt gets the bytes."""

    body = random.Random(7).randbytes(4 << 20)

    @pytest.fixture
    def stored(self, s3: S3Server) -> S3Server:
        s3.put("bkt", "faulty.bin", self.body)
        return s3

    async def attempt(self, stored: S3Server, ours: Origins, spoil: Callable[[], object], requests: int = 1) -> str:
        (entry,) = (await ours.resolve(parse_source("s3://bkt/faulty.bin"))).files
        spoil()
        stored.proxy.reset_counts()
        with pytest.raises(OriginUnavailable, match=r"s3://bkt/faulty\.bin") as failed:
            await asyncio.wait_for(read_whole(ours, entry, 1000, entry.size), 10)
        assert stored.proxy.requests == requests
        stored.proxy.heal()
        assert await read_whole(ours, entry, 1000, entry.size) == self.body[1000:]
        return str(failed.value)

    async def test_500_and_503(self, stored: S3Server, origins: Make) -> None:
        for status in (500, 503, 429):
            said = await self.attempt(stored, origins(), lambda status=status: stored.proxy.answer("faulty", status))
            assert str(status) in said

    async def test_a_reset_in_mid_body(self, stored: S3Server, origins: Make) -> None:
        await self.attempt(stored, origins(), lambda: stored.proxy.reset("faulty", after=1_000_000))

    async def test_a_stall_in_mid_body(self, stored: S3Server, origins: Make) -> None:
        await self.attempt(stored, origins(timeout=0.3), lambda: stored.proxy.stall("faulty", after=1_000_000))

    async def test_a_stall_before_the_answer(self, stored: S3Server, origins: Make) -> None:
        await self.attempt(stored, origins(timeout=0.3), lambda: stored.proxy.stall("faulty"))

    async def test_a_refused_connection(self, stored: S3Server, origins: Make) -> None:
        await self.attempt(stored, origins(), stored.proxy.refuse, requests=0)

    async def test_a_cancelled_read_leaves_the_origin_usable(self, stored: S3Server, origins: Make) -> None:
        ours = origins(timeout=60)
        (entry,) = (await ours.resolve(parse_source("s3://bkt/faulty.bin"))).files
        stored.proxy.reset_counts()
        stall = stored.proxy.stall("faulty", after=100_000)
        reading = asyncio.create_task(read_whole(ours, entry, 0, entry.size))
        await asyncio.to_thread(stall.struck.wait, 10)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        stored.proxy.release(stall)
        assert await read_whole(ours, entry, 0, 10) == self.body[:10]

    async def test_a_server_that_is_killed_and_started_again(self, stored: S3Server, origins: Make) -> None:
        ours = origins()
        (entry,) = (await ours.resolve(parse_source("s3://bkt/faulty.bin"))).files
        stored.stop()
        with pytest.raises(OriginUnavailable):
            await read_whole(ours, entry, 0, 10)
        await asyncio.to_thread(stored.start)
        assert await read_whole(ours, entry, 0, entry.size) == self.body


@pytest.mark.parametrize("name", ["a b+c.bin", "100% ü&=~'(x)!.bin", "deep/er/v1:2@3,4;5.bin"])
async def test_names_that_an_address_must_escape(name: str, s3: S3Server, origins: Make) -> None:
    body = random.Random(name).randbytes(10_000)
    s3.put("bkt", name, body)
    ours = origins()
    (entry,) = (await ours.resolve(parse_source(f"s3://bkt/{quote(name)}"))).files
    assert await read_whole(ours, entry, 100, 9_000) == body[100:9_000]


async def test_the_proxy_counts_exactly(s3: S3Server, origins: Make) -> None:
    s3.put("bkt", "counted.bin", bytes(100_000))
    ours = origins()
    (entry,) = (await ours.resolve(parse_source("s3://bkt/counted.bin"))).files
    s3.proxy.reset_counts()
    await asyncio.gather(*(read_whole(ours, entry, at, at + 10_000) for at in range(0, 100_000, 10_000)))
    assert (s3.proxy.egress, s3.proxy.requests) == (100_000, 10)


class TestLies:
    """What obstore itself would believe, and the same by signed addresses.

    The liar speaks just enough of each store's protocol.
    """

    stores = {
        "s3": {"AWS_ENDPOINT_URL": "{}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"},
        "s3 unsigned": {"AWS_ENDPOINT_URL": "{}", "AWS_SKIP_SIGNATURE": "true"},
        "gs": {"GOOGLE_BASE_URL": "{}", "GOOGLE_SKIP_SIGNATURE": "true"},
        "az": {"AZURE_ENDPOINT": "{}", "AZURE_SKIP_SIGNATURE": "true", "AZURE_STORAGE_ACCOUNT_NAME": "account"},
    }

    @pytest.fixture(params=list(stores))
    def scheme(self, request: pytest.FixtureRequest, liar: Liar, monkeypatch: pytest.MonkeyPatch) -> str:
        for name, value in self.stores[request.param].items():
            monkeypatch.setenv(name, value.format(f"http://127.0.0.1:{liar.port}"))
        return str(request.param).split()[0]

    async def test_honest_answers_of_every_store_are_believed(self, scheme: str, liar: Liar, origins: Make) -> None:
        ours = origins()
        (entry,) = (await ours.resolve(parse_source(f"{scheme}://bucket/model.safetensors"))).files
        assert (entry.version, entry.size) == ("etag:truth", len(liar.body))
        assert await read_whole(ours, entry, 7, 100_000) == liar.body[7:100_000]
        assert liar.seen[-1]["if-match"] == '"truth"'

    @pytest.mark.parametrize(
        ("lie", "error"),
        [
            ("tag", SourceChanged),
            ("weak", SourceChanged),
            ("no-tag", SourceError),
            ("total", SourceChanged),
            ("whole", SourceError),
            ("shifted", SourceError),
            ("no-range", SourceError),
            ("short", OriginUnavailable),
        ],
    )
    async def test_lies_are_not(self, scheme: str, lie: str, error: type[Exception], liar: Liar, origins: Make) -> None:
        ours = origins()
        (entry,) = (await ours.resolve(parse_source(f"{scheme}://bucket/model.safetensors"))).files
        liar.lie = lie
        with pytest.raises(error):
            await read_whole(ours, entry, 1000, 51_000)

    async def test_more_than_was_asked_for_is_cut_off(self, scheme: str, liar: Liar, origins: Make) -> None:
        ours = origins()
        (entry,) = (await ours.resolve(parse_source(f"{scheme}://bucket/model.safetensors"))).files
        liar.lie = "long"
        assert await read_whole(ours, entry, 1000, 51_000) == liar.body[1000:51_000]
