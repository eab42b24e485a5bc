"""The same calls on the same files as safetensors: the same results, or the same exception with the same words."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weightcache.runtime as ours
from tests.runtime.files import pack, pack_raw, raw
from weightcache.core.layout import DTYPE_BITS

# torch warns of some of the indices below; what they give is compared all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")

INDICES: list[Any] = [
    ..., 0, -1, 1, 5, slice(None), slice(1, 2), slice(0, 0), slice(None, None, 2), slice(-2, None), slice(2, 1),
    (slice(None), slice(0, 1)), (0, slice(1)), (0, 0), (0, 0, 0, 0), [], [0], "a", None, 1.5, (), True,
]  # fmt: skip


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, in a form that compares: tensors by dtype, shape and bytes; exceptions by class and words."""
    try:
        return shown(call())
    except Exception as error:  # noqa: BLE001 - the exception is the result
        words = str(error)
        if "invalid offset for tensor" in words:  # of two that collide, safetensors names either
            words = "invalid offset"
        return type(error), words


def shown(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, shown(inner)) for key, inner in value.items()]
    if isinstance(value, torch.Tensor | np.ndarray):
        return type(value), value.dtype, tuple(value.shape), raw(value)
    return value


def assert_same(path: str, framework: str, **options: Any) -> None:
    with safetensors.safe_open(path, framework, **options) as his, ours.safe_open(path, framework, **options) as mine:
        for call in ("keys", "offset_keys", "metadata"):
            assert getattr(mine, call)() == getattr(his, call)()
        assert type(mine.keys()) is list
        for name in his.keys():  # noqa: SIM118 - a handle is no dict
            assert outcome(lambda: mine.get_tensor(name)) == outcome(lambda: his.get_tensor(name)), name  # noqa: B023
            his_slice, my_slice = his.get_slice(name), mine.get_slice(name)
            assert my_slice.get_shape() == his_slice.get_shape()
            assert my_slice.get_dtype() == his_slice.get_dtype()
            for index in INDICES:
                assert outcome(lambda: my_slice[index]) == outcome(lambda: his_slice[index]), (name, index)  # noqa: B023
        assert outcome(mine.get_tensors) == outcome(his.get_tensors)


shapes = st.lists(st.integers(0, 4), max_size=3)
# One empty tensor at most: safetensors itself orders those of one offset at random.
tensors = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(st.sampled_from([d for d in DTYPE_BITS if DTYPE_BITS[d] >= 8]), shapes),
    max_size=5,
).filter(lambda found: sum(0 in shape for _, shape in found.values()) <= 1)
metadata = st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tensors, metadata, st.sampled_from(["pt", "np"]), st.sampled_from(["mmap", "pread"]), st.sampled_from([1, 8]))
def test_any_file_gives_what_safetensors_gives(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None, framework: str, backend: str, pad: int
) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(pack(tensors, metadata, pad))
        file.flush()
        assert_same(file.name, framework, backend=backend)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize("framework", ["pt", "np"])
@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype(tmp_path: Path, dtype: str, framework: str, backend: str) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(pack({"a": (dtype, [4, 8]), "odd": (dtype, [8, 3]), "z": (dtype, [0, 4])}))
    assert_same(str(path), framework, backend=backend)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_load_file_gives_the_same_dict_in_the_same_order(tmp_path: Path, backend: str) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(pack({"z": ("F32", [3]), "a": ("U8", [3]), "m": ("BF16", [2, 2]), "b": ("F64", [])}))
    assert outcome(lambda: ours.load_file(path, backend=backend)) == outcome(
        lambda: safetensors.torch.load_file(path, backend=backend)
    )


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def changed(**fields: Any) -> bytes:
    return json.dumps({"a": GOOD["a"] | fields}).encode()


HOSTILE = {
    "empty": b"",
    "short": b"abc",
    "length only": bytes(8),
    "no header": (2).to_bytes(8, "little"),
    "header past the end": (1000).to_bytes(8, "little") + b"{}",
    "header too large": (100_000_001).to_bytes(8, "little") + b"{}",
    "header at the limit": (100_000_000).to_bytes(8, "little") + b"{}",
    "header of all": b"\xff" * 64,
    "no tensors": pack_raw(b"{}", b""),
    "no tensors, but bytes": pack_raw(b"{}", b"x"),
    "not JSON": pack_raw(b"hello", b""),
    "cut JSON": pack_raw(b'{"a": {"dty', b""),
    "an array": pack_raw(b"[]", b""),
    "spaces before": pack_raw(b"  " + changed(), bytes(8)),
    "not UTF-8": pack_raw(b'{"\xff": 1}', b""),
    "deep": pack_raw(b'{"a":' + b"[" * 5000, b""),
    "NaN": pack_raw(b'{"a": NaN}', b""),
    "truncated": pack_raw(changed(), bytes(7)),
    "trailing": pack_raw(changed(), bytes(9)),
    "gap": pack_raw(changed(data_offsets=[4, 12]), bytes(12)),
    "backwards": pack_raw(changed(data_offsets=[8, 0]), bytes(8)),
    "negative": pack_raw(changed(data_offsets=[-8, 0]), bytes(8)),
    "huge offsets": pack_raw(changed(data_offsets=[0, 1 << 64]), bytes(8)),
    "three offsets": pack_raw(changed(data_offsets=[0, 8, 8]), bytes(8)),
    "wrong shape": pack_raw(changed(shape=[3]), bytes(8)),
    "shape overflows": pack_raw(changed(shape=[1 << 40, 1 << 40]), bytes(8)),
    "float shape": pack_raw(changed(shape=[2.0]), bytes(8)),
    "unknown dtype": pack_raw(changed(dtype="F128"), bytes(8)),
    "half a byte": pack_raw(changed(dtype="F4", shape=[1], data_offsets=[0, 1]), bytes(1)),
    "overlap": pack_raw(json.dumps(GOOD | {"b": {**GOOD["a"], "data_offsets": [4, 12]}}).encode(), bytes(12)),
    "metadata of numbers": pack_raw(b'{"__metadata__": {"a": 1}}', b""),
    "metadata null": pack_raw(b'{"__metadata__": null}', b""),
    "a name twice": pack_raw(b'{"a": %s, "a": %s}' % ((json.dumps(GOOD["a"]).encode(),) * 2), bytes(8)),
    "unknown field": pack_raw(changed(more=1), bytes(8)),
}


@pytest.mark.parametrize("framework", ["pt", "np"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_the_same_words(tmp_path: Path, name: str, framework: str) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(HOSTILE[name])
    expected = outcome(lambda: safetensors.safe_open(path, framework).get_tensors())
    assert outcome(lambda: ours.safe_open(path, framework).get_tensors()) == expected


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_header_with_changed_bytes(data: st.DataObject) -> None:
    content = bytearray(pack({"a": ("F32", [2, 3]), "b": ("U8", [5]), "c": ("BF16", [4])}, {"k": "v"}))
    size = 8 + int.from_bytes(content[:8], "little")
    for at in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3)):
        content[at] = data.draw(st.sampled_from(b'0123456789[]{}",: \xff') | st.integers(0, 255))
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        expected = outcome(lambda: safetensors.torch.load_file(file.name))
        assert outcome(lambda: ours.load_file(file.name)) == expected


class BytesPath(os.PathLike[bytes]):
    def __fspath__(self) -> bytes:
        return b"x"


ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("F", "pt", "cuda:x"), {}), (("F", "pt", "cuda:0:0"), {}), (("F", "pt", "mps:1"), {}), (("F", "pt", "meta"), {}),
    (("F", "pt", -1), {}), (("F", "pt", 1.5), {}), (("F", "np", "cuda"), {}), (("F", "np", 0), {}),
    (("F", "pt", None), {}), (("F", "np", None), {}), (("F", "zz"), {}), (("F", None), {}), (("F", "torch"), {}),
    (("F", "pytorch"), {}), (("F", "numpy"), {}), (("F", "jax"), {}), (("F", "flax"), {}), (("F", "tf"), {}),
    (("F", "mlx"), {}), (("F", "paddle"), {}), (("F", "pt"), {"backend": "x"}), (("F", "pt"), {"backend": None}),
    (("F", "pt"), {"more": 1}), (("/nowhere/f", "pt"), {}), (("", "pt"), {}), (("a\0b", "pt"), {}),
    (("/tmp", "pt"), {}), ((b"F", "pt"), {}), ((3, "pt"), {}), ((None, "pt"), {}), ((BytesPath(), "pt"), {}),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options"), ARGUMENTS)
def test_arguments_are_judged_alike(tmp_path: Path, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(pack({"a": ("F32", [2, 3])}))
    args = (path, *args[1:]) if args[0] == "F" else args
    expected = outcome(lambda: safetensors.safe_open(*args, **options).get_tensors())
    found = outcome(lambda: ours.safe_open(*args, **options).get_tensors())
    assert found == expected


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        ours.load_file(tmp_path / "none")
    assert str(caught.value) == f"No such file or directory: {tmp_path / 'none'}"


def test_a_closed_handle_and_names_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(pack({"a": ("F32", [2, 3])}))
    handles = ours.safe_open(path, "pt"), safetensors.safe_open(path, "pt")
    mine, his = ([outcome(lambda: h.get_tensor(n)) for n in ("b", 1, None)] for h in handles)  # noqa: B023
    assert mine == his
    mine, his = ([outcome(lambda: h.get_slice(n)) for n in ("b", 1, None)] for h in handles)  # noqa: B023
    assert mine == his
    taken = [h.get_slice("a") for h in handles]
    for handle in handles:
        assert handle.__exit__(None, None, None) is None
    for call in ("keys", "offset_keys", "metadata", "get_tensors"):
        assert outcome(getattr(handles[0], call)) == (safetensors.SafetensorError, "File is closed")
    for call in ("get_tensor", "get_slice"):
        assert outcome(lambda: getattr(handles[0], call)("a")) == (safetensors.SafetensorError, "File is closed")  # noqa: B023
    assert outcome(lambda: taken[0][:]) == outcome(lambda: taken[1][:])


def test_a_handle_is_hashable_and_neither_sized_nor_iterable(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(pack({"a": ("F32", [2, 3])}))
    handle = ours.safe_open(path, "pt")
    assert len({handle, handle}) == 1
    with pytest.raises(TypeError):
        len(handle)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        iter(handle)  # type: ignore[call-overload]
    assert not hasattr(handle, "prefetch_nothing")
