"""``stream_file`` and ``stream_snapshot``: the tensors ``load_file`` gives, in the order asked for, as they land."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.runtime.devices import Failing, Small, nobody_reads, over, readers
from tests.runtime.files import Arriving, pack, pack_raw
from tests.runtime.test_arriving import spans
from weightcache.core.layout import DTYPE_BITS
from weightcache.errors import FormatError, LoadFailed
from weightcache.runtime import load_file, stream, stream_file, stream_snapshot
from weightcache.runtime.device import Host
from weightcache.runtime.emulated import Emulated

KINDS = [kind for kind in DTYPE_BITS if not kind.startswith("F6")]
MIXED = {f"{kind}.{i}": (kind, [i + 1, 6]) for i in range(3) for kind in KINDS} | {
    "empty": ("F32", [0, 3]),
    "scalar": ("F64", []),
    "large": ("BF16", [1000, 3001]),
}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.fixture(params=["cpu", "emulated"])
def device(request: pytest.FixtureRequest) -> Iterator[str | Emulated]:
    made = "cpu" if request.param == "cpu" else Emulated(checked=True)
    yield made
    over(made)


@pytest.mark.parametrize("pad", [1, 8])
def test_every_dtype_wherever_it_lies_is_what_load_file_gives(tmp_path: Path, device: str | Emulated, pad: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(MIXED, {"format": "pt"}, pad=pad))
    expected = load_file(path)
    streaming = stream_file(path, device=device)
    got = list(streaming)
    assert [name for name, _ in got] == list(expected)
    for name, tensor in got:
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert tensor.data_ptr() % tensor.element_size() == 0
        assert bits(tensor) == bits(expected[name])
    assert streaming.report.tensors == len(expected)


def test_names_say_which_and_in_what_order(tmp_path: Path, device: str | Emulated) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(MIXED))
    wanted = ["large", "F8_E4M3.1", "F32.0", "empty", "F32.0"]
    assert [name for name, _ in stream_file(path, device=device, names=wanted)] == wanted
    with pytest.raises(SafetensorError, match="File does not contain tensor nobody"):
        stream_file(path, names=["F32.0", "nobody"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_a_cast_is_that_of_to_and_concerns_floats_only(
    tmp_path: Path, device: str | Emulated, dtype: torch.dtype
) -> None:
    kinds = {"a": torch.float32, "b": torch.float16, "c": torch.bfloat16, "d": torch.float64, "e": torch.float8_e5m2}
    tensors = {name: torch.randn(100, 30).to(kind) for name, kind in kinds.items()}
    tensors |= {"i": torch.arange(5), "t": torch.tensor([True, False]), "z": torch.ones(3, dtype=torch.complex64)}
    save_file(tensors, tmp_path / "x.safetensors")
    got = dict(stream_file(tmp_path / "x.safetensors", device=device, dtype=dtype))
    for name, tensor in tensors.items():
        expected = tensor.to(dtype) if name in kinds else tensor
        assert got[name].dtype == expected.dtype
        assert bits(got[name]) == bits(expected)


def test_a_packed_dtype_is_not_cast(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"a": ("F4", [2, 8])}))
    assert dict(stream_file(path, dtype=torch.float16))["a"].dtype == torch.float4_e2m1fn_x2


@pytest.mark.parametrize(("kind", "shape"), [("F6_E2M3", [4, 8]), ("F4", [2, 1])])
def test_what_torch_cannot_hold_is_refused_as_safetensors_does(tmp_path: Path, kind: str, shape: list[int]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"a": (kind, shape)}))
    with pytest.raises(SafetensorError) as theirs:
        load_file(path)
    with pytest.raises(SafetensorError) as ours:
        list(stream_file(path))
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", bytes(100), pack({"a": ("F32", [5])})[:-1], pack({"a": ("F32", [5])}) + b"x", pack_raw(b"{", b"")],
)
def test_a_bad_file_is_refused_with_the_exception_of_load_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(SafetensorError, match="Error while deserializing header: "):
        load_file(path)
    with pytest.raises(SafetensorError, match="Error while deserializing header: "):
        stream_file(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    for wrong in (tmp_path / "nothing", tmp_path):
        with pytest.raises(OSError) as theirs:
            load_file(wrong)
        with pytest.raises(type(theirs.value), match="No such"):
            stream_file(wrong)


def test_tensors_are_owned(tmp_path: Path, device: str | Emulated) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(MIXED))
    kept = []
    for name, tensor in stream_file(path, device=device):
        before = bits(tensor)
        kept.append((name, tensor, before))
        tensor.view(torch.uint8).reshape(-1)[:1].fill_(0xFF) if tensor.dim() else None
    written = load_file(path)
    for name, tensor, before in kept:
        assert bits(tensor)[1:] == before[1:]  # and nobody else's first byte is in it
        assert bits(written[name]) == before


def test_a_tensor_comes_as_soon_as_its_bytes_do(arriving: Callable[[bytes], Arriving], device: str | Emulated) -> None:
    data = pack({name: ("F32", [1600, 1600]) for name in "abcd"})  # each of more than a buffer
    opened = arriving(data)
    start, at = spans(data)
    opened.land(0, start)
    streaming = stream_file("any", device=device)
    for name in "abcd":
        opened.land(*at[name])
        got, tensor = next(streaming)
        assert got == name
        assert bits(tensor) == data[slice(*at[name])]
    assert opened.closed == 0
    assert next(streaming, None) is None
    assert opened.closed == 1


def test_a_load_that_fails_in_the_middle(arriving: Callable[[bytes], Arriving], device: str | Emulated) -> None:
    data = pack({name: ("F32", [1600, 1600]) for name in "ab"})
    opened = arriving(data)
    _, at = spans(data)
    opened.land(0, at["a"][1])
    streaming = stream_file("any", device=device)
    assert next(streaming)[0] == "a"
    opened.fail(LoadFailed("model.safetensors: no source is left for 3 chunks"))
    with pytest.raises(LoadFailed, match="no source is left"):
        next(streaming)
    assert opened.closed == 1
    assert next(streaming, None) is None


def test_who_leaves_early_gives_the_lease_up_at_once(
    arriving: Callable[[bytes], Arriving], device: str | Emulated
) -> None:
    data = pack({name: ("F32", [1600, 1600]) for name in "ab"})
    opened = arriving(data)
    opened.land(0, spans(data)[1]["a"][1])
    with stream_file("any", device=device) as streaming:
        next(streaming)
        opened.until(lambda: opened.blocked)
    assert opened.closed == 1
    opened.land(0, len(data))
    for reader in readers():
        reader.join(10)


def test_a_stream_that_is_dropped_or_never_begun_leaves_nothing(tmp_path: Path, device: str | Emulated) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(MIXED))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        stream_file(path, device=device)
        next(stream_file(path, device=device))
        next(stream_snapshot(tmp_path, device=device))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_shrinks_meanwhile(tmp_path: Path, device: str | Emulated) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({f"{i:02}": ("F32", [1600, 1600]) for i in range(20)}))
    streaming = stream_file(path, device=device)
    assert next(streaming)[0] == "00"
    os.truncate(path, 150_000_000)
    with pytest.raises(FormatError, match="it ends at byte 150000000"):
        list(streaming)


def test_a_file_that_is_replaced_meanwhile_stays_the_one_that_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"a": ("U8", [9])}))
    streaming = stream_file(path)
    expected = bits(load_file(path)["a"])
    path.unlink()
    path.write_bytes(pack({"b": ("U8", [3])}))
    assert bits(dict(streaming)["a"]) == expected


def test_device_errors_come_out(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({name: ("F32", [1600, 1600]) for name in "abcd"}))
    with pytest.raises(RuntimeError, match="fallen off the bus"):
        list(stream_file(path, device=Failing(fails=3)))
    with pytest.raises(torch.OutOfMemoryError):
        list(stream_file(path, device=Small(25_000_000)))
    nobody_reads()


def test_a_small_tensor_keeps_no_more_than_its_slab(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({f"{i}": ("F32", [900, 900]) for i in range(30)}))
    sizes = {tensor.untyped_storage().nbytes() for _, tensor in stream_file(path)}
    assert sizes == {stream.SLAB}


# -- many files


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    for number, name in enumerate(("vae/x", "unet/b-2", "unet/a-1", "text_encoder_2/m", "text_encoder/m", "tiny/t")):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack({f"w{number}": ("F32", [3 if "tiny" in name else 1000, 300])}))
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "dead.safetensors").symlink_to("nowhere")
    return folder


ORDER = ["tiny/t", "text_encoder/m", "text_encoder_2/m", "unet/a-1", "unet/b-2", "vae/x"]


def test_a_directory_comes_in_the_order_of_its_use(pipeline: Path, device: str | Emulated) -> None:
    got = list(stream_snapshot(pipeline, device=device))
    assert [path for path, _, _ in got] == [f"{name}.safetensors" for name in ORDER]
    for path, name, tensor in got:
        assert bits(tensor) == bits(load_file(pipeline / path)[name])


def test_files_says_which_and_in_what_order(pipeline: Path) -> None:
    wanted = ["vae/*", "unet/a-1.safetensors", "unet/*"]
    found = [path for path, _, _ in stream_snapshot(pipeline, files=wanted)]
    assert found == ["vae/x.safetensors", "unet/a-1.safetensors", "unet/b-2.safetensors"]
    assert [path for path, _, _ in stream_snapshot(pipeline, files="tiny/*")] == ["tiny/t.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"unet/z\*: no safetensors file"):
        stream_snapshot(pipeline, files=["unet/z*"])
    with pytest.raises(FileNotFoundError, match="No such file"):
        stream_snapshot(pipeline / "nothing")


def test_one_file_is_a_snapshot_of_one(pipeline: Path) -> None:
    assert [path for path, _, _ in stream_snapshot(pipeline / "vae/x.safetensors")] == ["x.safetensors"]


# -- memory


@pytest.fixture
def long(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    layer = torch.zeros(1 << 19, dtype=torch.float32)
    save_file({f"{i:03}": layer.clone() for i in range(150)}, path)  # 315 MB
    return path


def test_host_memory_is_bounded_whatever_the_models_size(long: Path) -> None:
    command = [sys.executable, "-m", "bench.beyond", str(long)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < (64 << 20) / 1e6 + 64  # the ring, and 64 MB


def test_the_devices_memory_is_taken_as_tensors_come(long: Path) -> None:
    held = most = 0

    class Counting(Host):
        def allocate(self, size: int) -> torch.Tensor:
            nonlocal held, most
            memory = bytearray(size)
            held += size
            most = max(most, held)
            weakref.finalize(made := np.frombuffer(memory, np.uint8), give, size)
            return torch.from_numpy(made)

    def give(size: int) -> None:
        nonlocal held
        held -= size

    deque(stream_file(long, device=Counting()), maxlen=0)
    assert held == 0
    assert most <= 64 << 20
