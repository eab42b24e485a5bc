from __future__ import annotations

import pytest

from weightcache.core.source import parse_source
from weightcache.errors import ConfigError, SourceDenied
from weightcache.origin.policy import Policy


def admits(allow: list[str], source: str) -> bool:
    try:
        Policy(allow).admit(parse_source(source))
    except SourceDenied:
        return False
    return True


@pytest.mark.parametrize(
    ("allow", "admitted", "refused"),
    [
        (
            ["s3://bucket/a"],
            ["s3://bucket/a", "s3://bucket/a/", "s3://bucket/a/x/y", "S3://bucket//a/x"],
            ["s3://bucket/ab", "s3://bucket", "s3://bucket2/a", "gs://bucket/a", "s3://bucket/a@b", "hf://bucket/a"],
        ),
        (["s3://bucket/a/"], ["s3://bucket/a/", "s3://bucket/a/x"], ["s3://bucket/a", "s3://bucket/ab"]),
        (["s3://bucket"], ["s3://bucket", "s3://bucket/x"], ["s3://bucket-2/x"]),
        (["S3://"], ["s3://any/thing"], ["gs://any/thing"]),
        (
            ["https://host.example"],
            ["https://host.example/x", "https://HOST.example/x?signed=1"],
            ["https://host.example.evil/x", "https://host.example:8443/x", "http://host.example/x", "https://h/x"],
        ),
        (["https://h/a b"], ["https://h/a%20b", "https://h/a%20b/c"], ["https://h/a"]),
        (["http://10.0.0.1/models/"], ["http://10.0.0.1/models/x"], ["http://10.0.0.1/x", "http://127.0.0.1/x"]),
        (["hf://org"], ["hf://org/name", "hf://org/name@v1/file"], ["hf://organ/name"]),
        (
            ["hf://org/name"],
            ["hf://org/name", "hf://org/name@v1", "hf://org/name@refs%2Fpr%2F1/file", "hf://org/name/file"],
            ["hf://org/name2", "hf://org/nam"],
        ),
        (["hf://org/name@v1"], ["hf://org/name@v1", "hf://org/name@v1/f"], ["hf://org/name@v10", "hf://org/name"]),
    ],
)
def test_a_prefix_ends_at_a_boundary(allow: list[str], admitted: list[str], refused: list[str]) -> None:
    assert [source for source in admitted if not admits(allow, source)] == []
    assert [source for source in refused if admits(allow, source)] == []


def test_without_a_list_every_remote_scheme_is_admitted_but_plain_http_only_of_this_machine() -> None:
    for source in ("s3://any/thing", "hf://org/name", "https://host/x", "http://127.0.0.1:80/x", "http://[::1]/x"):
        assert admits([], source)
    assert admits([], "http://localhost:8000/x")
    for source in ("http://host/x", "http://10.0.0.1/x", "http://localhost.evil/x", "http://127.0.0.1.evil/x"):
        assert not admits([], source)


@pytest.mark.parametrize("prefix", ["bucket/a", "ftp://host", "file:///models", "s3:/bucket", "https://u:p@host/"])
def test_a_prefix_that_could_admit_nothing_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"origin\.allow"):
        Policy([prefix])
