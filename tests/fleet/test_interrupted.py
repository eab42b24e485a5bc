"""One pipeline, loaded in every way there is, while workers are killed, daemons restart, and interpreters end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.daemons import Daemon
from tests.fleet.workers import CROWD, Worker
from tests.runtime import pipelines
from tests.servers.loop import wait_until
from tests.servers.proxy import Fault
from tests.servers.s3 import S3Server

WORKERS = 20
UNET = "unet/diffusion_pytorch_model.safetensors"
LOAD = """
import os, signal, sys, threading, torch
from concurrent.futures import ThreadPoolExecutor
torch.set_num_threads(1)
from weightcache.runtime import LoadReport, load_file, load_pipeline, safe_open, stream_snapshot, wait
from weightcache.runtime.emulated import Emulated

def files(source):
    paths = ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model")
    return {f"{path.partition('/')[0]} {name}": tensor
            for path in paths for name, tensor in load_file(f"{source}{path}.safetensors").items()}

def streamed(source):
    found = stream_snapshot(source, device=Emulated(checked=True))
    return {f"{path.partition('/')[0]} {name}": tensor for path, name, tensor in found}

def of(pipe):
    wait(pipe)
    return {f"{part} {name}": tensor for part in ("unet", "text_encoder", "vae")
            for name, tensor in getattr(pipe, part).state_dict().items()}

def whole(source):
    return of(load_pipeline(source))

def overlapped(source):
    return of(load_pipeline(source, overlap=True, mapped=False))

ways = (files, streamed, whole, overlapped)

def leave(source, last):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        pipe = load_pipeline(source, overlap=True)
        pipe.text_encoder.state_dict()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        os.write(write, b"built")
        exec(last)
    os.close(write)
    assert os.read(read, 5) == b"built"
    os.close(read)
    return pid
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.saved_large_sd(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def host(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("interrupted") / "a", env=s3_server.env()) as host:
        yield host


@pytest.fixture(scope="module")
def worker(host: Daemon, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(tmp_path_factory.mktemp("worker") / "log", host.worker_env) as worker:
        worker.run(LOAD + CROWD + f"expected = digest(whole({str(folder)!r}))")
        yield worker


@pytest.fixture
def source(s3: S3Server, folder: Path, request: pytest.FixtureRequest) -> str:
    """The pipeline, where no other test has it."""
    name = f"pipelines/{abs(hash(request.node.name))}"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        s3.put("interrupted", f"{name}/{file.relative_to(folder)}", file)
    s3.proxy.reset_counts()
    return f"s3://interrupted/{name}/"


@pytest.fixture
def stalled(s3: S3Server, source: str) -> Fault:
    """Of the denoiser comes what is read with its header, and nothing that follows."""
    return s3.proxy.stall(r"/unet/.*safetensors", times=1000, begin=1 << 20)


def leases(host: Daemon) -> int:
    """How many hold the blob that most hold."""
    with host.client() as client:
        return max((blob["leases"] for blob in client.ls()["blobs"]), default=0)


def test_twenty_workers_are_one_download_and_those_that_are_killed_take_nothing_with_them(
    s3: S3Server, host: Daemon, worker: Worker, folder: Path, source: str, stalled: Fault
) -> None:
    pids = worker.run("", f"begin({WORKERS}, {source!r})")
    assert stalled.struck.wait(60)
    wait_until(lambda: leases(host) == WORKERS, 60, "all workers to hold it")
    for pid in pids[:4]:  # one that loads in each way
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: leases(host) == WORKERS - 4, 60, "the leases of the dead to be freed")
    s3.proxy.heal()
    answers = worker.run("", "[answer and answer == expected or answer for answer in collect()]")
    assert answers == [""] * 4 + [True] * (WORKERS - 4)
    wait_until(lambda: not leases(host), 10, "all leases to end")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size <= s3.proxy.egress < size + (1 << 16)  # listings


@pytest.mark.parametrize("options", ["overlap=True", "overlap=False", "overlap=True, device=Emulated()"])
def test_the_daemon_restarts_once_the_modules_are_built(
    s3: S3Server, host: Daemon, worker: Worker, source: str, stalled: Fault, options: str
) -> None:
    worker.run(
        "report = LoadReport()\n"
        f"loading = ThreadPoolExecutor(1).submit(load_pipeline, {source!r}, report=report, {options})"
    )
    assert stalled.struck.wait(60)
    wait_until(lambda: worker.run("", "'build' in report.stages"), 60, "the modules")
    host.kill()
    s3.proxy.heal()
    host.start()
    assert worker.run("pipe = loading.result()", "digest(of(pipe)) == expected")
    assert worker.run("", "report.fallbacks") == []
    assert "load interrupted" in worker.log.read_text()
    wait_until(lambda: not leases(host), 10, "all leases to end")
    worker.run("del pipe")


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("sys.exit(3)", 3),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("pipe.unet.state_dict()  # SIGTERM", 5),
    ],
)
def test_an_interpreter_ends_in_mid_load(
    host: Daemon, worker: Worker, source: str, stalled: Fault, last: str, code: int
) -> None:
    said = worker.log.read_text()
    pid = worker.run("", f"leave({source!r}, {last!r})")
    if "SIGTERM" in last:
        os.kill(pid, signal.SIGTERM)
    _, status = wait_until(lambda: worker.run("", f"(found := os.waitpid({pid}, os.WNOHANG))[0] and found"), 60)
    assert os.waitstatus_to_exitcode(status) == code
    more = worker.log.read_text().removeprefix(said)
    assert more.count("Traceback") == (1 if code == -signal.SIGINT else 0), more
    wait_until(lambda: not leases(host), 10, "all leases to end")


def test_a_fork_in_mid_load_has_an_error_and_no_wait(
    host: Daemon, worker: Worker, source: str, stalled: Fault, s3: S3Server
) -> None:
    """In the child nobody hears of bytes, whatever the parent hears."""
    worker.run(f"pipe = load_pipeline({source!r}, overlap=True); late = safe_open({source + UNET!r}, 'pt')")
    worker.run("ways = (lambda _: pipe.unet.state_dict(), lambda _: late.get_tensors())")
    worker.run("", "begin(2, '')")
    said = worker.run("", "collect()")
    assert [answer.partition(":")[0] for answer in said] == ["LoadFailed", "DaemonError"]
    assert all("forked while" in answer for answer in said)
    s3.proxy.heal()
    assert worker.run("", "digest(of(pipe)) == expected")
    worker.run("del pipe, late, ways")
