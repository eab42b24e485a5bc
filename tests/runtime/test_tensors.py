"""What a tensor is once handed out: writable, aligned, its own, and good for as long as somebody holds it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime.files import pack, raw
from weightcache.core.layout import parse_header
from weightcache.runtime import load_file, loader, safe_open
from weightcache.runtime.device import device_name, to_device
from weightcache.runtime.opened import LocalFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack({f"layer.{i}": ("F32", [64, 33]) for i in range(40)} | {"none": ("F16", [0, 3])}))
    path.chmod(0o444)
    return path


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_writing_to_a_tensor_changes_neither_the_file_nor_another_load(
    path: Path, framework: str, backend: str
) -> None:
    before = path.read_bytes()
    with safe_open(path, framework, backend=backend) as file, safe_open(path, framework, backend=backend) as other:
        expected = raw(other.get_tensor("layer.3"))
        first = file.get_tensor("layer.3")
        first[:] = 1
        assert raw(other.get_tensor("layer.3")) == expected
        assert raw(first) == np.ones((64, 33), np.float32).tobytes()
    assert path.read_bytes() == before


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_tensors_outlive_the_handle_and_the_files_name(path: Path, backend: str) -> None:
    data = path.read_bytes()
    at = {t.name: (t.begin, t.end) for t in parse_header(data).tensors}
    with safe_open(path, "pt", backend=backend) as file:
        part = file.get_slice("layer.9")
        tensors = file.get_tensors()
    path.unlink()
    del file
    gc.collect()
    assert {name: raw(tensor) for name, tensor in tensors.items()} == {n: data[b:e] for n, (b, e) in at.items()}
    assert raw(part[1:3]) == data[at["layer.9"][0] :][33 * 4 : 99 * 4]


def test_a_file_replaced_while_it_is_opened_is_not_mixed_with_the_new_one(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = path.read_bytes()
    new = tmp_path / "new"
    new.write_bytes(pack({"layer.0": ("U8", [64 * 33 * 4])}, pad=1))

    class Replaced(LocalFile):
        def wait(self, begin: int, end: int) -> None:
            if new.exists():
                new.replace(path)

    monkeypatch.setattr(loader, "open_source", lambda _: Replaced(str(path)))
    file = safe_open(path, "pt")
    assert not new.exists()
    begin = parse_header(data).data_start
    assert raw(file.get_tensor("layer.0")) == data[begin : begin + 64 * 33 * 4]
    assert file.get_slice("layer.0").get_dtype() == "F32"


@pytest.mark.parametrize(
    ("dtype", "framework"), [("BF16", "pt"), *((d, f) for d in ("F32", "F64", "C64") for f in ("pt", "np"))]
)
def test_misaligned_tensors_come_aligned(tmp_path: Path, dtype: str, framework: str) -> None:
    path = tmp_path / "f.safetensors"
    data = pack({"odd": ("U8", [3]), "x": (dtype, [300, 300]), "tail": ("U8", [1])})
    path.write_bytes(data)
    tensor = safe_open(path, framework).get_tensor("x")
    address = tensor.data_ptr() if framework == "pt" else tensor.ctypes.data
    assert address % tensor.itemsize == 0
    assert raw(tensor) == raw(tensor.copy() if framework == "np" else tensor.clone())
    found = parse_header(data).tensors[1]
    assert raw(tensor) == data[found.begin : found.end]


def test_tensors_of_one_file_share_one_mapping(path: Path) -> None:
    tensors = load_file(path)
    maps = Path("/proc/self/maps").read_text().splitlines()
    of_file = [line for line in maps if line.endswith(str(path))]
    assert len(of_file) == 1
    assert of_file[0].split()[1] == "rw-p"
    low, high = (int(part, 16) for part in of_file[0].split()[0].split("-"))
    assert all(low <= tensor.data_ptr() < high for tensor in tensors.values() if tensor.numel())


def test_nothing_is_left_mapped_or_open_when_all_is_dropped(path: Path) -> None:
    def held() -> int:
        mapped = Path("/proc/self/maps").read_text().count(str(path))
        return mapped + sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))

    for backend in ("mmap", "pread"):
        with safe_open(path, "pt", backend=backend) as file:
            tensors = file.get_tensors()
            part = file.get_slice("layer.1")
        assert held()
        del file, tensors, part
        assert not held()


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_slices_taken_first_are_read_by_four_threads_after_the_close(path: Path, framework: str, backend: str) -> None:
    expected = {name: raw(tensor) for name, tensor in load_file(path).items()}
    handle = safe_open(path, framework, backend=backend)
    slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - a handle is no dict
    handle.__exit__(None, None, None)

    def read(name: str) -> tuple[str, bytes]:
        return name, b"".join(raw(slices[name][i : i + 8]) for i in range(0, slices[name].get_shape()[0], 8))

    with ThreadPoolExecutor(4) as pool:
        found = dict(pool.map(read, list(slices) * 10))
    assert found == expected


def test_a_forked_child_has_the_tensors_and_its_writes_stay_its_own(path: Path) -> None:
    tensors = load_file(path)
    expected = raw(tensors["layer.5"])
    child = os.fork()
    if not child:
        good = tensors["layer.5"].numpy().tobytes() == expected
        tensors["layer.5"].numpy()[:] = 3
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert raw(tensors["layer.5"]) == expected


def test_a_default_device_changes_nothing(path: Path) -> None:
    with torch.device("meta"):
        tensors = load_file(path)
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    assert tensors["none"].shape == (0, 3)


def test_a_state_dict_loads_into_a_module_and_is_shared_not_copied(path: Path) -> None:
    tensors = load_file(path)
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.empty_like(tensor, device="meta")))
    module.load_state_dict({name.replace(".", "_"): tensor for name, tensor in tensors.items()}, assign=True)
    assert module.get_parameter("layer_7").data_ptr() == tensors["layer.7"].data_ptr()
    assert tensors["layer.7"].untyped_storage().nbytes() == 64 * 33 * 4


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (None, "cpu"),
        ("cuda", "cuda:0"),
        ("cuda:1", "cuda:1"),
        ("mps", "mps"),
        (2, 2),
        (torch.device("cuda", 1), "cuda:1"),
    ],
)
def test_devices_are_named_as_safetensors_names_them(device: Any, name: str | int) -> None:
    assert device_name(device) == name


def test_a_torch_device_is_taken_too(path: Path) -> None:
    assert load_file(path, torch.device("cpu"))["layer.0"].device.type == "cpu"


def test_a_tensor_goes_to_a_device_whatever_its_strides(path: Path) -> None:
    tensor = load_file(path)["layer.0"]
    assert to_device(tensor.T[3:], "meta").shape == (30, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_cuda(path: Path, backend: str) -> None:
    on_host = load_file(path)
    on_device = load_file(path, "cuda", backend=backend)
    assert {tensor.device for tensor in on_device.values()} == {torch.device("cuda", 0)}
    assert all(torch.equal(on_host[name], tensor.cpu()) for name, tensor in on_device.items())
    with safe_open(path, "pt", 0, backend=backend) as file:
        assert torch.equal(file.get_slice("layer.3")[4:6].cpu(), on_host["layer.3"][4:6])


def test_the_import_costs_what_torch_costs() -> None:
    script = """
import sys, torch, safetensors
before = set(sys.modules)
import weightcache.runtime
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["weightcache"]
