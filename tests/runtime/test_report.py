"""The report of a load, its time line, and the machine's ceilings it compares with."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.runtime.files import pack
from weightcache.runtime import LoadReport, ceilings, stream_file
from weightcache.runtime.ceilings import Ceilings, link_speed, measure
from weightcache.runtime.emulated import Emulated
from weightcache.runtime.report import MAX_SPANS

LIMITS = Ceilings(memory=10e9, disk=1e9, link=1.25e9, device=None)
FROM_PEERS = {
    "bytes_by_source": {"local": 100, "peer": {"10.0.0.2:7700": 3_000_000_000}, "origin": 1_000_000_000},
    "fallbacks": ["peer 10.0.0.3:7700: refused"],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({f"{i:02}": ("F32", [500, 1001]) for i in range(40)}))
    return path


def test_a_load_says_what_it_did(path: Path) -> None:
    device = Emulated()
    streaming = stream_file(path, device=device, dtype=torch.float16)
    for _ in streaming:
        assert streaming.report.ended is None
    device.close()
    report = streaming.report
    found = report.to_json(LIMITS)
    data = 40 * 500 * 1001 * 4
    assert (found["tensors"], found["bytes"]) == (40, data // 2)
    assert found["bytes_by_source"] == {"local": data // 2}
    stages = found["stages"]
    assert [name for name in stages if name != "disk"] == ["wait", "read", "copy", "cast"]
    assert sum(stages[name]["bytes"] for name in ("read", "disk") if name in stages) == data
    assert stages["copy"]["bytes"] == stages["cast"]["bytes"] == data
    assert 0 < found["first_tensor_seconds"] < found["seconds"]
    assert stages["read"]["share"] == pytest.approx(stages["read"]["bytes"] / stages["read"]["busy"] / 10e9)
    assert all(stage["busy"] <= min(stage["seconds"], found["seconds"]) + 1e-6 for stage in stages.values())
    assert json.loads(json.dumps(found)) == found


def test_where_bytes_came_from_is_the_daemons_to_say() -> None:
    report = LoadReport("s3://bucket/model/")
    now = time.perf_counter()
    report.spend("wait", now, now + 4.0)
    report.came(FROM_PEERS)
    report.came(None)
    report.fell_back("unet: keys differ")
    found = report.to_json(LIMITS)
    assert found["bytes_by_source"] == {"local": 100, "10.0.0.2:7700": 3_000_000_000, "origin": 1_000_000_000}
    assert found["stages"]["wait"]["share"] == pytest.approx(
        0.8
    )  # of the link: what came over it, while it was awaited
    assert found["fallbacks"] == ["unet: keys differ", "peer 10.0.0.3:7700: refused"]


def test_overlap_counts_a_stage_once_however_many_threads_were_at_it() -> None:
    report = LoadReport()
    report.began, report.ended = 100.0, 110.0
    for began, ended in ((100.0, 106.0), (102.0, 108.0), (103.0, 104.0), (109.0, 110.0)):
        report.spend("read", began, ended)
    report.spend("copy", 101.0, 110.0)
    assert report.busy("read") == pytest.approx(9.0)
    assert report.overlap == pytest.approx(1.8)


def test_it_prints(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightcache.runtime.report.ceilings", lambda: LIMITS)
    streaming = stream_file(path)
    list(streaming)
    streaming.report.fell_back("a reason")
    said = str(streaming.report)
    assert said.startswith(f"{path} -> cpu: 40 tensors, 80.1 MB in ")
    assert "  from local 80.1 MB\n" in said
    assert "of what this machine's memory can do" in said
    assert said.endswith("\n  fell back: a reason")


def test_a_time_line_opens_in_perfetto(path: Path, tmp_path: Path) -> None:
    device = Emulated()
    streaming = stream_file(path, device=device)
    list(streaming)
    device.close()
    streaming.report.trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    names, spans = {}, []
    for event in trace["traceEvents"]:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            names[event["name"], event["tid"]] = event["args"]["name"]
        elif event["ph"] == "X":
            spans.append(event)
        else:
            assert (event["ph"], event["name"], event["s"]) == ("i", "first tensor", "p")
    assert names["process_name", 0] == f"load {path}"
    lanes = {name for (kind, _), name in names.items() if kind == "thread_name"}
    assert lanes == {"reader 1", "reader 2", "device"}
    assert {event["name"] for event in spans} >= {"wait", "read", "copy"}
    for event in spans:
        assert ("thread_name", event["tid"]) in names
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert event["ts"] + event["dur"] <= (streaming.report.seconds + 1) * 1e6
    by_lane = sorted((event["tid"], event["ts"], event["ts"] + event["dur"]) for event in spans)
    for (lane, _, ended), (other, began, _) in itertools.pairwise(by_lane):
        assert lane != other or began >= ended - 1000 or names["thread_name", lane] == "device"


def test_a_report_stays_small() -> None:
    report = LoadReport()
    for _ in range(MAX_SPANS + 10):
        report.spend("read", 0.0, 1.0, 1)
    assert len(report.spans) == MAX_SPANS
    assert report.stages["read"].size == MAX_SPANS + 10


def test_ceilings_are_measured_soon_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCACHE_STORE", str(tmp_path))
    ceilings.ceilings.cache_clear()
    found = ceilings.ceilings()
    assert found.memory is not None
    assert found.memory > 1e8
    assert [path.name for path in tmp_path.iterdir()] == ["ceilings.json"]
    monkeypatch.setattr(ceilings, "measure", None)
    ceilings.ceilings.cache_clear()
    assert ceilings.ceilings() == found
    ceilings.ceilings.cache_clear()


def test_ceilings_where_nothing_may_be_written(tmp_path: Path) -> None:
    found = measure(tmp_path / "nowhere")
    assert found.disk is None
    assert found.memory is not None
    assert not list(tmp_path.iterdir())


def test_the_link_is_the_fastest_that_is_up(tmp_path: Path) -> None:
    for name, state, speed in (("a", "up", "10000"), ("b", "up", "-1"), ("c", "down", "100000"), ("lo", "unknown", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text(f"{state}\n")
        (tmp_path / name / "speed").write_text(f"{speed}\n")
    assert link_speed(tmp_path) == 1.25e9
    assert link_speed(tmp_path / "lo") is None


def test_the_command_line(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCACHE_STORE", str(tmp_path))
    command = [sys.executable, "-m", "weightcache.runtime", str(path), "--dtype=float16", f"--trace={tmp_path}/t.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{path} -> cpu: 40 tensors, 40.0 MB" in done.stdout
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    (tmp_path / "none").mkdir()
    for wrong, code, said in (
        (["nothing"], 1, "No such file or directory: nothing"),
        (["none"], 1, "none: no safetensors file in it"),
        ([path.name, "--device=foo"], 2, "device 'foo'"),
        ([path.name, "--trace=none/no/t.json"], 1, "'none/no/t.json'"),
    ):
        bad = subprocess.run([*command[:3], *wrong], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert (bad.returncode, bad.stdout) == (code, "")
        (line,) = bad.stderr.splitlines()
        assert line.startswith("error: ")
        assert said in line
