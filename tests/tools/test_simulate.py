"""``weightcache simulate``: what it prints and refuses, and that its network carries what it can and no more."""

from __future__ import annotations

import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.conftest import Cli, answer
from weightcache.errors import ConfigError, WeightcacheError
from weightcache.tools import sim_fleet
from weightcache.tools.sim_network import Clock, Flow, Network, Port
from weightcache.tools.simulate import Scenario, watched


def test_it_prints_how_far_from_the_bound_a_fleet_ends(cli: Cli) -> None:
    options = ("simulate", "--hosts", "4", "--size", "40MB", "--chunk", "1MiB", "--seed", "7")
    found = answer(cli(*options, "--json"))
    assert found["bound"] == pytest.approx(40e6 / 50e6)
    assert found["hosts"] == 4
    assert 1.0 <= found["egress"] < 1.2
    assert found["p50_over_bound"] <= found["p99_over_bound"] <= found["last_over_bound"] < 2.5
    assert answer(cli(*options, "--json"))["trace"] == found["trace"]
    said = cli(*options)
    assert said.returncode == 0
    assert "origin sent" in said.stdout
    assert f"{found['last_over_bound']:.3f} times the bound" in said.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--hosts", "0"), "--hosts"),
        (("--link", "3"), "'3': a rate of"),
        (("--churn", "4"), "--churn"),
        (("--warm", "8"), "--warm"),
        (("--chunk", "1B"), "--chunk"),
        (("--size", "1000TB"), "--chunk"),
        (("--liars", "0.5", "--stragglers", "0.5"), "nobody to rely on"),
    ],
)
def test_bad_arguments_are_one_line(cli: Cli, options: tuple[str, ...], named: str) -> None:
    done = cli("simulate", *options)
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
    assert not done.stdout


def test_a_broken_invariant_fails_and_names_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_fleet, "MOST_REQUESTS", 0)  # so that one question is one too many
    with pytest.raises(WeightcacheError, match=r"for ever.*--seed 3") as raised:
        watched(Scenario(size=10_000_000, seed=3))
    assert raised.value.exit_code != 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 1 << 30))
def test_ports_carry_what_they_can_and_no_more(hosts: int, flows: int, seed: int) -> None:
    draw, clock = random.Random(seed), Clock()
    network = Network(clock)
    ups = [Port(draw.choice((10.0, 50.0, 100.0))) for _ in range(hosts)]
    downs = [Port(draw.choice((10.0, 50.0, 100.0))) for _ in range(hosts)]
    left: set[Flow] = set()
    total = 0.0

    def ended(flow: Flow) -> None:
        left.discard(flow)
        network.end(flow)

    for _ in range(flows):
        size = draw.uniform(1.0, 500.0)
        total += size
        flow = Flow(draw.choice(ups), draw.choice(downs), size, lambda: None)
        flow.done = partial(ended, flow)
        left.add(flow)
        clock.at(draw.random() * 5, partial(network.begin, flow))
    while clock.step():
        for port in (*ups, *downs):
            rates = sum(flow.rate for flow in port.flows)
            assert rates == pytest.approx(port.used, abs=1e-6)
            assert rates <= port.capacity * (1 + 1e-9)
            assert not port.flows or rates > 0
    assert not left
    assert sum(port.carried for port in ups) == pytest.approx(total)
    assert sum(port.carried for port in downs) == pytest.approx(total)
