"""The commands on a store, by a node of their own: no daemon runs here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.tools.conftest import Cli, answer
from weightcache.core.layout import CHUNK
from weightcache.errors import SourceDenied, StoreError

SIZE = 9 << 20


@pytest.fixture
def source(tmp_path: Path, cli: Cli) -> str:
    """A file of 9 MiB that has been pulled."""
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(SIZE))
    report = answer(cli("pull", path.as_uri(), "--json"))
    assert report["bytes_total"] == SIZE
    assert report["bytes_by_source"] == {"local": 0, "peer": {}, "origin": SIZE}
    assert report["fallbacks"] == []
    assert Path(report["path"]).read_bytes() == path.read_bytes()
    return path.as_uri()


def test_pulled_again_it_is_here(cli: Cli, source: str) -> None:
    report = answer(cli("pull", source, "--json"))
    assert report["bytes_by_source"] == {"local": SIZE, "peer": {}, "origin": 0}
    assert "all of it was here" in cli("pull", source).stdout


def test_path_is_the_real_file_and_nothing_else(cli: Cli, source: str, tmp_path: Path) -> None:
    done = cli("path", source)
    assert Path(done.stdout.removesuffix("\n")).read_bytes() == (tmp_path / "weights.bin").read_bytes()
    assert answer(cli("path", source, "--json")) == {"path": done.stdout.strip()}


def test_every_source_is_tried_and_the_first_failure_is_the_code(cli: Cli, source: str) -> None:
    done = cli("pull", "file:///etc/hostname", source, "plain", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    by_source = {line["source"]: line for line in lines}
    assert by_source["file:///etc/hostname"]["error"] == "SourceDenied"
    assert by_source["plain"]["error"] == "SourceError"
    assert by_source[source]["bytes_total"] == SIZE
    assert done.returncode == SourceDenied.exit_code


def test_with_json_each_source_is_told_as_it_ends(cli: Cli, source: str, tmp_path: Path) -> None:
    """A failure, too: whoever reads need not wait for the rest."""
    (tmp_path / "more.bin").write_bytes(os.urandom(SIZE))
    done = cli("pull", (tmp_path / "more.bin").as_uri(), "plain", "--json")
    assert ["error" in json.loads(line) for line in done.stdout.splitlines()] == [True, False]


def test_less_than_was_needed_is_an_error(cli: Cli, source: str) -> None:
    cli("pin", source)
    done = cli("evict", "--need", "1MB")
    assert done.returncode == StoreError.exit_code
    assert done.stdout.startswith("freed 0 B\n")
    assert done.stderr == "weightcache: error: evict: less than 1.0 MB may go; ls shows what is held\n"


def test_a_program_has_the_settings_it_is_run_with(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("datacenter = 'far'\n")
    ask = "from weightcache.config import load_config; print(load_config().datacenter)"
    assert cli("run", "--config", str(file), sys.executable, "-c", ask).stdout == "far\n"


def test_a_pin_keeps_a_blob_until_unpin(cli: Cli, source: str) -> None:
    assert [row["pinned"] for row in answer(cli("pin", source, "--json"))] == [True]
    (blob,) = answer(cli("ls", "--json"))["blobs"]
    assert blob["pinned"]
    assert blob["state"] == "complete"
    assert "complete, pinned" in cli("ls").stdout
    for arguments in (("evict", source), ("evict", "--need", "1MB")):
        done = cli(*arguments, "--json")
        assert done.returncode == StoreError.exit_code
        outcome = json.loads(done.stdout)
        assert outcome["freed"] == 0
        assert [(kept["blob"], kept["why"]) for kept in outcome["kept"]] == [(blob["blob"], "pinned")]
    assert "pinned" in cli("evict", "--all").stdout
    assert [row["pinned"] for row in answer(cli("unpin", blob["blob"][:12], "--json"))] == [False]
    assert answer(cli("evict", "--all", "--json")) == {"freed": SIZE, "kept": []}
    assert answer(cli("ls", "--json"))["blobs"] == []
    assert "nothing yet" in cli("ls").stdout


def test_verify_finds_a_flipped_byte_and_mends_it(cli: Cli, source: str) -> None:
    path = Path(cli("path", source).stdout.strip())
    good = path.read_bytes()
    assert "all good" in cli("verify").stdout
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(bytes([good[SIZE // 2] ^ 1]))
    done = cli("verify", "--no-repair", "--json", "--log-level", "error")
    assert done.returncode == StoreError.exit_code
    assert [row["bad"] for row in json.loads(done.stdout)] == [[SIZE // 2 // CHUNK]]
    assert cli("path", source).returncode != 0  # what is bad is not shown as here
    assert answer(cli("pull", source, "--json"))["bytes_by_source"]["origin"] == CHUNK
    assert Path(cli("path", source).stdout.strip()).read_bytes() == good


def test_a_source_is_compared_with_a_local_file(cli: Cli, source: str, tmp_path: Path) -> None:
    (file,) = answer(cli("manifest", source, "--json"))["files"]
    assert [chunk["length"] for chunk in file["chunks"]] == [CHUNK] * (SIZE // CHUNK) + [SIZE % CHUNK]
    local = str(tmp_path / "weights.bin")
    assert answer(cli("manifest", local, source, "--json"))["bytes"] == SIZE
    unread = tmp_path / "unread.bin"
    unread.write_bytes(os.urandom(10))
    assert "not known yet: the ids of 1 chunks" in cli("manifest", local, unread.as_uri()).stdout
