"""Patterns mean what they mean to huggingface_hub."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st

from weightcache.core.patterns import EVERYTHING, Patterns

PATHS = [
    "config.json",
    "unet/config.json",
    "unet/model.fp16.safetensors",
    "a/b/c.bin",
    "A.JSON",
    "[x].txt",
    "a?b",
    "un",
]
globs = (
    st.none() | st.text("*?[]!abun/.json\\", max_size=8) | st.lists(st.text("*?[]!abun/.jso\\", max_size=8), max_size=3)
)


@given(globs, globs, st.lists(st.sampled_from(PATHS) | st.text("abun/.json", min_size=1, max_size=9)))
def test_they_admit_what_the_hubs_own_filter_admits(
    allow: list[str] | str | None, ignore: list[str] | str | None, paths: list[str]
) -> None:
    patterns = Patterns.of(allow, ignore)
    expected = list(filter_repo_objects(paths, allow_patterns=allow, ignore_patterns=ignore))
    assert [path for path in paths if patterns.admit(path)] == expected


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (Patterns.of("*.json", None), "allow *.json"),
        (Patterns.of(["unet/", "*.json"], "*.bin"), "allow unet/*, *.json; ignore *.bin"),
        (Patterns.of([], []), "allow nothing"),
    ],
)
def test_they_say_what_they_are(patterns: Patterns, said: str) -> None:
    assert str(patterns) == said
    assert patterns


def test_everything_leaves_nothing_out() -> None:
    assert not EVERYTHING
    assert not Patterns.of(None, [])
    assert all(map(EVERYTHING.admit, PATHS))
