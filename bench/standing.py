"""A program that is up before a turn begins: it reads a line, does its work, and answers with the seconds it took."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.rounds import Unavailable
from tests.servers.loop import spawn

ROOT = Path(__file__).parent.parent


class Standing:
    """``python -m MODULE ARGUMENTS``, run with ``prefix``, started when it is first needed."""

    def __init__(
        self, module: str, *arguments: str, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        self._command = [*prefix, sys.executable, "-m", module, *arguments]
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def start(self) -> Self:
        if self._process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = spawn(self._command, cwd=ROOT, env=self._env, **pipes)
        return self

    def line(self) -> str:
        """What it says next. Raises Unavailable when it has ended."""
        self.start()
        assert self._process is not None
        assert self._process.stdout is not None
        said = self._process.stdout.readline().decode().strip()
        if not said:
            raise Unavailable(f"{self._command[-1]}: the process ended ({self._process.wait()})")
        return said

    def ask(self, work: object) -> str:
        """Have it do ``work``; what it answers."""
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{work}\n".encode())
        self._process.stdin.flush()
        return self.line()

    def seconds(self, work: object) -> float:
        """Have it do ``work``."""
        return float(self.ask(work))

    def pids(self) -> list[int]:
        return [self._process.pid] if self._process is not None else []
