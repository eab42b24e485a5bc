"""Numbers and columns as a person reads them."""

from __future__ import annotations

import pytest

from weightcache.tools import show


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (90_868_376, "90.9 MB"), (999_999, "1.0 MB"), (10**18, "1000.0 PB")],
)
def test_sizes_are_powers_of_1000(size: int, shown: str) -> None:
    assert show.human(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0031, "3 ms"), (0.612, "0.61 s"), (42, "42 s"), (119, "2 min"), (7200, "2 h"), (86400 * 3, "3 days")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert show.duration(seconds) == shown


def test_a_share_is_all_only_when_it_is_all() -> None:
    assert show.percent(10**9 - 1, 10**9) == "99.9 %"
    assert show.percent(3, 3) == "100 %"
    assert show.percent(0, 0) == "-"


def test_columns_line_up_and_have_no_trailing_space() -> None:
    assert (
        show.columns(("A", "SIZE"), [("long one", 5), ("x", 12345)], "SIZE")
        == "A          SIZE\nlong one      5\nx         12345"
    )
    assert show.columns(("A", "B"), [("x", "")]) == "A  B\nx"


def test_what_is_not_known_of_a_peer_is_left_out() -> None:
    known = {"datacenter": "default", "state": "connected", "why": None, "bytes_per_second": 10**8, "sent": 0}
    rows = [{"address": "a:1", **known, "received": 0}, {"address": "b:1", **known, "received": 5000}]
    assert show.peers(rows).splitlines() == [
        "PEER  DATACENTER  STATE            RATE  RECEIVED  SENT  WHY",
        "a:1   default     connected           -       0 B   0 B",
        "b:1   default     connected  100.0 MB/s    5.0 kB   0 B",
    ]


def test_escapes_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in show.columns(("A",), [("\x1b[31mred\n",)]).splitlines()[1]
