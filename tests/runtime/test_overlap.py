"""``overlap=True``: each module waits for its own weights, when it is used, and is plain afterwards."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.runtime import pipelines
from tests.runtime.files import DEADLINE, Background
from tests.servers.loop import wait_until
from weightcache.errors import LoadFailed
from weightcache.openfile import OpenFile, OpenSnapshot, open_snapshot
from weightcache.runtime import load_pipeline, pipeline, report_of, wait


class Held(OpenSnapshot):
    """A local directory whose large files arrive when ``land`` says so."""

    def __init__(self, found: OpenSnapshot) -> None:
        self.snapshot = found
        self.closed = 0
        self._landed: set[str] = set()
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self.waiting = 0
        files = [Late(file, self) for file in found.files]
        super().__init__(found.directory, files, None)  # type: ignore[arg-type]

    def land(self, *components: str) -> None:
        with self._changed:
            self._landed |= set(components)
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        self.closed += 1
        self.fail(LoadFailed("closed"))

    def await_bytes(self, file: OpenFile, begin: int, end: int) -> None:
        component = file.name.partition("/")[0]
        if not file.name.endswith(".safetensors") or end <= 30_000 < file.size:  # its header
            return
        with self._changed:
            self.waiting += 1
            done = self._changed.wait_for(lambda: component in self._landed or self._error, DEADLINE)
            self.waiting -= 1
            assert done
            if component not in self._landed and self._error is not None:
                raise self._error


class Late(OpenFile):
    def __init__(self, file: OpenFile, held: Held) -> None:
        super().__init__(file.name, file.path, file.size)
        self._held = held

    def wait(self, begin: int, end: int) -> None:
        self._held.await_bytes(self, begin, end)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.save("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture
def held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """The snapshot that the next load opens."""
    found = Held(open_snapshot(folder))
    monkeypatch.setattr(pipeline, "open_snapshot", lambda _: found)
    yield found
    found.close()


TOKENS = torch.tensor([[52, 0, 1, 53]])


@pytest.mark.parametrize("mapped", [True, False])
def test_the_prompt_is_encoded_while_the_denoiser_arrives(folder: Path, held: Held, mapped: bool) -> None:
    pipe = load_pipeline("any", overlap=True, mapped=mapped)
    theirs = DiffusionPipeline.from_pretrained(str(folder))
    wait_until(lambda: held.waiting)
    held.land("text_encoder")
    assert torch.equal(pipe.text_encoder(TOKENS)[0], theirs.text_encoder(TOKENS)[0])
    assert type(pipe.text_encoder) is type(theirs.text_encoder)
    pipe.set_progress_bar_config(disable=True)
    drawing = Background(lambda: pipelines.KINDS["sd"].run(pipe))
    assert type(pipe.unet) is not type(theirs.unet)
    held.land("unet")
    wait_until(lambda: type(pipe.unet) is type(theirs.unet))
    assert drawing.waits
    held.land("vae", "safety_checker")
    theirs.set_progress_bar_config(disable=True)
    assert torch.equal(drawing.get(), pipelines.KINDS["sd"].run(theirs))
    wait(pipe)
    for name, component in theirs.components.items():
        if isinstance(component, torch.nn.Module):
            mine = getattr(pipe, name)
            assert type(mine) is type(component)
            assert vars(mine).keys() == vars(component).keys()
            assert not mine._forward_pre_hooks
            assert not mine._forward_hooks


def assert_plain(module: torch.nn.Module) -> None:
    assert type(module) is pipelines.AutoencoderKL


@pytest.mark.parametrize(
    "use",
    [
        lambda vae: vae.encode(torch.zeros(1, 3, 8, 8)),
        lambda vae: vae.decode(torch.zeros(1, 4, 4, 4)),
        lambda vae: vae(torch.zeros(1, 3, 8, 8)),
        lambda vae: vae.state_dict(),
        lambda vae: next(vae.parameters()).sum(),
        lambda vae: list(vae.named_buffers()),
        lambda vae: vae.to("cpu"),
        lambda vae: vae.half(),
        lambda vae: vae.decoder,
        lambda vae: vae._modules["decoder"],
        lambda vae: assert_plain(copy.deepcopy(vae)),
        lambda vae: assert_plain(copy.copy(vae)),
        lambda vae: assert_plain(pickle.loads(pickle.dumps(vae))),
        lambda vae: torch.nn.ModuleList([vae]).to(torch.float16),
        lambda vae: torch.compile(vae, backend="eager")(torch.zeros(1, 3, 8, 8)),
        lambda vae: vae.requires_grad_(False),
    ],
)
def test_every_use_waits_for_the_weights(held: Held, use: Callable[[Any], Any]) -> None:
    pipe = load_pipeline("any", overlap=True)
    using = Background(lambda: use(pipe.vae))
    held.land("text_encoder", "unet", "safety_checker")
    wait_until(lambda: held.waiting == 1 and not report_of(pipe).ended)
    assert using.waits
    held.land("vae")
    using.get()
    assert type(pipe.vae).__dict__.get("__getattribute__") is None


def test_what_a_pipeline_asks_beforehand_does_not_wait(folder: Path, held: Held) -> None:
    pipe = load_pipeline("any", overlap=True, dtype=torch.bfloat16)
    assert pipe.vae.config.latent_channels == 4
    assert (pipe.unet.dtype, pipe.unet.device.type) == (torch.bfloat16, "cpu")
    assert pipe.device.type == "cpu"
    assert pipe.text_encoder.config.hidden_size == pipelines.WIDTH
    assert isinstance(pipe.unet, pipelines.UNet2DConditionModel)
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    assert not hasattr(pipe.unet, "_hf_hook")
    held.land("text_encoder", "unet", "vae", "safety_checker")
    wait(pipe)
    theirs = DiffusionPipeline.from_pretrained(str(folder), dtype=torch.bfloat16)
    for key, tensor in theirs.unet.state_dict().items():
        assert torch.equal(tensor, pipe.unet.state_dict()[key])


def test_an_error_surfaces_where_the_module_is_used_and_in_wait(held: Held) -> None:
    pipe = load_pipeline("any", overlap=True)
    held.land("text_encoder")
    pipe.text_encoder(TOKENS)
    held.fail(LoadFailed("unet: no source is left for 3 chunks"))
    for _ in range(2):
        with pytest.raises(LoadFailed, match="no source is left"):
            pipe.unet.state_dict()
        with pytest.raises(LoadFailed, match="no source is left"):
            wait(pipe)
    with pytest.raises(LoadFailed, match="no source is left"):
        pipelines.KINDS["sd"].run(pipe)
    pipe.text_encoder(TOKENS)
    wait_until(lambda: held.closed)


def test_many_threads_use_a_module_at_once(folder: Path, held: Held) -> None:
    pipe = load_pipeline("any", overlap=True)
    users = [Background(lambda: pipe.text_encoder(TOKENS)[0]) for _ in range(8)]
    held.land("text_encoder")
    expected = DiffusionPipeline.from_pretrained(str(folder)).text_encoder(TOKENS)[0]
    assert all(torch.equal(user.get(), expected) for user in users)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_pipeline_that_is_dropped_is_not_loaded_any_further(held: Held, mapped: bool) -> None:
    pipe = load_pipeline("any", overlap=True, mapped=mapped)
    wait_until(lambda: held.waiting)
    report, module = report_of(pipe), weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert module() is None
    wait_until(lambda: held.closed and report.ended)


def test_a_load_that_is_broken_off_leaves_nothing(held: Held) -> None:
    before = set(threading.enumerate())
    loading = Background(lambda: load_pipeline("any"))
    wait_until(lambda: held.waiting)
    held.fail(LoadFailed("unplugged"))
    with pytest.raises(LoadFailed, match="unplugged"):
        loading.get()
    assert held.closed
    wait_until(lambda: not {t for t in threading.enumerate() if "weightcache" in t.name} - before)


def test_time_is_told_once_all_is_there(folder: Path) -> None:
    began = time.perf_counter()
    pipe = load_pipeline(folder, overlap=True)
    wait(pipe)
    report = report_of(pipe)
    assert report.ended is not None
    assert 0 < report.seconds <= time.perf_counter() - began
    assert report.tensors == sum(
        len(c.state_dict()) for c in pipe.components.values() if isinstance(c, torch.nn.Module)
    )
    assert "fell back" not in str(report)
