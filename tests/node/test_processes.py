"""How many bulk processes a machine gets."""

from __future__ import annotations

import os

import pytest

from weightcache.node.processes import usual_processes


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (32, 8), (192, 8)])
def test_by_the_cores_it_may_use(monkeypatch: pytest.MonkeyPatch, cores: int, processes: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert usual_processes() == processes
