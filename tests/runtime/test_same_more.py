"""More of the same calls as safetensors: ``load``, ``load_model``, and any index of any tensor."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weightcache.runtime as ours
from tests.runtime.files import pack
from tests.runtime.test_same import HOSTILE, outcome
from weightcache.core.layout import DTYPE_BITS

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")

# Sub-byte tensors of whole bytes: anything else is no file.
dtypes = st.sampled_from(sorted(DTYPE_BITS))
positions = st.integers(-6, 6)
steps = st.none() | st.integers(-2, 3)
slices = st.builds(slice, st.none() | positions, st.none() | positions, steps)
part = slices | positions | st.just(...) | st.none() | st.lists(positions, max_size=3) | st.booleans() | st.floats()
index = part | st.lists(part, max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(dtypes, st.lists(st.integers(1, 4), max_size=3), index, st.sampled_from(["pt", "np"]), st.booleans())
def test_any_index_of_any_tensor(dtype: str, shape: list[int], index: Any, framework: str, mapped: bool) -> None:
    shape = [*shape, 8]
    with tempfile.NamedTemporaryFile() as file:
        file.write(pack({"odd": ("U8", [3]), "x": (dtype, shape)}))
        file.flush()
        results = []
        for opener in (safetensors.safe_open, ours.safe_open):
            handle: Any = opener(file.name, framework, backend="mmap" if mapped else "pread")
            results.append(outcome(lambda: handle.get_slice("x")[index]))  # noqa: B023
    assert results[1] == results[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_in_the_same_words(name: str) -> None:
    assert outcome(lambda: ours.load(HOSTILE[name])) == outcome(lambda: safetensors.torch.load(HOSTILE[name]))


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.tuples(dtypes, st.just([2, 8]))))
def test_load_gives_what_safetensors_gives(tensors: dict[str, tuple[str, list[int]]]) -> None:
    data = pack(tensors)
    found, expected = (outcome(lambda: load(data)) for load in (ours.load, safetensors.torch.load))  # noqa: B023
    if expected[:1] == (KeyError,):  # safetensors goes through them in any order: it may be another one's type
        assert found[0] is KeyError
        assert found[1] in {repr(dtype) for dtype, _ in tensors.values()}
    else:
        assert sorted(found, key=str) == sorted(expected, key=str)
    for wrong in ("text", None, 3, memoryview(data), bytearray(data)):
        assert outcome(lambda: ours.load(wrong)) == outcome(lambda: safetensors.torch.load(wrong))  # type: ignore[arg-type]  # noqa: B023


def test_what_load_gives_is_owned() -> None:
    data = pack({"a": ("F32", [4])})
    before = bytes(data)
    tensors = ours.load(data)
    tensors["a"].fill_(1)
    assert data == before
    assert ours.load(data)["a"].tolist() != [1, 1, 1, 1]


class Model(torch.nn.Module):
    """``tied`` is ``first`` under another name; ``half`` is a part of ``first``'s memory."""

    def __init__(self, *, tie: bool = True, extra: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(4, 4)
        self.tied = torch.nn.Linear(4, 4)
        if tie:
            self.tied.weight = self.first.weight
        if extra:
            self.more = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))


WEIGHT, BIAS = ("F32", [4, 4]), ("F32", [4])
WHOLE = {"first.bias": BIAS, "first.weight": WEIGHT, "tied.bias": BIAS, "count": ("I64", [3])}
CHECKPOINTS: dict[str, dict[str, tuple[str, list[int]]]] = {
    "one of the tied": WHOLE,
    "the other": {**{name: WHOLE[name] for name in WHOLE if name != "first.weight"}, "tied.weight": WEIGHT},
    "both": WHOLE | {"tied.weight": WEIGHT},
    "neither": {name: WHOLE[name] for name in WHOLE if name != "first.weight"},
    "more": WHOLE | {"unknown": BIAS, "also": BIAS},
    "nothing": {},
    "another shape": WHOLE | {"first.bias": ("F32", [5])},
    "another dtype": WHOLE | {"first.bias": ("F16", [4])},
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("options", [{}, {"tie": False}, {"extra": True}])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_load_model(tmp_path: Path, name: str, options: dict[str, bool], strict: bool) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(pack(CHECKPOINTS[name]))

    def filled(load: Callable[..., Any]) -> tuple[Any, Any]:
        model = Model(**options)
        given = outcome(lambda: load(model, path, strict, backend="pread"))
        return given, outcome(lambda: dict(model.state_dict()))

    assert filled(ours.load_model) == filled(safetensors.torch.load_model)


def test_load_model_judges_its_arguments_alike(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(pack(WHOLE))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((path,), {"device": "nowhere"}),
        ((path,), {"backend": "x"}),
        ((path,), {"device": "meta"}),
        (("/nowhere",), {}),
        ((path, True, "cpu"), {}),
        ((str(path), False, None), {}),
    ]
    for args, options in calls:
        found, expected = (
            outcome(lambda: load(Model(), *args, **options))  # noqa: B023
            for load in (ours.load_model, safetensors.torch.load_model)
        )
        assert found == expected, (args, options)


def test_two_tied_views_none_of_which_is_the_whole(tmp_path: Path) -> None:
    class Views(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.zeros(8)
            self.register_buffer("low", whole[:5])
            self.register_buffer("high", whole[3:])

    path = tmp_path / "f.safetensors"
    path.write_bytes(pack({"low": ("F32", [5]), "high": ("F32", [5])}))
    outcomes = [outcome(lambda: load(Views(), path)) for load in (ours.load_model, safetensors.torch.load_model)]  # noqa: B023
    assert [kind for kind, _ in outcomes] == [RuntimeError, RuntimeError]
    assert "no suitable name to keep" in outcomes[0][1]


def test_keywords_that_are_not_known_are_safetensors_to_judge(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(pack(WHOLE))
    for call in (
        lambda: ours.load_file(path, prefetch=None),
        lambda: ours.safe_open(path, "pt", prefetch=None),
        lambda: ours.load_model(Model(), path, prefetch=None),
        lambda: ours.load(b"", prefetch=None),
    ):
        with pytest.raises(TypeError, match="prefetch"):
            call()
