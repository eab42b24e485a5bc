"""The ring's rules: what breaks without each of them, and what is left when a run ends early."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runtime.devices import Careless, Early, Failing, nobody_reads, over, readers
from tests.runtime.files import Arriving
from weightcache.errors import ConfigError, FormatError, LoadFailed
from weightcache.runtime.device import Accelerator, Host, Target, target_of
from weightcache.runtime.emulated import POISON, Emulated
from weightcache.runtime.opened import LocalFile, Opened
from weightcache.runtime.ring import Ring
from weightcache.runtime.streamer import Piece, Streamer

BUFFER = 1 << 16
SIZE = 40 * BUFFER + 12_345

DEVICES: dict[str, Callable[[], Target]] = {
    "cpu": Host, "emulated": Emulated, "checked": lambda: Emulated(checked=True),
    "eight readers": lambda: Emulated(checked=True, readers=8),
}  # fmt: skip


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[Target]:
    made = DEVICES[request.param]()
    yield made
    over(made)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "blob"
    found.write_bytes(np.random.default_rng(3).integers(0, 256, SIZE, np.uint8).tobytes())
    return found


def content(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, np.uint8))


def cut(file: Opened, into: torch.Tensor, step: int, size: int = SIZE) -> Iterator[Piece]:
    for begin in range(0, size, step):
        end = min(begin + step, size)
        yield Piece(file, begin, end, into[begin:end])


def streamed(path: Path, device: Target, step: int) -> torch.Tensor:
    into = torch.zeros(SIZE, dtype=torch.uint8)
    with Streamer(device, buffers=4, buffer_bytes=BUFFER) as streamer:
        indexes = list(streamer.copy(cut(LocalFile(str(path)), into, step)))
    assert indexes == list(range(len(indexes)))
    return into


@pytest.mark.parametrize("step", [777, BUFFER - 1, BUFFER, 5 * BUFFER + 1, SIZE])
def test_the_bytes_are_the_files(path: Path, device: Target, step: int) -> None:
    assert torch.equal(streamed(path, device, step), content(path))


@pytest.mark.parametrize("broken", [Careless, Early])
def test_without_the_wait_for_a_buffers_event_the_bytes_are_wrong(path: Path, broken: type[Emulated]) -> None:
    device = broken()
    assert not torch.equal(streamed(path, device, 10_000), content(path))
    device.close()


def test_a_checked_device_copies_at_the_last_moment_and_spoils_the_buffer() -> None:
    device = Emulated(checked=True)
    device.enter()
    stream, source, into = device.stream(), torch.ones(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    stream.copy(into, source)
    event = stream.record_event()
    assert not event.query()
    event.synchronize()
    assert event.query()
    assert into.tolist() == [1] * 8
    assert source.tolist() == [POISON] * 8
    device.close()


def test_a_thread_that_has_not_entered_the_device_is_found_out() -> None:
    device = Emulated()
    with pytest.raises(AssertionError, match="not set in this thread"):
        device.stream().copy(torch.zeros(1), torch.zeros(1))
    device.close()


def test_a_piece_is_said_when_its_bytes_are_there(path: Path, device: Target) -> None:
    into, whole = torch.zeros(SIZE, dtype=torch.uint8), content(path)
    with Streamer(device, buffers=2, buffer_bytes=BUFFER) as streamer:
        for index in streamer.copy(cut(LocalFile(str(path)), into, 50_000)):
            begin = index * 50_000
            assert torch.equal(into[begin : begin + 50_000], whole[begin : begin + 50_000])


def test_any_order_any_file_and_empty_pieces(path: Path, tmp_path: Path, device: Target) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(range(256)) * 100)
    files = [LocalFile(str(path)), LocalFile(str(other))]
    whole = [content(path), content(other)]
    wanted = [(0, 9_000, 9_500), (1, 5, 5), (1, 256, 4_000), (0, 3, BUFFER + 4), (0, 9_000, 9_500), (1, 0, 0)]
    pieces = [Piece(files[file], a, b, torch.zeros(b - a, dtype=torch.uint8)) for file, a, b in wanted]
    with Streamer(device, buffers=2, buffer_bytes=BUFFER) as streamer:
        assert list(streamer.copy(pieces)) == list(range(len(pieces)))
        for piece, (file, a, b) in zip(pieces, wanted, strict=True):
            assert torch.equal(piece.into, whole[file][a:b])
        assert list(streamer.copy(pieces[:1])) == [0]  # and again


def test_pieces_are_taken_only_as_far_ahead_as_the_ring_allows(path: Path, device: Target) -> None:
    into, taken = torch.zeros(SIZE, dtype=torch.uint8), 0

    def pieces() -> Iterator[Piece]:
        nonlocal taken
        for piece in cut(LocalFile(str(path)), into, BUFFER):
            taken += 1
            yield piece

    with Streamer(device, buffers=4, buffer_bytes=BUFFER) as streamer:
        for index in streamer.copy(pieces()):
            assert taken <= index + 1 + 4 + 2  # the one that fills the next block, and the one that shows it is full


def test_a_consumer_that_leaves_leaves_nothing(path: Path, device: Target) -> None:
    into = torch.zeros(SIZE, dtype=torch.uint8)
    descriptors = len(os.listdir("/proc/self/fd"))
    with Streamer(device, buffers=2, buffer_bytes=BUFFER) as streamer:
        for _ in range(20):
            run = streamer.copy(cut(LocalFile(str(path)), into, BUFFER))
            next(run)
            run.close()  # type: ignore[attr-defined]
            into.fill_(7)  # it is the caller's again: nobody may write to it
            for reader in readers():  # one that had just begun to wait for bytes
                reader.join(10)
            assert into.eq(7).all()
        assert len(list(streamer.copy(cut(LocalFile(str(path)), into, BUFFER)))) == 41  # no buffer was lost
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert torch.equal(into, content(path))


def test_a_file_that_is_cut_short_is_an_error_that_names_it(path: Path, device: Target) -> None:
    into = torch.zeros(SIZE, dtype=torch.uint8)
    with Streamer(device, buffers=2, buffer_bytes=BUFFER) as streamer:
        run = streamer.copy(cut(LocalFile(str(path)), into, BUFFER))
        assert next(run) == 0
        os.truncate(path, 30 * BUFFER + 5)
        with pytest.raises(FormatError, match=f"{path}: it ends at byte {30 * BUFFER + 5}, .* truncated"):
            list(run)
    assert torch.equal(into[: 30 * BUFFER], torch.cat([content(path)])[: 30 * BUFFER])


def test_a_load_that_fails_gives_what_it_had_then_its_error(tmp_path: Path, device: Target) -> None:
    data = np.random.default_rng(5).integers(1, 256, 10 * BUFFER, np.uint8).tobytes()
    opened = Arriving(tmp_path / "blob", data)
    opened.land(0, 3 * BUFFER)
    into = torch.zeros(len(data), dtype=torch.uint8)
    with Streamer(device, buffers=2, buffer_bytes=BUFFER) as streamer:
        run = streamer.copy(cut(opened, into, BUFFER, len(data)))
        got = [next(run) for _ in range(3)]
        opened.fail(LoadFailed("blob: no source is left for 3 chunks"))
        with pytest.raises(LoadFailed, match="no source is left"):
            next(run)
        opened.land(0, len(data))
        assert list(streamer.copy(cut(opened, into, BUFFER, len(data)))) == list(range(10))
    assert got == [0, 1, 2]
    assert bytes(into.numpy()) == data


def test_leaving_while_bytes_are_still_awaited_does_not_wait_for_them(tmp_path: Path, device: Target) -> None:
    data = bytes(range(256)) * 4096
    opened = Arriving(tmp_path / "blob", data)
    opened.land(0, BUFFER)
    into = torch.zeros(len(data), dtype=torch.uint8)
    streamer = Streamer(device, buffers=4, buffer_bytes=BUFFER)
    run = streamer.copy(cut(opened, into, BUFFER, len(data)))
    assert next(run) == 0
    opened.until(lambda: opened.blocked)
    streamer.close()
    with pytest.raises(ValueError, match="closed"):
        next(run)
    with pytest.raises(ValueError, match="closed"):
        next(streamer.copy([]))
    opened.land(0, len(data))  # whoever waited leaves, and writes nothing
    for thread in readers():
        thread.join(10)
    assert not into[BUFFER:].any()


def test_a_wait_in_another_thread_ends_when_the_streamer_is_closed(tmp_path: Path, device: Target) -> None:
    opened = Arriving(tmp_path / "blob", bytes(BUFFER))
    streamer = Streamer(device, buffers=2, buffer_bytes=BUFFER)
    errors = []

    def consume() -> None:
        try:
            list(streamer.copy([Piece(opened, 0, BUFFER, torch.zeros(BUFFER, dtype=torch.uint8))]))
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=consume)
    thread.start()
    opened.until(lambda: opened.blocked)
    streamer.close()
    thread.join(10)
    assert errors == ["the streamer is closed"]
    opened.land(0, BUFFER)
    for reader in readers():
        reader.join(10)


def test_what_the_device_raises_comes_out_and_the_rest_is_left_alone(path: Path) -> None:
    device = Failing(fails=5)
    into = torch.zeros(SIZE, dtype=torch.uint8)
    with (
        Streamer(device, buffers=2, buffer_bytes=BUFFER) as streamer,
        pytest.raises(RuntimeError, match="fallen off the bus"),
    ):
        list(streamer.copy(cut(LocalFile(str(path)), into, BUFFER)))
    nobody_reads()
    device.close()


def test_many_threads_share_one_streamer(path: Path, device: Target) -> None:
    whole, wrong = content(path), []
    with Streamer(device, buffers=2, buffer_bytes=BUFFER) as streamer:

        def consume(step: int) -> None:
            into = torch.zeros(SIZE, dtype=torch.uint8)
            device.enter()
            list(streamer.copy(cut(LocalFile(str(path)), into, step)))
            if not torch.equal(into, whole):
                wrong.append(step)

        threads = [threading.Thread(target=consume, args=(20_000 + 1000 * number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "into", [torch.zeros(9, dtype=torch.uint8), torch.zeros(10), torch.zeros(20, dtype=torch.uint8)[::2]]
)
def test_memory_that_does_not_fit_is_refused(path: Path, into: torch.Tensor) -> None:
    with Streamer() as streamer, pytest.raises(ValueError, match="piece 0: 10 contiguous bytes"):
        list(streamer.copy([Piece(LocalFile(str(path)), 0, 10, into)]))


def test_a_buffer_is_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="a power of two"):
        Ring(Host(), 2, 3 << 20)


def test_ctrl_c_ends_a_wait_for_the_network(tmp_path: Path) -> None:
    program = """
import os, signal, sys, threading, torch
from weightcache.runtime.streamer import Piece, Streamer
class Never:
    path = sys.argv[1]
    def wait(self, begin, end):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        threading.Event().wait()
    def close(self): pass
with Streamer() as streamer:
    list(streamer.copy([Piece(Never(), 0, 1, torch.zeros(1, dtype=torch.uint8))]))
"""
    (tmp_path / "blob").write_bytes(b"1")
    command = [sys.executable, "-c", program, str(tmp_path / "blob")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert done.returncode in (-2, 130)


def test_ctrl_c_at_any_call(tmp_path: Path) -> None:
    """Python delivers a signal after any call: of ``copy``, and of what it calls in threading and queue."""
    program = """
import dis, faulthandler, sys, torch
from weightcache.runtime.opened import LocalFile
from weightcache.runtime.streamer import Piece, Streamer

def interrupted(number):
    seen, previous = 0, {}
    def trace(frame, event, _):
        nonlocal seen
        frame.f_trace_opcodes = True
        if event == "opcode":
            now = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if previous.get(frame) in ("CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME", "CALL_KW"):
                seen += 1
                if seen == number:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            previous[frame] = now
        return trace
    try:
        with Streamer() as streamer:
            pieces = [Piece(LocalFile(sys.argv[1]), 0, 1, torch.zeros(1, dtype=torch.uint8)) for _ in range(3)]
            sys.settrace(trace)
            for _ in streamer.copy(pieces):
                pass
            sys.settrace(None)
        return False
    except BaseException as error:
        while not isinstance(error, KeyboardInterrupt):  # Thread.start itself may turn it into a RuntimeError
            error = error.__context__
        return True

number = 1
while True:
    faulthandler.dump_traceback_later(20, exit=True)
    if not interrupted(number):
        break
    number += 1
print(number)
"""
    (tmp_path / "blob").write_bytes(b"1")
    command = [sys.executable, "-c", program, str(tmp_path / "blob")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


def test_a_device_that_is_not_here_is_a_clear_error() -> None:
    assert isinstance(target_of(None), Host)
    if torch.accelerator.current_accelerator() is None:
        with pytest.raises(ConfigError, match="'cuda:1': it is not an accelerator of this torch; there is none here"):
            target_of("cuda:1")
    with pytest.raises(ConfigError, match="'foo'"):
        target_of("foo")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("step", [777, BUFFER, SIZE])
def test_a_real_gpu(path: Path, step: int) -> None:
    device = target_of("cuda")
    assert isinstance(device, Accelerator)
    into = device.allocate(SIZE).fill_(0)
    with Streamer(device, buffers=4, buffer_bytes=BUFFER) as streamer:
        list(streamer.copy(cut(LocalFile(str(path)), into, step)))
    assert torch.equal(into.cpu(), content(path))
    assert streamer.report.stages["copy"].size == SIZE
    shared = torch.zeros(BUFFER, dtype=torch.uint8).share_memory_()
    if device.register(shared):
        assert shared.is_pinned()
        device.unregister(shared)
    assert torch.ones(8, device=device.name).sum().item() == 8  # no error is pending
