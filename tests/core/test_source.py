"""A source has one spelling, and nothing a user writes breaks more than its own command."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.core.strategies import sources
from weightcache.core.snapshot import check_path, folder_name
from weightcache.core.source import MAX_SOURCE, Source, is_source, parse_source
from weightcache.errors import SourceError


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("S3://Bucket/a/b.safetensors", "s3://Bucket/a/b.safetensors"),
        ("s3://bucket", "s3://bucket/"),
        ("s3://bucket/a//b/", "s3://bucket/a/b/"),
        ("gs://bucket/mit leer.bin", "gs://bucket/mit%20leer.bin"),
        ("az://container/100%25?#", "az://container/100%25%3F%23"),
        ("hf://org/name", "hf://org/name@main"),
        ("hf://org/na.me-1@v1.0/unet/x.safetensors", "hf://org/na.me-1@v1.0/unet/x.safetensors"),
        ("hf://org/name@refs%2Fpr%2F1/x", "hf://org/name@refs%2Fpr%2F1/x"),
        ("https://Host.Example:8443/a?X-Sig=%2f", "https://host.example:8443/a?X-Sig=%2f"),
        ("https://host/a#fragment", "https://host/a"),
        ("file:///srv/models/", "file:///srv/models/"),
    ],
)
def test_each_has_one_spelling(written: str, canonical: str) -> None:
    assert str(parse_source(written)) == canonical
    assert is_source(written)


@given(sources)
def test_what_is_spelled_is_read_back_the_same(source: Source) -> None:
    spelled = str(source)
    if len(spelled) <= MAX_SOURCE:
        assert parse_source(spelled) == source
        assert spelled.isprintable()


@given(
    st.text(st.characters())
    | st.builds("{}://{}".format, st.sampled_from(["s3", "hf", "https", "file", "az"]), st.text(st.characters()))
)
@example("s3://bucket/\ud800")
@example("s3://bucket/" + "é" * 4000)
@example("https://[::1/x")
@example("https://user:password@host:port/x")
@example("https://a\u2100b/")
@example("hf://../name")
@example("hf://org/name@%2e%2e/x")
@example("s3://bucket/%00")
@example("file:///%2e%2e/etc/passwd")
def test_whatever_is_written_gives_a_source_or_a_source_error(text: str) -> None:
    try:
        source = parse_source(text)
    except SourceError:
        return
    assert parse_source(str(source)) == source
    assert not {"..", "."} & set(source.path.split("/"))


@pytest.mark.parametrize(
    "text", ["hf://org", "hf://a/../b", "hf://a--b/c", "hf://模/型", "hf://o/n@../x", "s3://b@d/x", "x"]
)
def test_what_names_no_place_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match=r"^'"):
        parse_source(text)


@pytest.mark.parametrize("text", ["s3://x", "az://c/k", f"gs://{'b' * 256}/k"])
def test_how_long_a_buckets_name_is(text: str) -> None:
    with pytest.raises(SourceError, match="2 to 255"):
        parse_source(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@host/x",
        "https://user:hunter2@host:notaport/x",
        "http://hunter2@host/\n",
        "ftp://user:hunter2@host/x",
        "s3://user:hunter2@bucket/x",
        "https://host/%0a?token=hunter2",
        "https:///?token=hunter2",
    ],
)
def test_no_error_repeats_a_secret(text: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_source(text)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in parse_source("https://host/x?token=hunter2").public


def test_a_tree_and_its_children() -> None:
    tree = parse_source("s3://bucket/models/flux/")
    assert tree.is_tree
    assert str(tree.child("vae/config.json")) == "s3://bucket/models/flux/vae/config.json"
    assert str(parse_source("hf://org/name").at("abc").child("a b")) == "hf://org/name@abc/a%20b"
    assert str(parse_source("s3://bucket/models").child("x")) == "s3://bucket/models/x"
    assert not parse_source("s3://bucket/a").is_tree


@given(sources, sources)
def test_a_folder_is_one_directory_that_a_filesystem_takes_and_no_other_sources(one: Source, two: Source) -> None:
    name = folder_name(one)
    assert check_path(name) == name
    assert "/" not in name
    assert len(name.encode()) <= 255
    if str(one) != str(two) and (one.scheme, one.authority) != ("hf", two.authority):
        assert folder_name(two) != name


def test_folders_of_names_that_are_long_or_not_ascii() -> None:
    assert folder_name(parse_source("hf://org/name@main")) == "models--org--name"
    for path in ("模型" * 60, "a" * 1000):
        assert len(folder_name(parse_source(f"s3://bucket/{path}")).encode()) <= 255
    assert len(folder_name(parse_source(f"hf://{'o' * 96}/{'n' * 96}"))) <= 255
