"""Inference workers for the tests: Python processes that do what they are told, one statement after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.servers.loop import spawn

_PROGRAM = """
import json, sys
scope = {}
for line in sys.stdin:
    statements, expression = json.loads(line)
    try:
        exec(statements, scope)
        answer = [eval(expression, scope), None]
    except Exception as error:
        answer = [None, f"{type(error).__name__}: {error}"]
    print(json.dumps(answer), flush=True)
"""

# Many workers that share what one process has imported: each is a fork of it, and loads in one of its ``ways``.
CROWD = """
import hashlib, os

def digest(tensors):
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return state.hexdigest()

workers = []

def begin(count, source):
    for number in range(count):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                answer = digest(ways[number % len(ways)](source))
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(write, answer.encode())
            os._exit(0)
        os.close(write)
        workers.append((pid, read))
    return [pid for pid, _ in workers]

def collect():
    answers = []
    for pid, read in workers:
        answers.append(open(read).read())
        os.waitpid(pid, 0)
    workers.clear()
    return answers
"""


class WorkerError(Exception):
    """What a worker raised: its class and message."""


class Worker:
    """A process with ``env`` in which statements run; what it writes to stderr goes to ``log``."""

    def __init__(self, log: Path, env: dict[str, str]) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = spawn(
                [sys.executable, "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | env,
            )

    def start(self, statements: str, expression: str = "None") -> None:
        """Have it run something; the answer is for ``result``."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([statements, expression]).encode() + b"\n")
        self.process.stdin.flush()

    def result(self) -> Any:
        """The value of the expression that was started last. Raises WorkerError."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker ended: {self.log.read_text()}"
        value, error = json.loads(line)
        if error is not None:
            raise WorkerError(error)
        return value

    def run(self, statements: str, expression: str = "None") -> Any:
        self.start(statements, expression)
        return self.result()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """Let it end by itself; returns the exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
