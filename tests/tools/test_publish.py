"""publish, as a user runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.tools.conftest import Cli, answer
from weightcache.core.published import SUFFIX

SIZE = 3 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "one.bin"
    path.parent.mkdir()
    path.write_bytes(os.urandom(SIZE))
    return path


def test_beside_the_object_once_and_again(cli: Cli, file: Path) -> None:
    row = answer(cli("publish", f"file://{file}", "--json"))
    assert (row["path"], row["size"], row["state"]) == ("one.bin", SIZE, "published")
    assert row["to"] == f"file://{file}{SUFFIX}"
    beside = file.with_name(file.name + SUFFIX)
    assert beside.stat().st_size == row["bytes"]
    assert "already published, the same" in cli("publish", f"file://{file}").stdout
    beside.write_bytes(b"something else")
    refused = cli("publish", f"file://{file}")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no manifest" in refused.stderr
    assert "--force" in refused.stderr
    assert "published anew" in cli("publish", f"file://{file}", "--force").stdout
    assert beside.stat().st_size == row["bytes"]


def test_to_a_file_and_a_directory(cli: Cli, file: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept" / "one"
    assert answer(cli("publish", f"file://{file}", "--to", str(target), "--json"))["to"] == str(target)
    assert "already published" in cli("publish", f"file://{file}", "--to", str(target)).stdout
    target.write_bytes(b"other")
    assert "--force" in cli("publish", f"file://{file}", "--to", str(target)).stderr
    (file.parent / "two.bin").write_bytes(os.urandom(SIZE))
    (file.parent / "small.json").write_bytes(b"{}")
    done = cli("publish", f"file://{file.parent}", "--to", str(tmp_path / "many"), "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["state"] for row in rows] == ["published"] * 2
    assert {path.name for path in (tmp_path / "many").iterdir()} == {f"one.bin{SUFFIX}", f"two.bin{SUFFIX}"}
    # The bytes are the same wherever they go.
    cli("publish", f"file://{file.parent}")
    for path in (tmp_path / "many").iterdir():
        assert path.read_bytes() == (file.parent / path.name).read_bytes()


def test_one_that_fails_is_told_and_the_others_are_published(cli: Cli, file: Path) -> None:
    (file.parent / "two.bin").write_bytes(os.urandom(SIZE))
    (file.parent / f"one.bin{SUFFIX}").write_bytes(b"other")
    done = cli("publish", f"file://{file.parent}", "--json")
    rows = {row["path"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 2
    assert (rows["one.bin"]["error"], rows["two.bin"]["state"]) == ("SourceError", "published")


def test_pull_says_what_is_here_already(cli: Cli, file: Path) -> None:
    half = file.read_bytes()
    half = half[: 2 * len(half) // 3]
    other = file.with_name("other.bin")
    other.write_bytes(half * 5)  # 10 MiB
    third = file.with_name("third.bin")
    third.write_bytes(other.read_bytes()[: 8 << 20] + os.urandom(2 << 20))
    answer(cli("publish", f"file://{third}", "--json"))
    cli("evict", "--all")
    cli("pull", f"file://{other}")
    report = answer(cli("pull", f"file://{third}", "--json"))
    assert report["bytes_here"] == 8 << 20
    assert report["bytes_by_source"] == {"local": 8 << 20, "peer": {}, "origin": 2 << 20}
    cli("evict", f"file://{third}")
    assert "80% is here already" in cli("pull", f"file://{third}").stdout
