"""Pipelines through a real daemon from a real origin: cold, overlapped, interrupted; LoRAs; swaps."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.fleet.daemons import Daemon
from tests.fleet.weights import tensors
from tests.fleet.workers import Worker
from tests.runtime import pipelines
from tests.servers.loop import accepts, spawn, wait_until
from tests.servers.s3 import S3Server
from weightcache import openfile
from weightcache.core.turns import ORIGIN_READ
from weightcache.errors import DaemonError, LoadFailed, SourceChanged, SourceError
from weightcache.openfile import OpenFile
from weightcache.runtime import load_lora, load_pipeline, report_of, swap, swapping, wait
from weightcache.tools.local import free_ports

BUCKET = "pipelines"
UNET = "unet/diffusion_pytorch_model.safetensors"
CHANGED = "mid_block.resnets.0.conv1.weight"  # 1.3 MB: it has a chunk of its own


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.saved_large_sd(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but for one large tensor."""
    pipe = DiffusionPipeline.from_pretrained(str(base))
    with torch.no_grad():
        pipe.unet.get_parameter(CHANGED).mul_(1.5)
    folder = tmp_path_factory.mktemp("tuned") / "model"
    pipe.save_pretrained(folder)
    return folder


def put(s3: S3Server, folder: Path, name: str) -> str:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        s3.put(BUCKET, f"{name}/{file.relative_to(folder)}", file)
    return f"s3://{BUCKET}/{name}/"


@pytest.fixture(scope="module")
def host(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("pipelines") / "a", env=s3_server.env()) as host:
        yield host


@pytest.fixture
def here(host: Daemon, s3: S3Server, works_for: Callable[[Daemon], None]) -> Iterator[S3Server]:
    """This process is a worker of the host's, which gets its files from here."""
    works_for(host)
    yield s3
    s3.proxy.heal()


def drawn(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipelines.KINDS["sd"].run(pipe)


def leases(host: Daemon) -> int:
    with host.client() as client:
        return sum(blob["leases"] for blob in client.ls()["blobs"])


def test_cold_the_prompt_is_encoded_while_the_denoiser_arrives(here: S3Server, host: Daemon, base: Path) -> None:
    source = put(here, base, "cold")
    stalled = here.proxy.stall(r"/cold/unet/.*safetensors", after=100_000, times=100)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(load_pipeline, source, overlap=True)
        wait_until(stalled.struck.is_set)
        here.proxy.release(stalled)  # the plan is made of its header
        here.proxy.heal()
        pipe = opening.result(60)
    theirs = DiffusionPipeline.from_pretrained(str(base))
    assert torch.equal(drawn(pipe), drawn(theirs))
    wait(pipe)
    report = report_of(pipe)
    assert report.fallbacks == []
    assert report.by_source()["origin"] > 1_000_000
    real = Path(pipe.config["_name_or_path"])
    assert pipe.unet.config["_name_or_path"] == str(real / "unet")
    assert pipe.text_encoder.name_or_path == str(real / "text_encoder")
    assert pipe.tokenizer.name_or_path == str(real / "tokenizer")
    assert (real / UNET).read_bytes() == (base / UNET).read_bytes()
    wait_until(lambda: not leases(host), 10, "leases to end with the load")
    again = load_pipeline(source)
    assert report_of(again).by_source()["local"] > 1_000_000
    assert torch.equal(drawn(again), drawn(theirs))


def test_the_daemon_restarts_in_the_middle(here: S3Server, host: Daemon, base: Path) -> None:
    source = put(here, base, "restarted")
    stalled = here.proxy.stall(r"/restarted/unet/.*safetensors", after=2 << 20, times=100)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_pipeline, source)
        wait_until(stalled.struck.is_set)
        host.kill()
        here.proxy.heal()
        host.start()
        try:
            pipe = loading.result(60)
        except (DaemonError, SourceChanged):  # of what had nothing yet, the new daemon makes another file
            pipe = load_pipeline(source)
    assert torch.equal(drawn(pipe), drawn(DiffusionPipeline.from_pretrained(str(base))))


def test_a_worker_that_is_killed_holds_nothing(here: S3Server, host: Daemon, base: Path, tmp_path: Path) -> None:
    source = put(here, base, "killed")
    stalled = here.proxy.stall(r"/killed/unet/.*safetensors", after=2 << 20, times=100)
    with Worker(tmp_path / "log", host.worker_env) as worker:
        worker.run("from weightcache.runtime import load_pipeline")
        worker.start(f"pipe = load_pipeline({source!r})")
        assert stalled.struck.wait(20)
        assert leases(host) > 0
        worker.kill()
    wait_until(lambda: not leases(host), 10, "leases to end")
    here.proxy.heal()
    assert torch.equal(drawn(load_pipeline(source)), drawn(DiffusionPipeline.from_pretrained(str(base))))


@pytest.mark.parametrize("embedded", [False, True], ids=["daemon", "embedded node"])
def test_a_worker_that_ends_before_its_pipeline_is_whole(
    here: S3Server, host: Daemon, base: Path, tmp_path: Path, embedded: bool
) -> None:
    source = put(here, base, f"ends-{embedded}")
    stalled = here.proxy.stall(rf"/ends-{embedded}/unet/.*safetensors", after=4 << 20, times=100)
    env = here.env() | {"WEIGHTCACHE_STORE": str(tmp_path / "own"), "WEIGHTCACHE_SOCKET": str(tmp_path / "none")}
    with Worker(tmp_path / "log", env if embedded else host.worker_env) as worker:
        worker.run(
            f"from weightcache.runtime import load_pipeline\npipe = load_pipeline({source!r}, overlap=True)", "None"
        )
        assert stalled.struck.wait(20)
        assert worker.end() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    wait_until(lambda: not leases(host), 10, "leases to end")


# -- LoRAs


def lora(folder: Path, base: Path, seed: int) -> Path:
    """A LoRA of the base's denoiser."""
    pipe = DiffusionPipeline.from_pretrained(str(base))
    torch.manual_seed(seed)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False))
    layers = peft.utils.get_peft_model_state_dict(pipe.unet)
    type(pipe).save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def test_a_lora_of_a_source_is_what_diffusers_makes_of_its_file(here: S3Server, base: Path, tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", base, 1)
    (file,) = folder.iterdir()
    here.put(BUCKET, "loras/one.safetensors", file)
    pipe = load_pipeline(put(here, base, "loras-base"))
    theirs = DiffusionPipeline.from_pretrained(str(base))
    plain = drawn(theirs)
    for source in (f"s3://{BUCKET}/loras/one.safetensors", put(here, folder, "lora-folder"), folder, file):
        report = load_lora(pipe, source, adapter_name="one")
        assert report.size == file.stat().st_size
        theirs.load_lora_weights(str(folder), adapter_name="one")
        assert torch.equal(drawn(pipe), drawn(theirs))
        assert not torch.equal(drawn(pipe), plain)
        for each in (pipe, theirs):
            each.unload_lora_weights()
        assert torch.equal(drawn(pipe), plain)


def test_the_lora_server(here: S3Server, host: Daemon, base: Path, tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", base, 1)
    source, port = put(here, folder, "served-lora"), free_ports(1)[0]
    example = Path(__file__).parents[2] / "examples" / "lora_server.py"
    command = [sys.executable, str(example), put(here, base, "served"), f"--port={port}"]
    asked = {"prompt": "a cat", "steps": 2, "size": 32, "seed": 0}

    def draw(**more: str) -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/", json.dumps(asked | more).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.headers["Content-Type"] == "image/png"
            return bytes(answer.read())

    server = spawn(command, env=os.environ | host.worker_env)
    try:
        wait_until(lambda: accepts(port), 60, "the server")
        plain, tuned = draw(), draw(lora=source)
        with pytest.raises(urllib.error.HTTPError, match="400"):
            draw(lora=f"s3://{BUCKET}/nowhere.safetensors")
        assert draw() == plain != tuned
    finally:
        server.kill()
        server.wait()
    pipe = DiffusionPipeline.from_pretrained(str(base))
    for data in (plain, tuned):
        noise = torch.Generator().manual_seed(0)
        image = pipe("a cat", num_inference_steps=2, height=32, width=32, generator=noise).images[0]
        assert list(Image.open(io.BytesIO(data)).getdata()) == list(image.getdata())
        pipe.load_lora_weights(str(folder))


def test_a_lora_does_not_wait_for_a_large_load(here: S3Server, host: Daemon) -> None:
    here.put(BUCKET, "large/unet.safetensors", tensors(20, ORIGIN_READ, seed=1))
    here.put(BUCKET, "light/lora.safetensors", tensors(1, 3 << 20, seed=2))
    stalled = here.proxy.stall(r"/large/.*safetensors$", after=1 << 20, times=1000)
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(host.pull, f"s3://{BUCKET}/large/unet.safetensors")
        assert stalled.struck.wait(20)
        host.pull(f"s3://{BUCKET}/light/lora.safetensors")
        assert not large.done()
        here.proxy.heal()
        large.result(60)


# -- swaps


@pytest.fixture
def both(here: S3Server, base: Path, tuned: Path) -> tuple[str, str]:
    return put(here, base, "swap-base"), put(here, tuned, "swap-tuned")


def test_a_swap_moves_what_differs_and_nothing_else(both: tuple[str, str], base: Path, tuned: Path) -> None:
    first, second = both
    pipe = load_pipeline(first)
    parameters = {name: (parameter, parameter.data_ptr()) for name, parameter in pipe.unet.named_parameters()}
    theirs = {
        first: DiffusionPipeline.from_pretrained(str(base)),
        second: DiffusionPipeline.from_pretrained(str(tuned)),
    }
    assert not torch.equal(drawn(theirs[first]), drawn(theirs[second]))
    changed = pipe.unet.get_parameter(CHANGED).nbytes
    for source in (second, first, second):
        report = swap(pipe, source)
        assert report.fallbacks == []
        assert changed <= report.size < 2 * changed  # small tensors ride in its last chunk
        assert torch.equal(drawn(pipe), drawn(theirs[source]))
        for name, (parameter, address) in parameters.items():
            found = pipe.unet.get_parameter(name)
            assert found is parameter
            assert found.data_ptr() == address
    assert swap(pipe, second).size == 0


def test_where_nobody_knows_what_differs_all_is_moved(base: Path, tuned: Path) -> None:
    pipe = load_pipeline(base)
    report = swap(pipe, tuned, components="unet")
    assert report.size == sum(parameter.nbytes for parameter in pipe.unet.parameters())
    assert "moved without comparing" in report.fallbacks[0]
    theirs = DiffusionPipeline.from_pretrained(str(tuned))
    assert torch.equal(drawn(pipe), drawn(theirs))
    plain = DiffusionPipeline.from_pretrained(str(base), dtype=torch.float16)
    plain.unet.float()
    swap(plain, tuned / UNET, components="unet")  # it may come from anywhere, and from a single file
    assert torch.equal(plain.unet.get_parameter(CHANGED), theirs.unet.get_parameter(CHANGED))


def test_weights_that_were_cast_are_swapped_cast(both: tuple[str, str], tuned: Path) -> None:
    pipe = load_pipeline(both[0], dtype=torch.float16)
    report = swap(pipe, both[1])
    assert report.fallbacks == []
    assert torch.equal(drawn(pipe), drawn(DiffusionPipeline.from_pretrained(str(tuned), dtype=torch.float16)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda found: found | {"conv_in.bias": torch.zeros(3)},
            r"conv_in.bias has shape \[3\], the pipeline's \[96\]",
        ),
        (lambda found: found | {"conv_in.bias": found["conv_in.bias"].double()}, "conv_in.bias is torch.float64"),
        (lambda found: found | {"strange": torch.zeros(3)}, "strange is unknown to the pipeline"),
        (lambda found: {k: v for k, v in found.items() if k != "conv_in.bias"}, r"1 tensors .* \(conv_in.bias\)"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    base: Path, tuned: Path, tmp_path: Path, change: Callable[[Any], Any], why: str
) -> None:
    pipe = load_pipeline(base)
    before = drawn(pipe)
    save_file(change(load_file(tuned / UNET)), tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match=why + ".*nothing was changed"):
        swap(pipe, tmp_path / "other.safetensors", components="unet")
    assert torch.equal(drawn(pipe), before)
    with pytest.raises(SourceError, match="the pipeline has no controlnet"):
        swap(pipe, tuned, components=["unet", "controlnet"])


class Cut(OpenFile):
    """A file that loses its end once all of it was there."""

    def wait(self, begin: int, end: int) -> None:
        if end == self.size:
            os.truncate(self.path, self.size // 2)


def test_a_swap_that_breaks_off_says_what_is_new(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(base)
    plain = DiffusionPipeline.from_pretrained(str(tuned))
    file = tmp_path / "half.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(tuned / UNET).items()}, file)
    wanted = load_file(file, backend="pread")
    whole = file.read_bytes()
    half = openfile.OpenSnapshot(str(tmp_path), [Cut(file.name, str(file), len(whole))], None)
    monkeypatch.setattr(swapping, "open_snapshot", lambda _: half)
    with pytest.raises(LoadFailed, match="swap again") as caught:
        swap(pipe, file, components="unet")
    monkeypatch.undo()
    found = re.search(r"broke off after (\d+) of (\d+) tensors; new: ([^;]*);", str(caught.value))
    assert found
    new = [name.removeprefix("unet.") for name in found[3].split(", ")]
    assert len(new) == int(found[1]) < int(found[2]) == len(wanted)
    assert all(torch.equal(pipe.unet.get_parameter(name), wanted[name]) for name in new)
    assert torch.equal(
        pipe.vae.state_dict()["decoder.conv_in.weight"], plain.vae.state_dict()["decoder.conv_in.weight"]
    )
    file.write_bytes(whole)
    assert swap(pipe, file, components="unet").size == sum(tensor.nbytes for tensor in wanted.values())
    assert all(torch.equal(pipe.unet.get_parameter(name), tensor) for name, tensor in wanted.items())


def footprint() -> tuple[int, int, int, int]:
    """Anonymous memory in bytes, objects, open files, threads."""
    gc.collect()
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10, len(gc.get_objects()), len(os.listdir("/proc/self/fd")), threading.active_count()


def test_a_hundred_swaps_and_loras_leave_nothing(
    both: tuple[str, str], here: S3Server, host: Daemon, base: Path, tmp_path: Path
) -> None:
    file = next(lora(tmp_path / "lora", base, 1).iterdir())
    here.put(BUCKET, "hundred.safetensors", file)
    pipe = load_pipeline(both[0])

    def once(number: int) -> None:
        swap(pipe, both[number % 2])
        load_lora(pipe, f"s3://{BUCKET}/hundred.safetensors", adapter_name="one")
        pipe.unload_lora_weights()

    for number in range(10):
        once(number)
    before = footprint()
    for number in range(100):
        once(number)
    after = footprint()
    assert after[0] - before[0] < 8 << 20
    assert after[1] - before[1] < 500
    assert after[2] <= before[2] + 2  # a connection that has not been closed yet
    assert after[3] <= before[3] + 1
    assert not pipe.unet._forward_pre_hooks
    wait_until(lambda: not leases(host), 10, "leases to end")
