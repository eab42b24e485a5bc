"""What keeps the code in shape: who imports whom, what is public, how long a file may be."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weightcache
import weightcache.errors
import weightcache.runtime  # type: ignore[import-not-found,unused-ignore]

ROOT = Path(__file__).parents[1]

# Imports go to an earlier line or stay in their part: what stands on one line never meets. "": the package itself.
LINES = (
    "errors version address waiting",
    "config log core portal",
    "store origin net directory",
    "node",
    "metrics dashboard",
    "daemon",
    "client",
    "openfile",
    "",
    "runtime",
    "tools",
)
LAYERS = {name: layer for layer, line in enumerate(LINES) for name in line.split(" ")}

CORE_LIBRARIES = {"msgpack", "blake3", "xxhash"}
# What touches the world outside: files, clocks, other threads and processes, the network.
IMPURE = {
    *("asyncio", "concurrent", "multiprocessing", "queue", "sched", "select", "selectors", "signal", "socket", "ssl"),
    *(
        "subprocess",
        "threading",
        "time",
        "datetime",
        "logging",
        "glob",
        "io",
        "os",
        "pathlib",
        "shutil",
        "sys",
        "tempfile",
    ),
    *("ctypes", "fcntl", "getpass", "http", "platform", "pwd", "resource", "secrets", "uuid"),
}
CORE_EXCEPTIONS = {
    "weightcache.core.landing": {"os", "time"},  # the one place that writes a chunk; it says how long that took
    "weightcache.core.manifest": {"sys"},  # byte order
}

TORCH = {"torch", "diffusers", "transformers", "accelerate"}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the product by the name it is imported by."""
    for path in sorted(ROOT.glob("weightcache/**/*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path
    for part in ("runtime", "tools"):
        for path in sorted(ROOT.glob(f"{part}/**/*.py")):
            inner = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield f"weightcache.{inner}", path


MODULES = dict(modules())


def imported(module: str) -> set[str]:
    """The absolute names of all that a module imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


def part(module: str) -> str:
    """The part of the design a module of ours belongs to."""
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    here = part(module)
    for name in imported(module):
        if name.partition(".")[0] != "weightcache":
            continue
        there = part(name)
        assert there == here or LAYERS[there] < LAYERS[here], f"{module} may not import {name}"


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) == "core"])
def test_core_is_pure(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    for name in imported(module):
        top = name.partition(".")[0]
        if top == "weightcache":
            assert part(name) in ("core", "errors"), f"{module} imports {name}"
            continue
        assert top in CORE_LIBRARIES | sys.stdlib_module_names, f"{module} imports {name}"
        assert top not in IMPURE - CORE_EXCEPTIONS.get(module, set()), f"{module} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input"), f"{module}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", f"{module}:{node.lineno}: the global random"


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) != "runtime"])
def test_only_the_runtime_names_torch(module: str) -> None:
    assert not {name.partition(".")[0] for name in imported(module)} & TORCH


def test_nothing_below_the_runtime_loads_torch() -> None:
    below = [name for name in MODULES if LAYERS[part(name)] < LAYERS["runtime"] and not name.endswith("__main__")]
    program = f"import sys, importlib\nfor name in {below!r}: importlib.import_module(name)\n"
    program += f"print(sorted({TORCH!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_runtime_loads_no_library_before_it_is_needed() -> None:
    program = (
        "import sys, weightcache.runtime\nprint(sorted({'diffusers', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("package", "names"),
    [
        (
            weightcache,
            """Client Config SyncClient load_config __version__
            WeightcacheError ConfigError FormatError SourceError SourceNotFound SourceDenied SourceChanged
            OriginUnavailable LoadFailed StoreError StoreFull StoreInUse BlobCorrupt ProtocolError AuthError
            DaemonError UnknownBlob""",
        ),
        (
            weightcache.runtime,
            """install installed load load_file load_model safe_open snapshot_download uninstall
            stream_file stream_snapshot LoadReport load_pipeline load_lora report_of swap wait""",
        ),
    ],
)
def test_what_is_public_changes_only_on_purpose(package: object, names: str) -> None:
    public = package.__all__  # type: ignore[attr-defined]
    assert sorted(public) == sorted(names.split())
    for name in public:
        assert getattr(package, name) is not None


def test_the_tree_of_errors_is_the_one_that_is_drawn() -> None:
    drawn: dict[str, str] = {}
    line_of_descent: list[str] = []
    for indent, name in re.findall(
        r"^    ([│├└─ ]*)(\w+)(?: {2,}\S.*)?$", weightcache.errors.__doc__ or "", re.MULTILINE
    ):
        depth = len(indent) // 4
        line_of_descent[depth:] = [name]
        drawn[name] = line_of_descent[depth - 1] if depth else "Exception"
    classes = inspect.getmembers(weightcache.errors, inspect.isclass)
    assert drawn == {name: found.__base__.__name__ for name, found in classes if found.__base__ is not None}


def test_no_file_is_longer_than_a_reader_bears() -> None:
    folders = ("weightcache", "runtime", "tools", "tests", "bench", "examples")
    lengths = {path: path.read_text().count("\n") for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")}
    assert len(lengths) > 20
    assert not {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 500}
