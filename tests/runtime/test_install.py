"""``install``: what is replaced, that it changes nothing but sources, and that all of it is put back."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import transformers.modeling_utils
from diffusers import ModelMixin, SchedulerMixin
from diffusers.loaders import ip_adapter
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from tests.runtime.child import show
from tests.runtime.files import Arriving, pack, raw
from weightcache.runtime import install, installed, installing, loader, safe_open, uninstall
from weightcache.runtime.installing import STARTUP, VARIABLE
from weightcache.runtime.patches import METHODS

DATA = pack({"a": ("F32", [3, 2]), "b": ("BF16", [4])})


def bindings() -> dict[tuple[str, str], Any]:
    """The object behind every name that could be replaced, of every library that is imported."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or name.startswith("weightcache"):
            continue
        for key, value in list(vars(module).items()):
            if key == "safe_open" or "safe_open" in str(key):
                found[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {(f"{name}.{key}", method): vars(value)[method] for method in METHODS if method in vars(value)}
    return found


def variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    environment, path, before = variables(), list(sys.meta_path), bindings()
    yield
    uninstall()
    after = bindings()
    assert {key: after[key] for key in before if after[key] is not before[key]} == {}
    assert variables() == environment
    assert sys.meta_path == path


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A source whose bytes are all here; a path is left to the loader as it is."""
    real = loader.open_source

    def open_source(name: Any) -> Any:
        if str(name) != "s3://bucket/model.safetensors":
            return real(name)
        opened = Arriving(tmp_path / "blob", DATA)
        opened.land(0, len(DATA))
        return opened

    monkeypatch.setattr(loader, "open_source", open_source)
    return "s3://bucket/model.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DATA)
    return path


def test_what_safetensors_offers_takes_a_source(source: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.zeros(3, 2))

    install()
    expected = safetensors.torch.load(DATA)
    loaded = safetensors.torch.load_file(source)
    assert {name: raw(tensor) for name, tensor in loaded.items()} == {n: raw(t) for n, t in expected.items()}
    with safetensors.safe_open(source, framework="pt", device="cpu") as file:
        assert isinstance(file, safetensors.safe_open)
        assert isinstance(file, safe_open)
        assert raw(file.get_tensor("a")) == raw(expected["a"])
    with safetensors.safe_open(filename=source, framework="np") as file:
        assert raw(file.get_tensor("a")) == raw(expected["a"])
    model = Model()
    assert safetensors.torch.load_model(model, source, strict=False) == (set(), ["b"])
    assert raw(model.a.detach()) == raw(expected["a"])
    for bound in (transformers.modeling_utils.safe_open, ip_adapter.safe_open):  # bound when they were imported
        assert raw(bound(source, framework="pt").get_slice("a")[1:]) == raw(expected["a"][1:])


def test_a_local_path_is_opened_by_safetensors_itself(path: Path, tmp_path: Path) -> None:
    theirs = safetensors.safe_open
    odd = tmp_path / "dir" / "a:" / "b.safetensors"  # a path may hold "://", too
    odd.parent.mkdir(parents=True)
    odd.write_bytes(DATA)
    install()
    assert safetensors.safe_open is not theirs
    for name in (path, str(path), f"{tmp_path}/dir/a://b.safetensors"):
        file = safetensors.safe_open(name, "pt")
        assert type(file) is theirs
        assert isinstance(file, safetensors.safe_open)
    for arguments in ((), ("/nowhere", "pt"), (3, "pt"), (path, "zz"), (b"s3://x", "pt"), (path,)):
        outcomes = []
        for opener in (theirs, safetensors.safe_open):
            with pytest.raises(Exception) as caught:
                opener(*arguments)
            outcomes.append((caught.type, str(caught.value)))
        assert outcomes[0] == outcomes[1]


def test_what_took_ours_elsewhere_passes_on_after_uninstall(path: Path) -> None:
    theirs = safetensors.safe_open
    install()
    taken = safetensors.safe_open
    uninstall()
    assert safetensors.safe_open is theirs
    assert type(taken(path, "pt")) is theirs
    with pytest.raises(FileNotFoundError):
        taken("s3://bucket/x.safetensors", "pt")


def test_installing_twice_is_installing_once() -> None:
    before = bindings()
    install()
    once = bindings()
    install()
    assert {key for key, value in bindings().items() if value is not once[key]} == set()
    uninstall()
    assert {key for key, value in bindings().items() if value is not before[key]} == set()
    uninstall()


def test_blocks_nest_and_leave_what_was_installed_before() -> None:
    theirs = safetensors.safe_open
    with installed():
        ours = safetensors.safe_open
        with installed(hub=True):
            assert os.environ[VARIABLE] == "hub"
            assert safetensors.safe_open is ours
        assert os.environ[VARIABLE] == "1"
        uninstall()  # nothing was installed that way; the block goes on
        assert safetensors.safe_open is ours
        with pytest.raises(ZeroDivisionError), installed():
            _ = 1 / 0
        install()
    assert safetensors.safe_open is ours
    uninstall()
    assert safetensors.safe_open is theirs


def test_threads_that_install_and_leave_at_once_leave_nothing() -> None:
    theirs = safetensors.safe_open
    start = threading.Barrier(4)
    failures = []

    def work() -> None:
        try:
            start.wait()
            for _ in range(5):
                with installed():
                    assert safetensors.safe_open is not theirs
                    assert transformers.modeling_utils.safe_open is safetensors.safe_open
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert safetensors.safe_open is theirs


def test_methods_keep_their_signature_and_documentation() -> None:
    import inspect

    kinds = (PreTrainedModel, AutoModel, AutoTokenizer, AutoConfig, ModelMixin, SchedulerMixin)
    before = [(inspect.signature(kind.from_pretrained), kind.from_pretrained.__doc__) for kind in kinds]
    with installed():
        assert [(inspect.signature(kind.from_pretrained), kind.from_pretrained.__doc__) for kind in kinds] == before


def test_what_somebody_put_over_ours_is_left_to_him(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = classmethod(lambda cls, name: name)
    with installed(), monkeypatch.context() as patch:
        patch.setattr(ModelMixin, "from_pretrained", mine)
        installing.uninstall()
        with installed():
            assert ModelMixin.from_pretrained("x") == "x"


def python(program: str, **environ: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | environ, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SHOW = "import safetensors; print(safetensors.safe_open.__module__)"


def test_a_child_process_has_it_and_so_has_its_child() -> None:
    assert python(SHOW) == "builtins"
    install()
    assert python(SHOW) == "weightcache.runtime.patches"
    child = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {SHOW!r}], text=True))"
    assert python(child) == "weightcache.runtime.patches"
    uninstall()
    assert python(SHOW) == "builtins"


def test_a_child_that_needs_none_of_it_pays_for_none_of_it() -> None:
    install()
    loaded = "import sys; print({'torch', 'safetensors', 'numpy', 'aiohttp'} & set(sys.modules))"
    assert python(loaded) == "set()"


def test_the_sitecustomize_that_would_have_run_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.mine = __file__\n")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    install()
    program = f"import sys, sitecustomize; print(sys.mine == sitecustomize.__file__, {STARTUP!r} in sys.path); {SHOW}"
    found = python(program, PYTHONPATH=os.pathsep.join([STARTUP, paths]))
    assert found.split() == ["True", "False", "weightcache.runtime.patches"]


def test_a_python_without_weightcache_starts_all_the_same(tmp_path: Path) -> None:
    program = "import sitecustomize; print(sitecustomize.__file__)"
    other = Path(sys.base_prefix, "bin", "python3")  # that of which the virtual environment was made
    done = subprocess.run(
        [other, "-c", program], capture_output=True, text=True, cwd=tmp_path, env={VARIABLE: "1", "PYTHONPATH": STARTUP}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(Path(STARTUP) / "sitecustomize.py")


@pytest.mark.parametrize("how", ["spawn", "fork"])
def test_processes_of_multiprocessing_have_it(how: str) -> None:
    context = multiprocessing.get_context(how)
    install()
    queue = context.Queue()
    process = context.Process(target=show, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == "weightcache.runtime.patches"
    process.join()


def test_what_a_program_changed_in_the_environment_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/one")
    install()
    assert os.environ["PYTHONPATH"] == f"{STARTUP}{os.pathsep}/one"
    os.environ["PYTHONPATH"] += f"{os.pathsep}/two"
    uninstall()
    assert os.environ["PYTHONPATH"] == f"/one{os.pathsep}/two"
    assert VARIABLE not in os.environ
    monkeypatch.undo()


LATER = """
import sys, weightcache.runtime
with weightcache.runtime.installed():
    import safetensors.torch
    from transformers import AutoModel, PreTrainedModel, modeling_utils
    print(modeling_utils.safe_open.__module__, safetensors.torch.safe_open is modeling_utils.safe_open)
    for kind in (AutoModel, PreTrainedModel):
        try:
            kind.from_pretrained("file:///nowhere/")
        except Exception as error:
            print(type(error).__name__)
print(modeling_utils.safe_open.__module__, safetensors.torch.safe_open is modeling_utils.safe_open)
for kind in (AutoModel, PreTrainedModel):
    try:
        kind.from_pretrained("file:///nowhere/")
    except Exception as error:
        print(type(error).__name__)
"""


def test_libraries_that_are_imported_later_are_patched_and_put_back(tmp_path: Path) -> None:
    where = {"WEIGHTCACHE_STORE": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}
    found = python(LATER, **where).splitlines()
    ours = ["weightcache.runtime.patches True", "SourceDenied", "SourceDenied"]
    theirs = ["builtins True", "OSError", "OSError"]
    assert found == ours + theirs


@pytest.mark.parametrize("version", ["99.0", None])
def test_a_library_of_an_unknown_version_is_left_alone_with_a_warning(tmp_path: Path, version: str | None) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text(
        "class PeftModel:\n    @classmethod\n    def from_pretrained(cls, model_id):\n        return model_id\n"
    )
    if version:
        (tmp_path / f"peft-{version}.dist-info").mkdir()
        (tmp_path / f"peft-{version}.dist-info" / "METADATA").write_text(f"Name: peft\nVersion: {version}\n")
    program = f"""
import importlib.metadata as metadata, sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
if {version is None}:
    def version(name, real=metadata.version):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return real(name)
    metadata.version = version
warnings.simplefilter("always")
from weightcache.runtime import install
install()
with warnings.catch_warnings(record=True) as caught:
    import peft
print(peft.PeftModel.from_pretrained("s3://bucket/x/"), [str(warning.message) for warning in caught])
"""
    said = f"weightcache does not know version {version or 'unknown'} of peft, and leaves it as it is"
    assert python(program) == f"s3://bucket/x/ [{said!r}]"


def test_the_environment_alone_installs_where_the_runtime_is_imported() -> None:
    program = f"import weightcache.runtime; {SHOW}"
    assert python(program, WEIGHTCACHE_INSTALL="1") == "weightcache.runtime.patches"
    assert python(program, WEIGHTCACHE_INSTALL="0") == "builtins"
