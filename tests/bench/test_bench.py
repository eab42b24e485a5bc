"""The benchmark runs: what it lists is there, and a table comes out with figures, JSON and a picture."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench import picture, rounds
from bench.__main__ import TABLES
from bench.rounds import Contender, Unavailable
from bench.run import Run
from bench.table import Row, Table, at_least, at_most

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> str:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout


def test_lists_every_comparison() -> None:
    lines = bench("--list").splitlines()
    assert [line.split()[0] for line in lines] == list(TABLES)


def test_refuses_an_unknown_name() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        bench("pear")
    assert "no such comparison: pear" in caught.value.stderr


def test_a_table_with_its_json_and_its_picture(tmp_path: Path) -> None:
    shown = bench("landing", "--quick", "--rounds=1", f"--out={tmp_path}", f"--json={tmp_path / 'all.json'}")
    (table,) = json.loads((tmp_path / "all.json").read_text())["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    assert all(row["values"]["speed"] > 0 and not row["skipped"] for row in rows.values())
    assert rows["limit"]["values"]["ratio"] == 1
    assert "processes" in rows
    assert "processes" in shown
    texts = [text.text for text in ElementTree.parse(tmp_path / "landing.svg").iter() if text.tag.endswith("text")]
    assert set(rows) <= set(texts)


def test_who_cannot_take_part_is_skipped_with_the_reason(tmp_path: Path) -> None:
    def missing() -> float:
        raise Unavailable("it is not here: install it")

    contenders = [Contender("limit", 1000, lambda: 0.5), Contender("other", 1000, missing)]
    table = rounds.compare("name", "title", "about", contenders, Run(tmp_path, rounds=2))
    assert [row.skipped for row in table.rows] == ["", "it is not here: install it"]
    table.expect(at_least(1, "times the other"), "limit", "speed", "other")
    assert table.goals[0].met is None


def test_a_goal_is_met_or_missed() -> None:
    table = Table("name", "title", "about", rounds.COLUMNS)
    table.rows = [Row("ours", {"speed": 3.0}), Row("theirs", {"speed": 2.0})]
    table.expect(at_least(1.5, "times theirs"), "ours", "speed", "theirs")
    table.expect(at_most(2.9, "GB/s"), "ours", "speed")
    assert [goal.met for goal in table.goals] == [True, False]
    assert "theirs" in picture.draw(table)
