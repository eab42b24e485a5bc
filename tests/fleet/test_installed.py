"""Unmodified libraries take sources: models of several kinds, many workers at once, and what goes wrong meanwhile."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.fleet.daemons import Daemon, cli
from tests.fleet.models import BUILD, SWARM
from tests.fleet.test_snapshot_dirs import PIPELINE
from tests.fleet.weights import minilm
from tests.fleet.workers import CROWD, Worker
from tests.servers.hub import HubServer
from tests.servers.loop import wait_until
from tests.servers.s3 import S3Server

WORKERS = 20
_numbers = count()
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1", "TRANSFORMERS_VERBOSITY": "error"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("installed")


@pytest.fixture(scope="module")
def host(s3_server: S3Server, folder: Path) -> Iterator[Daemon]:
    options = ("--origin-timeout=100", f"--file-root={folder / 'models'}", f"--file-root={minilm()}")
    with Daemon(folder / "a", *options, env=s3_server.env()) as host:
        yield host


@pytest.fixture(scope="module")
def library(folder: Path, host: Daemon) -> Iterator[Worker]:
    """A process with transformers and, beside it, what is to be installed."""
    with Worker(folder / "log", OFFLINE | host.env | host.worker_env) as worker:
        worker.run(BUILD + "import weightcache.runtime as ours")
        yield worker


@pytest.fixture(scope="module")
def models(library: Worker, folder: Path) -> Path:
    library.run(f"build({str(folder / 'models')!r})")
    return folder / "models"


def put(s3: S3Server, bucket: str, folder: Path) -> str:
    for file in (path for path in folder.rglob("*") if path.is_file()):
        s3.put(bucket, f"{folder.name}/{file.relative_to(folder)}", file)
    return f"s3://{bucket}/{folder.name}/"


def test_transformers_gives_the_same_from_a_source(s3: S3Server, library: Worker, models: Path) -> None:
    shards = list((models / "llama").glob("*.safetensors"))
    assert len(shards) > 3
    for name, local, source in [
        ("bert", minilm(), f"file://{minilm()}/"),
        ("clip", models / "clip", put(s3, "models", models / "clip")),
        ("t5", models / "t5", f"file://{models}/t5"),
        ("llama", models / "llama", put(s3, "models", models / "llama")),
    ]:
        library.run(f"expected = {name}({str(local)!r})")
        library.run(f"with ours.installed(): found = {name}({source!r})")
        assert library.run("", "torch.equal(found, expected) and found.numel() > 0"), name
        library.run(f"with ours.installed(): again = {name}({str(local)!r})")
        assert library.run("", "torch.equal(again, expected)"), name
    words = f"AutoTokenizer.from_pretrained({str(minilm())!r})('some words')['input_ids']"
    library.run(f"with ours.installed(): found = {words.replace(str(minilm()), f'file://{minilm()}/')}")
    assert library.run("", f"found == {words}")


def test_diffusers_gives_the_same_image_from_a_source_and_reads_only_what_it_needs(
    s3: S3Server, hub: HubServer, tmp_path: Path
) -> None:
    host = Daemon(tmp_path / "a", env={"HF_ENDPOINT": hub.endpoint})
    with host, Worker(tmp_path / "log", OFFLINE | host.worker_env | {"HF_HUB_OFFLINE": "0"}) as worker:
        worker.run(PIPELINE + f"build({str(tmp_path)!r})\nimport weightcache.runtime as ours")
        model = tmp_path / "model"
        worker.run(f"model = {str(model)!r}; expected = image(model)")
        worker.run(f"with ours.installed(): found = image({put(s3, 'pipelines', model)!r})")
        assert worker.run("", "torch.equal(found, expected)")
        # As a repository is: the same weights as pickles, and in one file at the top.
        for extra in ("unet/diffusion_pytorch_model.bin", "v1-5-pruned.safetensors", "unet/model.onnx_data"):
            (model / extra).write_bytes(os.urandom(2 << 20))
        hub.publish("org/sd", model)
        weights = sum(path.stat().st_size for path in model.rglob("*model.safetensors"))
        worker.run("with ours.installed(): found = image('hf://org/sd')")
        assert worker.run("", "torch.equal(found, expected)")
        assert hub.cdn_bytes == weights
        worker.run("with ours.installed(hub=True): found = image('org/sd')")
        assert worker.run("", "torch.equal(found, expected)")
        assert hub.cdn_bytes == weights
        hub.close()
        worker.run("with ours.installed(hub=True): found = image('org/sd', local_files_only=True)")
        assert worker.run("", "torch.equal(found, expected)")
        assert [blob["leases"] for blob in leased(host)] == []


LORA = """
from peft import LoraConfig, get_peft_model_state_dict

def make_lora(model, folder):
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))

def lora_state(model, name, **options):
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.load_lora_weights(name, **options)
    return get_peft_model_state_dict(pipeline.unet, adapter_name="default_0")

def same(one, other):
    return len(one) > 3 and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
"""


def test_a_lora_comes_from_a_file_or_a_directory_of_a_source(s3: S3Server, library: Worker, tmp_path: Path) -> None:
    library.run(PIPELINE.replace("def build(", "def build_pipeline(") + LORA + f"build_pipeline({str(tmp_path)!r})")
    local, model, name = tmp_path / "lora", tmp_path / "model", "pytorch_lora_weights.safetensors"
    library.run(f"make_lora({str(model)!r}, {str(local)!r}); expected = lora_state({str(model)!r}, {str(local)!r})")
    (local / "another.safetensors").write_bytes(os.urandom(2 << 20))
    source = put(s3, "loras", local)
    s3.proxy.reset_counts()
    for given in (f"{source + name!r}", f"{source!r}, weight_name={name!r}"):
        library.run(f"with ours.installed(): found = lora_state({str(model)!r}, {given})")
        assert library.run("", "same(found, expected)")
    assert s3.proxy.egress < 1 << 20  # the other one is not wanted


def test_ids_of_the_hub_are_the_librarys_own_business_unless_asked_for(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("org/minilm", minilm())
    host = Daemon(tmp_path / "a", env={"HF_ENDPOINT": hub.endpoint})
    env = host.worker_env | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "theirs")}
    with host, Worker(tmp_path / "log", env) as worker:
        worker.run(BUILD + "import weightcache.runtime as ours")
        worker.run("with ours.installed(hub=True): found = bert('org/minilm', revision='main')")
        assert not (tmp_path / "theirs").exists()
        said = worker.run(
            """
kinds = []
with ours.installed(hub=True):
    for name in ("org/none", "hf://org/none", "s3://../x"):
        try:
            AutoModel.from_pretrained(name)
        except Exception as error:
            kinds.append([kind.__name__ for kind in type(error).__mro__])
""",
            "kinds",
        )
        assert "RepositoryNotFoundError" in said[0]
        assert "OSError" in said[0]
        assert "SourceDenied" in said[1]
        assert "SourceError" in said[2]
        worker.run("with ours.installed(): theirs = bert('org/minilm')")
        assert worker.run("", "torch.equal(found, theirs)")
        assert list((tmp_path / "theirs").glob("models--org--minilm"))


@pytest.fixture(scope="module")
def starter(host: Daemon, models: Path, folder: Path) -> Iterator[Worker]:
    """A process that starts workers."""
    with Worker(folder / "starter.log", OFFLINE | host.env | host.worker_env) as worker:
        shards = sorted(path.name for path in (models / "llama").glob("*.safetensors"))
        worker.run(f"shards = {shards!r}\n" + SWARM + CROWD)
        yield worker


@pytest.fixture
def swarm(s3: S3Server, starter: Worker, models: Path) -> Iterator[tuple[Worker, str, str]]:
    """What starts workers, a new source for them to load, and the digest of its tensors. Its bytes stall halfway."""
    digest = starter.run("", f"digest(whole({str(models / 'llama')!r}))")
    assert starter.run("", f"digest(files({str(models / 'llama') + '/'!r}))") == digest
    source = put(s3, f"swarm{next(_numbers)}", models / "llama")
    s3.proxy.reset_counts()
    s3.proxy.stall(r"\.safetensors$", after=1 << 20, times=1000)
    yield starter, source, digest
    s3.proxy.heal()
    starter.run("", "collect()")


def leased(host: Daemon) -> list[dict[str, object]]:
    with host.client() as client:
        return [blob for blob in client.ls()["blobs"] if blob["leases"]]


def most(host: Daemon) -> int:
    """How many hold the blob that most do: those that load file by file may all wait for the first one."""
    return max((int(str(blob["leases"])) for blob in leased(host)), default=0)


def weights(models: Path) -> int:
    return sum(path.stat().st_size for path in (models / "llama").glob("*.safetensors"))


def test_twenty_workers_are_one_download_and_one_that_is_killed_takes_nothing_with_it(
    s3: S3Server, host: Daemon, swarm: tuple[Worker, str, str], models: Path
) -> None:
    worker, source, digest = swarm
    pids = worker.run("", f"begin({WORKERS}, {source!r})")
    wait_until(lambda: most(host) == WORKERS, 60, "all workers to hold it")
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: most(host) == WORKERS - 1, 30, "the lease of the dead to be freed")
    s3.proxy.heal()
    assert worker.run("", "collect()") == [""] + [digest] * (WORKERS - 1)
    wait_until(lambda: not leased(host), 10, "all leases to end")
    small = 1 << 16  # configurations, listings
    assert weights(models) <= s3.proxy.egress <= weights(models) + small


def test_a_daemon_that_restarts_in_the_middle_goes_on(
    s3: S3Server, host: Daemon, swarm: tuple[Worker, str, str]
) -> None:
    worker, source, digest = swarm
    worker.run("", f"begin(6, {source!r})")
    wait_until(lambda: most(host) == 6, 60, "all workers to hold it")
    host.kill()
    s3.proxy.heal()
    host.start()
    assert worker.run("", "collect()") == [digest] * 6
    wait_until(lambda: not leased(host), 10, "all leases to end")


def test_an_origin_that_goes_away_for_good_is_a_clear_error(
    s3: S3Server, host: Daemon, swarm: tuple[Worker, str, str]
) -> None:
    worker, source, _ = swarm
    usual = host.options
    host.kill()
    host.options = [*usual, "--origin-attempts=1", "--origin-timeout=0.5"]
    host.start()
    host.options = usual
    worker.run("", f"begin(3, {source!r})")
    for answer in worker.run("", "collect()"):
        assert re.match(r"(LoadFailed|OriginUnavailable): .*s3://.*; try again", answer), answer
    wait_until(lambda: not leased(host), 10, "all leases to end")


def test_a_program_that_knows_nothing_of_it_runs_with_sources(host: Daemon, models: Path, s3: S3Server) -> None:
    source = put(s3, "run", models / "t5")
    program = "import sys; from transformers import AutoModel; print(AutoModel.from_pretrained(sys.argv[1]).dtype)"
    done = cli("run", sys.executable, "-c", program, source, env=host.worker_env | OFFLINE, timeout=100)
    assert done.stdout == "torch.float32\n", done.stderr
