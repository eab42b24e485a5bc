"""What a command says and exits with when something is wrong: one line, and a code that means something."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.loop import wait_until
from tests.tools.conftest import Cli
from weightcache import errors
from weightcache.tools import exits

WRONG = [
    (("nope",), 2, "UsageError", "No such command 'nope'"),
    (("pull",), 2, "UsageError", "SOURCE"),
    (("ls", "--nope"), 2, "UsageError", "--nope"),
    (("evict", "--need", "much"), 2, "UsageError", "bytes are expected"),
    (("evict",), 2, "ConfigError", "--need SIZE"),
    (("evict", "--all", "--need", "1GB"), 2, "ConfigError", "--need SIZE"),
    (("ls", "--config", "/nope.toml"), 2, "ConfigError", "/nope.toml"),
    (("ls", "--log-level", "loud"), 2, "ConfigError", "debug, info"),
    (("daemon", "--listen", "here"), 2, "ConfigError", "listen"),
    (("daemon", "--listen", "10.0.0.1:7700"), 2, "ConfigError", "cluster_key_file"),
    (("daemon", "--store", ""), 2, "ConfigError", "store: ''"),  # "$NOT_SET" is not the default
    (("daemon", "--socket", "/proc/no.sock", "--log-level", "error"), 10, "DaemonError", "/proc/no.sock: No such"),
    (("path", "plain"), 2, "SourceError", "unknown scheme"),
    (("path", "s3://bucket/never-pulled"), 4, "UnknownBlob", "weightcache pull"),
    (("pin", "abcdef"), 4, "UnknownBlob", "weightcache ls"),
    (("pull", "file:///etc/hostname"), 5, "SourceDenied", "file_roots"),
    (("manifest", "/nope"), 4, "SourceNotFound", "no such file"),
    (("manifest", "/"), 3, "FormatError", "directory"),
    (("publish",), 2, "UsageError", "SOURCE"),
    (("publish", "file:///etc/hostname"), 5, "SourceDenied", "file_roots"),
    (("publish", "s3://bucket/key", "--to", "fleet"), 2, "ConfigError", "redis://"),
    (("publish", "s3://bucket/key", "--to", "fleat"), 2, "ConfigError", "./fleat"),
    (("status",), 10, "DaemonError", "weightcache daemon"),
    (("peers",), 10, "DaemonError", "weightcache daemon"),
]


@pytest.mark.parametrize(("arguments", "code", "name", "says"), WRONG, ids=lambda value: str(value)[:30])
def test_an_error_is_one_line_and_a_code(cli: Cli, arguments: tuple[str, ...], code: int, name: str, says: str) -> None:
    done = cli(*arguments)
    assert done.returncode == code
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("weightcache: error: ")
    assert says in line


@pytest.mark.parametrize(("arguments", "code", "name", "says"), WRONG[::3], ids=lambda value: str(value)[:30])
def test_with_json_it_is_an_object(cli: Cli, arguments: tuple[str, ...], code: int, name: str, says: str) -> None:
    done = cli(*arguments, "--json")
    assert done.returncode == code
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said["error"] == name
    assert says in said["message"]


def test_a_daemon_that_cannot_listen_says_so(cli: Cli, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = cli("daemon", "--listen", f"127.0.0.1:{taken.getsockname()[1]}", "--log-level", "error")
    assert done.returncode == errors.DaemonError.exit_code
    assert "in use" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_two_daemons_do_not_share_a_store(cli: Cli, environ: dict[str, str], tmp_path: Path) -> None:
    with _daemon(environ) as first:
        assert json.loads(_line(first))["event"] == "ready"
        done = cli("daemon", "--socket", str(tmp_path / "other.sock"), "--log-level", "error")
        assert done.returncode == errors.StoreInUse.exit_code
        assert "in use" in done.stderr
        status = cli("status", "--json")
        assert json.loads(status.stdout)["store"] == environ["WEIGHTCACHE_STORE"]
        assert cli("peers").stdout.startswith("none")
        first.terminate()
        assert first.wait(20) == 0
    assert cli("status").returncode == errors.DaemonError.exit_code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, exits.INTERRUPTED), (signal.SIGTERM, exits.TERMINATED)])
def test_a_signal_ends_a_command_quietly(environ: dict[str, str], tmp_path: Path, number: int, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an origin that never answers
        source = f"http://127.0.0.1:{silent.getsockname()[1]}/model.bin"
        allowed = environ | {"WEIGHTCACHE_ORIGIN_ALLOW": source, "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-m", "weightcache.tools", "pull", source]
        with subprocess.Popen(command, env=allowed, stdout=-1, stderr=-1, text=True) as process:
            silent.settimeout(20)
            silent.accept()
            process.send_signal(number)
            out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (code, "", "")
    assert not list(tmp_path.glob("weightcache-*"))


def test_a_reader_that_has_seen_enough_is_no_error(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(1 << 20))
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "weightcache.tools", "manifest", str(tmp_path / "file")]
    done = subprocess.run(command, env=environ, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (exits.BROKEN_PIPE, b"")


def test_streams_that_are_closed_or_full_end_it_with_its_own_code(environ: dict[str, str]) -> None:
    tool = f"{sys.executable} -m weightcache.tools"
    full = "weightcache: error: input or output: No space left on device; --log-level debug shows where\n"
    for command, code, said in (
        (f"{tool} ls >&-", 0, ""),
        (f"{tool} pull plain --json >&- 2>&- <&-", 2, ""),
        (f"{tool} ls >/dev/full", 1, full),
        (f"{tool} ls --json >/dev/full", 1, ""),
    ):
        done = subprocess.run(["sh", "-c", command], env=environ, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", said), command


def test_a_daemon_that_is_for_others_is_not_taken_for_none(environ: dict[str, str], tmp_path: Path) -> None:
    """Nor is the store tried then, which is that daemon's."""
    path = tmp_path / "daemon.sock"
    command = [sys.executable, "-m", "weightcache.tools", "ls", "--socket", str(path)]
    if os.geteuid() == 0:  # whom permissions would not stop
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(path))
        daemon.listen()
        path.chmod(0)
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == errors.DaemonError.exit_code
    assert f"socket {path}: Permission denied; it is for the daemon's user and group" in done.stderr
    assert not (tmp_path / "store").exists()


def test_who_may_not_have_the_store_hears_that_no_daemon_answers(cli: Cli, tmp_path: Path) -> None:
    done = cli("ls", "--store", "/proc/store")
    assert done.returncode == errors.StoreError.exit_code
    assert "no daemon answers at /proc/store/daemon.sock, and /proc/store: " in done.stderr


def test_temporary_files_may_lie_deeper_than_a_socket_can(cli: Cli, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    assert cli("ls", TMPDIR=str(deep)).returncode == 0


def test_what_nobody_foresaw_is_one_line_unless_asked(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import weightcache.tools.chunks as c; c.describe = lambda path: 1 / 0\n"
    )
    quiet = cli("manifest", "x", PYTHONPATH=str(tmp_path))
    assert quiet.returncode == 1
    assert quiet.stderr.count("\n") == 1
    assert "internal error: ZeroDivisionError" in quiet.stderr
    loud = cli("manifest", "x", "--log-level", "debug", PYTHONPATH=str(tmp_path))
    assert "Traceback" in loud.stderr


def test_what_an_origin_says_cannot_move_the_cursor(cli: Cli) -> None:
    done = cli("manifest", "/no\x1b[2Jpe")
    assert "\x1b" not in done.stderr


def test_every_error_has_a_code_that_the_help_tells(cli: Cli) -> None:
    said = cli("--help").stdout
    for name in errors.__all__:
        code = getattr(errors, name).exit_code
        assert 0 < code < 126
        (line,) = [line for line in said.splitlines() if line.split()[:1] == [str(code)]]
        assert name in line


def _daemon(environ: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "weightcache.tools", "daemon", "--json"]
    return subprocess.Popen(command, env=environ, stdout=-1, stderr=subprocess.DEVNULL, text=True)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return wait_until(process.stdout.readline, 20, "the daemon's line")
