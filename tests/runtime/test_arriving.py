"""Files of which a part has arrived: each tensor comes as soon as it can, never with bytes that were not had."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.runtime.files import Arriving, Background, pack, raw
from weightcache.core.layout import parse_header, plan_from_head
from weightcache.errors import LoadFailed, SourceError
from weightcache.runtime import load_file, safe_open

Make = Callable[[bytes], Arriving]

# Reads "begin end" lines, writes those bytes of argv[1] to argv[2], and answers each with the same line.
WRITER = """
import os, sys
data = open(sys.argv[1], "rb").read()
fd = os.open(sys.argv[2], os.O_WRONLY)
for line in sys.stdin:
    begin, end = map(int, line.split())
    os.pwrite(fd, data[begin:end], begin)
    print(line, end="", flush=True)
"""


def spans(data: bytes) -> tuple[int, dict[str, tuple[int, int]]]:
    header = parse_header(data)
    return header.data_start, {t.name: (t.begin, t.end) for t in header.tensors}


def body(data: bytes, name: str) -> bytes:
    begin, end = spans(data)[1][name]
    return data[begin:end]


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_a_tensor_comes_before_the_rest_of_the_file(arriving: Make, framework: str, backend: str) -> None:
    data = pack({name: ("F32", [100, 100]) for name in "abcd"})
    opened = arriving(data)
    start, at = spans(data)
    opened.land(0, start)
    with safe_open("any", framework, backend=backend) as file:
        assert file.keys() == ["a", "b", "c", "d"]
        opened.land(at["b"][0] - 4096, at["c"][0] + 4096)
        assert raw(file.get_tensor("b")) == body(data, "b")
        assert raw(file.get_slice("b")[10:20]) == body(data, "b")[4000:8000]
        waiting = Background(lambda: file.get_tensor("c"))
        opened.until(lambda: opened.blocked)
        opened.land(at["c"][0], len(data))
        assert raw(waiting.get()) == body(data, "c")


def test_opening_waits_for_the_header_and_no_more(arriving: Make) -> None:
    data = pack({"a": ("F32", [100, 100])}, {"key": "value"})
    opened = arriving(data)
    opening = Background(lambda: safe_open("any", "pt").metadata())
    opened.until(lambda: opened.blocked == (0, 8))
    opened.land(0, 8)
    opened.until(lambda: opened.blocked not in (None, (0, 8)))
    opened.land(8, spans(data)[0])
    assert opening.get() == {"key": "value"}


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("take", ["tensor", "slice", "array"])
def test_writing_to_a_tensor_never_freezes_the_bytes_its_neighbour_still_awaits(
    arriving: Make, first: str, second: str, take: str
) -> None:
    # The first write to a page of a private mapping copies the page as it is: with whatever the neighbour had by then.
    data = pack({"a": ("U8", [5000]), "b": ("U8", [5000])})
    opened = arriving(data)
    start, at = spans(data)
    opened.land(0, start)
    file = safe_open("any", "np" if take == "array" else "pt")

    def write() -> None:
        tensor = file.get_slice(first)[:] if take == "slice" else file.get_tensor(first)
        tensor[:] = 255

    opened.land(*at[first])
    writing = Background(write, opened.wake)
    opened.until(lambda: not writing.waits or opened.blocked)
    opened.land(*at[second])
    writing.get()
    assert raw(file.get_tensor(second)) == body(data, second)
    assert raw(file.get_tensor(first)) == b"\xff" * 5000
    assert Path(opened.path).read_bytes() == data


def test_the_last_page_ends_with_the_file(arriving: Make) -> None:
    data = pack({"a": ("U8", [10])})
    opened = arriving(data)
    opened.land(0, len(data))
    assert raw(load_file("any")["a"]) == body(data, "a")


def test_what_another_process_writes_chunk_by_chunk(arriving: Make, tmp_path: Path) -> None:
    data = pack({f"layer.{i}": ("BF16", [256, 257 + i]) for i in range(12)} | {"big": ("F32", [1500, 1500])}, pad=1)
    source = tmp_path / "source"
    source.write_bytes(data)
    opened = arriving(data)
    chunks = list(plan_from_head(len(data), data))
    assert len(chunks) > 3
    command = [sys.executable, "-c", WRITER, source, opened.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin
        assert writer.stdout
        loading = Background(lambda: load_file("any"))
        for offset, length in [chunks[0], *reversed(chunks[1:])]:
            writer.stdin.write(f"{offset} {offset + length}\n")
            writer.stdin.flush()
            begin, end = map(int, writer.stdout.readline().split())
            opened.landed(begin, end)
        writer.stdin.close()
    loaded = loading.get()
    assert {name: raw(tensor) for name, tensor in loaded.items()} == {name: body(data, name) for name in loaded}
    assert len(loaded) == 13


def test_what_safetensors_makes_itself_waits_for_the_whole_file(arriving: Make) -> None:
    data = pack({"a": ("F4", [64, 64]), "b": ("F32", [5000])})
    opened = arriving(data)
    opened.land(0, spans(data)[1]["b"][0])
    file = safe_open("any", "pt")
    waiting = Background(lambda: file.get_tensor("a"))
    opened.until(lambda: opened.blocked == (0, len(data)))
    opened.land(0, len(data))
    assert raw(waiting.get()) == body(data, "a")


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_a_load_that_fails_says_so_where_its_bytes_are_awaited(arriving: Make, backend: str) -> None:
    data = pack({"a": ("F32", [5000]), "b": ("F32", [5000])})
    opened = arriving(data)
    opened.land(0, spans(data)[1]["b"][0] + 4096)
    file = safe_open("any", "pt", backend=backend)
    waiting = Background(lambda: file.get_tensor("b"))
    opened.until(lambda: opened.blocked)
    opened.fail(LoadFailed("model.safetensors: no source is left for 3 chunks"))
    with pytest.raises(LoadFailed, match="no source is left"):
        waiting.get()
    assert raw(file.get_tensor("a")) == body(data, "a")


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_the_lease_lasts_as_long_as_the_last_tensor(arriving: Make, framework: str) -> None:
    data = pack({"a": ("F32", [5000]), "b": ("F32", [5000])})
    opened = arriving(data)
    opened.land(0, len(data))
    with safe_open("any", framework) as file:
        tensor = file.get_tensor("b")[7:]
    del file
    assert opened.closed == 0
    del tensor
    assert opened.closed == 1


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_a_slice_keeps_the_lease(arriving: Make, backend: str) -> None:
    data = pack({"a": ("F32", [5000])})
    opened = arriving(data)
    opened.land(0, len(data))
    with safe_open("any", "pt", backend=backend) as file:
        part = file.get_slice("a")
    assert opened.closed == 0
    assert raw(part[:]) == body(data, "a")
    del part
    assert opened.closed == 1


@pytest.mark.parametrize("data", [b"", b"abc", bytes(100), pack({"a": ("F32", [5])})[:-1]])
def test_the_lease_of_a_file_that_is_refused_is_given_up(arriving: Make, data: bytes) -> None:
    opened = arriving(data) if data else arriving(b"\0")
    opened.land(0, len(opened.data))
    with pytest.raises(Exception, match="header"):
        safe_open("any", "pt")
    assert opened.closed == 1


def test_a_source_is_the_clients_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack({"a": ("F32", [5])})
    opened = Arriving(tmp_path / "blob", data)
    opened.land(0, len(data))
    known = {"s3://bucket/model.safetensors": opened}

    def open_file(source: str) -> Arriving:
        if source not in known:
            raise SourceError(f"{source}: a directory; name one of its files: model.safetensors")
        return known[source]

    monkeypatch.setitem(sys.modules, "weightcache.openfile", SimpleNamespace(open_file=open_file))  # type: ignore[arg-type]
    assert raw(load_file("s3://bucket/model.safetensors")["a"]) == body(data, "a")
    with pytest.raises(SourceError, match=r"s3://bucket/: a directory"):
        load_file("s3://bucket/")
