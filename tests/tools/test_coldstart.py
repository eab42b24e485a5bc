"""The cold-start benchmark on real daemons: what it reports is so, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.daemons import Daemon
from tests.servers.loop import wait_until
from tests.servers.s3 import S3Server
from tests.tools.conftest import Cli, answer
from weightcache.config import Config
from weightcache.tools import coldstart_net as net
from weightcache.tools.coldstart_machine import too_much, tree
from weightcache.tools.coldstart_measures import Run
from weightcache.tools.coldstart_run import Stage, clear, play, stage
from weightcache.tools.coldstart_settings import Settings
from weightcache.tools.coldstart_show import Quiet

MB = 1_000_000
SIZE = 12 * MB
root_only = pytest.mark.skipif(bool(net.missing()), reason=net.missing())


def check_page(page: str, names: list[str]) -> None:
    """It is whole, shows the nodes, and needs nothing from elsewhere."""
    assert page.startswith("<!doctype html>\n")
    root = ElementTree.fromstring(page.partition("\n")[2])
    texts = [element.text for element in root.iter() if element.text]
    assert len(list(root.iter("svg"))) >= 3
    for name in names:
        assert texts.count(name) >= 3  # in pictures and in the table
    for element in root.iter():
        assert element.tag not in ("script", "link", "img", "iframe", "object")
        assert not {"src", "href", "{http://www.w3.org/1999/xlink}href"} & element.attrib.keys()
    assert not re.search(r"url\(|@import|https?://", page)


def test_three_nodes_on_loopback(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    page = tmp_path / "report.html"
    said = answer(
        cli(
            "coldstart", f"--size={SIZE}", "--nodes=3", "--loopback", f"--report={page}", "--json",
            f"--dir={tmp_path / 'work'}",
        )
    )  # fmt: skip
    (run,), (alone,) = said["runs"], said["without_peers"]
    size = said["size"]
    assert not said["namespaces"]
    assert abs(size - SIZE) < SIZE / 100
    assert "on loopback, because --loopback was given" in said["notes"][0]
    # Each counted at the server: what nodes say to have had from it is what it sent, and some headers.
    told = sum(node["bytes_by_source"]["origin"] for node in run["nodes"])
    assert size <= told <= run["egress"]
    assert 3 * size <= alone["egress"] <= 3.2 * size
    assert run["requests"] >= 3
    for node in (*run["nodes"], *alone["nodes"]):
        assert node["correct"]
        assert node["seconds"] > 0
        assert sum(node["bytes_by_source"].values()) == size
        assert node["stages"].keys() == {"resolve", "plan", "transfer", "link"}
        assert 0 < node["transfer"]["first"] < node["seconds"]
        assert node["transfer"]["hashing"] > 0
        assert node["transfer"]["writing"] > 0
        ends = [end for kind in ("origin", "peers") for _, end in node["transfer"][kind]]
        assert 0 < max(ends) <= node["seconds"]
        assert sum(node["curve"][-1][1:]) == size
        assert node["bound"] is node["distance"] is node["line_share"] is None
    assert sum(node["sent"] for node in run["nodes"]) == 3 * size - told
    assert said["summary"]["speed_up"] == pytest.approx(alone["seconds"] / run["seconds"])
    assert 0 < run["busy"]["ours"] <= run["busy"]["all"] <= 1
    check_page(page.read_text(), ["node-1", "node-2", "node-3"])
    assert list((tmp_path / "work").iterdir()) == []


@root_only
def test_two_nodes_behind_links(cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    said = answer(
        cli(
            "coldstart", f"--size={SIZE}", "--nodes=2", "--link=200mbit", "--origin-link=100mbit", "--json",
            f"--report={page}",
        )
    )  # fmt: skip
    (run,), (alone,) = said["runs"], said["without_peers"]
    assert said["namespaces"]
    assert run["bound"] == pytest.approx(8 * said["size"] / 100e6)
    # The link is real: nothing is faster than it, give or take what its bucket holds.
    assert run["seconds"] > 0.95 * run["bound"]
    assert alone["seconds"] > 0.95 * 2 * run["bound"]
    for node in run["nodes"]:
        assert node["correct"]
        assert node["address"].startswith("198.18.")
        assert 0 < node["line_share"] <= 1.05
        assert sum(node["gap"].values()) == pytest.approx(node["seconds"] - run["bound"])
    check_page(page.read_text(), ["node-1", "node-2"])
    assert "coldstart-" not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout


@root_only
def test_a_node_that_is_killed_and_one_with_a_bad_disk_cost_the_others_no_byte(cli: Cli, tmp_path: Path) -> None:
    said = answer(
        cli(
            "coldstart", f"--size={SIZE}", "--nodes=5", "--link=200mbit", "--origin-link=200mbit", "--json",
            "--no-baseline", "--warm=1", "--corrupt", "--kill=half",
        )
    )  # fmt: skip
    warm, corrupt, *cold, killed = said["runs"][0]["nodes"]
    assert (warm["what"], corrupt["what"], killed["error"]) == ("warm", "corrupt", "killed")
    assert [node["correct"] for node in cold] == [True, True]
    assert sum(killed["bytes_by_source"].values()) < said["size"]
    assert said["failures"] == []
    assert said["without_peers"] == []


def test_a_source_is_copied_once_and_served_whole(cli: Cli, tmp_path: Path) -> None:
    for name in ("a.json", "unet/model.safetensors"):
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(2 * MB))
    source = f"file://{tmp_path}/model/"
    said = answer(cli("coldstart", source, "--nodes=2", "--loopback", "--no-baseline", "--json"))
    assert said["source"] == source
    assert said["size"] == 4 * MB
    assert [node["correct"] for node in said["runs"][0]["nodes"]] == [True, True]


def test_a_worker_loads_it_onto_its_device(cli: Cli) -> None:
    said = answer(cli("coldstart", "--size=4MB", "--nodes=1", "--loopback", "--no-baseline", "--load=cpu", "--json"))
    (node,) = said["runs"][0]["nodes"]
    assert node["device"] is not None
    assert node["seconds"] >= node["device"] + sum(node["stages"].values()) - 0.01


# -- a fleet that is there


def test_daemons_that_are_there_by_socket_and_by_command(cli: Cli, s3: S3Server, tmp_path: Path) -> None:
    s3.put("main", "there", os.urandom(3 * MB))
    source = "s3://main/there"
    with Daemon(tmp_path / "a", env=s3.env()) as first, Daemon(tmp_path / "b", peers=(first,), env=s3.env()) as second:
        second.meets(first)
        sockets = f"{first.socket},{second.socket}"
        cold = answer(cli("coldstart", source, f"--hosts={sockets}", "--link=1gbit", "--json"))
        assert [node["name"] for node in cold["runs"][0]["nodes"]] == sockets.split(",")
        assert cold["runs"][0]["bound"] == pytest.approx(8 * 3 * MB / 1e9)
        assert cold["without_peers"] == []

        warm = answer(cli("coldstart", source, f"--hosts={sockets}", "--json"))
        assert [node["what"] for node in warm["runs"][0]["nodes"]] == ["warm", "warm"]
        assert any("--evict" in note for note in warm["notes"])

        via = f"env WEIGHTCACHE_SOCKET={tmp_path}/{{host}}/sock {sys.executable} -m weightcache.tools"
        again = answer(cli("coldstart", source, "--hosts=a,b", f"--via={via}", "--evict", "--json"))
        for node in again["runs"][0]["nodes"]:
            assert sum(node["bytes_by_source"].values()) == 3 * MB
            assert node["bytes_by_source"]["local"] == 0
            assert node["curve"]

        assert "on 2 nodes; a fleet that is there\n" in cli("coldstart", source, "--hosts=a,b", f"--via={via}").stdout

        unknown = cli("coldstart", source, "--hosts=a,nobody", f"--via={via}")
        assert unknown.returncode == 10
        assert "nobody" in unknown.stderr
        assert "sock" in unknown.stderr


# -- what goes wrong


def alive(pids: set[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_behind(environ: dict[str, str], tmp_path: Path, number: signal.Signals) -> None:
    links = ["--loopback"] if net.missing() else ["--link=1mbit", "--origin-link=1mbit"]
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-m", "weightcache.tools", "coldstart", f"--size={SIZE}", "--nodes=2", "--rounds=50"]
    with subprocess.Popen([*command, f"--dir={work}", *links], env=environ, stdout=-1, stderr=-1, text=True) as tool:
        # the origin, two daemons with their processes: in the middle of it
        wait_until(lambda: len(tree([tool.pid])) >= 6, 60, "the daemons")
        pids = tree([tool.pid])
        tool.send_signal(number)
        out, err = tool.communicate(timeout=30)
    assert tool.returncode == 128 + number
    assert (out, err) == ("", "")
    wait_until(lambda: not alive(pids), 10, "their end")
    assert list(work.iterdir()) == []
    if not net.missing():
        spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
        assert f"coldstart-{tool.pid}-" not in spaces


@root_only
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, living = f"coldstart-{gone.pid}-1-node-1", f"coldstart-{os.getpid()}-{net.started(os.getpid())}-x"
    folders = [tmp_path / f"weightcache-{name}" for name in (left, living)]
    for name, folder in zip((left, living), folders, strict=True):
        subprocess.run(["ip", "netns", "add", name], check=True)
        folder.mkdir()
    try:
        assert net.sweep() == [left]
        clear(tmp_path)
        assert [folder.exists() for folder in folders] == [False, True]
    finally:
        subprocess.run(["ip", "netns", "delete", living], check=True)


class Struck(Quiet):
    """Does something as soon as a node has heard of its load."""

    def __init__(self, strike: Any) -> None:
        self._strike = strike

    def moved(self, name: str, curve: Any) -> None:
        strike, self._strike = self._strike, lambda: None
        strike()


@contextlib.asynccontextmanager
async def slow_stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """Two nodes that read an origin slowly, several reads each: some begin after the strike."""
    settings = Settings(size=4 * SIZE, nodes=2)
    async with stage(settings, Config(), tmp_path, Quiet(), network=False) as made:
        slowly = {"WEIGHTCACHE_ORIGIN_BANDWIDTH": "4MB", "WEIGHTCACHE_ORIGIN_ATTEMPTS": "2"}
        yield replace(made, place=replace(made.place, environ=made.place.environ | slowly))


async def struck(made: Stage, strike: Any) -> Run:
    return await asyncio.wait_for(play(made, made.settings.roles(), Struck(strike), "", peers=True), 60)


async def test_an_object_that_is_replaced_is_told_in_the_rows(tmp_path: Path) -> None:
    async with slow_stage(tmp_path) as made:
        (path,) = tmp_path.glob("*/objects/*.safetensors")
        run = await struck(made, lambda: os.utime(path, (1, 1)))
    assert len(run.failures) == 2
    assert all("changed" in failure for failure in run.failures)
    assert run.last is None


async def test_an_origin_that_goes_down_is_told_in_the_rows(tmp_path: Path) -> None:
    async with slow_stage(tmp_path) as made:
        run = await struck(made, lambda: os.kill(made.origin.pid, signal.SIGKILL))
    assert len(run.failures) == 2
    assert all("s3://coldstart/checkpoint.safetensors" in failure for failure in run.failures)
    assert run.egress is None  # who would have counted it
    assert list(tmp_path.iterdir()) == []


def test_failures_are_said_and_end_it_with_their_code(cli: Cli, tmp_path: Path) -> None:
    for arguments, code, word in (
        (["--size=1MB", "--loopback", "--link=1gbit"], 2, "--link and --origin-link need network namespaces"),
        (["s3://a/b", "--hosts=a", "--kill=half"], 2, "--kill: not with --hosts"),
        (["--size=1MB", "--report=/nowhere/x.html"], 2, "no such directory"),
        (["--size=1MB", f"--report={tmp_path}"], 2, "cannot be written"),
        (["--size=1MB", "--loopback", "--nodes=1", "--load=fridge"], 10, "device 'fridge'"),
        (["s3://a/b", "--hosts="], 2, "--hosts: name them"),
        (["--size=900TB"], 2, "--force"),
        ([f"file://{tmp_path}/nothing", "--loopback"], 4, "nothing"),
        (["s3://a/b", "--hosts=gone", "--via=/nowhere/weightcache"], 10, "gone"),
    ):
        done = cli("coldstart", *arguments)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert done.stderr.startswith("weightcache: error: ")
        assert word in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_machine_that_is_too_small_is_told_before_anything_starts(tmp_path: Path) -> None:
    fits = Settings(size=MB, nodes=2)
    assert too_much(fits, MB, tmp_path) == ""
    assert "free" in too_much(fits, 1 << 50, tmp_path)
    assert "cores" in too_much(Settings(size=MB, nodes=8, link=1e12), MB, tmp_path)
    assert "memory" in too_much(Settings(size=MB, nodes=250, device="cpu"), MB, tmp_path)
