"""The figures of a cold start and their pictures, from made-up reports."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcache.core.layout import check_cover, parse_header, plan
from weightcache.errors import ConfigError
from weightcache.tools import coldstart_svg as svg
from weightcache.tools.coldstart_measures import POINTS, Curve, NodeRun, Run, bound, middle, ratio, spread, summary
from weightcache.tools.coldstart_object import write_object
from weightcache.tools.coldstart_settings import Kill, Settings, parse_kill, parse_rate, rate_text

MB = 1_000_000


def report(peers: dict[str, int] | None = None, origin: int = 0, transfer: float = 3.0) -> dict[str, object]:
    return {
        "bytes_total": origin + sum((peers or {}).values()),
        "bytes_by_source": {"local": 0, "peer": peers or {}, "origin": origin},
        "stages": {"resolve": 0.2, "plan": 0.1, "transfer": transfer, "link": 0.05},
        "transfer": {
            "first": 0.8, "hashing": 0.3, "writing": 0.4, "origin": [[0.3, 1.5], [2.0, 2.5]],
            "peers": [[0.5, 0.3 + transfer]], "local": [],
        },
        "fallbacks": [],
    }  # fmt: skip


def node(name: str = "node-1", seconds: float = 3.35, least: float | None = 2.0) -> NodeRun:
    found = NodeRun(name, "", True, 400e6, least, f"{name}:7700", ended=seconds)
    found.report = report({"node-2:7700": 60 * MB}, 40 * MB, seconds - 0.35)
    found.curve = [(0.1, 0, 0, 0), (1.0, 0, 10 * MB, 20 * MB), (seconds - 0.1, 0, 60 * MB, 40 * MB)]
    return found


def fleet(seconds: list[float], least: float | None = 2.0) -> Run:
    nodes = [node(f"node-{number}", took, least) for number, took in enumerate(seconds, start=1)]
    return Run(nodes, 100 * MB, True, egress=102 * MB, least=least, busy={"all": 0.5, "others": 0.0, "cores": 2})


# -- figures


@pytest.mark.parametrize(
    ("link", "origin", "warm", "seconds"),
    [
        (400e6, 200e6, False, 4.0),  # the origin's link is the narrow one
        (400e6, 200e6, True, 2.0),  # somebody has it: the origin does not matter
        (100e6, 200e6, False, 8.0),
        (None, 200e6, False, 4.0),
        (None, 200e6, True, None),
        (None, None, False, None),
    ],
)
def test_the_bound_is_the_narrowest_link_that_must_be_crossed(
    link: float | None, origin: float | None, warm: bool, seconds: float | None
) -> None:
    assert bound(100 * MB, link, origin, warm=warm) == seconds


def test_the_waterfall_has_each_stage_where_it_was() -> None:
    rows = {name: (spans, spent) for name, spans, spent in node().waterfall()}
    assert rows["resolve"] == ([(0.0, 0.2)], 0.2)
    assert rows["origin"] == ([(0.3, 1.5), (2.0, 2.5)], pytest.approx(1.7))
    assert rows["hash"][1] == 0.3
    assert rows["link"][0][0] == pytest.approx((3.3, 3.35))
    assert "device" not in rows


def test_the_device_comes_after_the_last_byte() -> None:
    one = node(seconds=4.0)
    one.device = 0.5
    assert one.waterfall()[-1] == ("device", [(3.5, 4.0)], 0.5)


@given(st.floats(2.1, 50), st.floats(0.1, 2))
def test_the_gap_is_all_that_is_above_the_bound(seconds: float, least: float) -> None:
    one = node(seconds=seconds, least=least)
    assert sum(one.gap().values()) == pytest.approx(seconds - least)
    assert all(spent >= 0 for name, spent in one.gap().items() if name != "moving")


def test_what_a_node_sent_is_what_the_others_had_from_it() -> None:
    nodes = [node("node-1"), node("node-2"), node("node-3")]
    spread(nodes)
    assert [one.sent for one in nodes] == [0, 180 * MB, 0]


def test_the_share_of_a_link_is_over_all_of_a_nodes_seconds() -> None:
    assert node(seconds=4.0).line_share() == pytest.approx(0.5)


def test_the_summary_is_of_medians() -> None:
    rounds = [fleet([2.2, 2.4]), fleet([2.2, 9.0]), fleet([2.2, 3.0])]
    head = summary(rounds, [fleet([24.0]), fleet([30.0]), fleet([33.0])])
    assert head["seconds"] == 3.0
    assert head["distance"] == 1.5
    assert head["speed_up"] == 10
    assert head["egress_multiple"] == pytest.approx(1.02)
    assert middle(rounds).last == 3.0


def test_a_run_with_a_failed_node_has_no_time_and_says_why() -> None:
    run = fleet([2.2, 2.4])
    run.nodes[1].ended, run.nodes[1].error = None, "the origin is gone"
    assert run.last is None
    assert run.failures == ["node-2: the origin is gone"]
    run.nodes[1].killed = True  # on purpose
    assert run.failures == []
    run.nodes[0].correct = False
    assert run.failures == ["node-1: wrong bytes"]


def test_a_curve_splits_what_comes_as_it_is_told_later() -> None:
    curve = Curve()
    curve.hear({"event": "snapshot", "files": [{"had": [[0, 10]]}, {"had": []}]}, 0.0)
    for step in range(1, 2 * POINTS + 1):
        curve.hear({"event": "had", "file": 0, "ranges": [[0, 1]]}, step / 100)
    done = {"local": 10, "peer": {"x": 3 * POINTS // 2}, "origin": POINTS // 2}
    report = {"bytes_by_source": done, "bytes_total": 10 + 2 * POINTS}
    curve.hear({"event": "done", "report": report}, 5.0)
    points = curve.points()
    assert len(points) <= POINTS
    assert points[0] == (0.0, 10, 0, 0)
    assert points[-1] == (5.0, 10, 3 * POINTS // 2, POINTS // 2)
    totals = [sum(point[1:]) for point in points]
    assert totals == sorted(totals)
    _, local, peers, origin = points[len(points) // 2]
    assert local == 10
    assert peers == pytest.approx(3 * origin, abs=3)


def test_ratio_of_what_is_not_known_is_not_known() -> None:
    assert ratio(None, 1) is ratio(1, None) is ratio(1, 0) is None


# -- what is asked for


def test_roles_leave_undisturbed_nodes_in_front() -> None:
    settings = Settings(
        size=MB, nodes=8, link=1e9, warm=1, corrupt=True, kill=Kill(None, None), slow=0.1, join_after=2.0
    )
    settings.check()
    roles = settings.roles()
    assert [role.what for role in roles] == [
        "warm", "corrupt", "", "", "", "joins after 2 s", "link x 0.1", "killed half way",
    ]  # fmt: skip
    assert roles[6].link == 1e8
    assert [role.name for role in settings.alone()] == ["node-3", "node-4", "node-5"]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (Settings(), "give a SOURCE"),
        (Settings(source="s3://a/b", size=MB), "give a SOURCE"),
        (Settings(size=MB, nodes=0), "--nodes 0"),
        (Settings(size=10), "--size 10"),
        (Settings(size=MB, rounds=0), "--rounds 0"),
        (Settings(size=MB, nodes=4, warm=4), "--warm 4"),
        (Settings(size=MB, nodes=4, warm=3, corrupt=True), "--warm 3"),
        (Settings(size=MB, slow=0.1), "--slow: needs --link"),
        (Settings(size=MB, slow=2, link=1e9), "--slow 2"),
        (Settings(size=MB, join_after=-1), "--join-after -1"),
        (Settings(size=MB, nodes=1, kill=Kill(None, None)), "more --nodes"),
        (Settings(size=MB, nodes=3, kill=Kill(1.0, 9)), "no node 9"),
        (Settings(size=MB, nodes=4, join_after=1.0, kill=Kill(1.0, 4)), "node 4 is joins"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: Settings, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        settings.check()


def test_rates_and_kills_are_read_and_told() -> None:
    assert [parse_rate(text) for text in ("2gbit", "400 Mbit/s", "100kbit", "1.5Gbit")] == [2e9, 4e8, 1e5, 1.5e9]
    assert [rate_text(rate) for rate in (2.5e9, 4e8, 1e5, None)] == [
        "2.5 Gbit/s", "400 Mbit/s", "100 kbit/s", "not limited",
    ]  # fmt: skip
    assert [parse_kill(text) for text in ("half", "3.5:2")] == [Kill(None, None), Kill(3.5, 2)]
    for wrong in ("fast", "1gb", "5bit"):
        with pytest.raises(ConfigError, match="400mbit"):
            parse_rate(wrong)
    for wrong in ("now", "-1", "half:x"):
        with pytest.raises(ConfigError, match="half:2"):
            parse_kill(wrong)


@pytest.mark.parametrize("size", [MB, 30 * MB, 77_777_777])
def test_the_object_is_a_checkpoint_whose_chunks_all_differ(
    tmp_path_factory: pytest.TempPathFactory, size: int
) -> None:
    path = tmp_path_factory.mktemp("object") / "made.safetensors"
    write_object(path, size)
    data = path.read_bytes()
    assert abs(len(data) - size) < size / 100
    header = parse_header(data[: 8 + int.from_bytes(data[:8], "little")])
    check_cover(header, len(data))
    spans = list(plan(len(data), header))
    assert len({data[offset : offset + length] for offset, length in spans}) == len(spans)


# -- pictures


@pytest.mark.parametrize("most", [0.003, 0.29, 1, 6.68, 48, 3601])
def test_an_axis_has_a_few_round_marks(most: float) -> None:
    step, end = svg.ticks(most)
    assert most <= end <= most + step
    assert end / step <= 8.001
    assert re.fullmatch(r"[125]0*", f"{step * 1000:.0f}")


@pytest.mark.parametrize("count", [1, 8, 200])
def test_pictures_are_whole_and_their_labels_apart(count: int) -> None:
    run = fleet([3.0 + number / 100 for number in range(count)])
    for drawn in (svg.progress(run, fleet([20.0])), svg.lanes(run), svg.waterfalls(run), svg.gaps(run)):
        root = ElementTree.fromstring(drawn)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        boxes = []
        for text in root.iter("text"):
            assert text.text
            x, y = float(text.attrib["x"]), float(text.attrib["y"])
            wide = 7.0 * len(text.text)  # of 13 px
            left = {"start": x, "middle": x - wide / 2, "end": x - wide}[text.attrib["text-anchor"]]
            assert left >= 0, text.text
            assert left + wide <= width, text.text
            assert y <= height
            boxes.append((left, y - 10, left + wide, y + 2))
        for a, b in itertools.combinations(boxes, 2):
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, (a, b)
        for rect in root.iter("rect"):
            assert float(rect.attrib["width"]) > 0
            assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width


def test_a_name_that_is_too_long_keeps_its_end() -> None:
    shown = svg.name(NodeRun("gpu-fleet-a.internal.example.com-17", "", True, None))
    assert shown.endswith("-17")
    assert len(shown) <= 18
