"""``python -m bench.probe SOCKET``: ask for /v1/status 100 times a second until the input ends; prints the seconds that
each answer took, as JSON. ``--answer SOCKET``: a process that answers, and does nothing else."""

from __future__ import annotations

import json
import select
import socket
import sys
import time

REQUEST = b"GET /v1/status HTTP/1.1\r\nHost: daemon\r\nConnection: close\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
PERIOD = 0.01


def ask(path: str) -> float:
    began = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(REQUEST)
        got = b""
        while part := sock.recv(65536):
            got += part
    seconds = time.perf_counter() - began
    if not got.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"{path} answers {got[:100]!r}")
    return seconds


def probe(path: str) -> None:
    ask(path)
    print("begun", flush=True)
    found: list[float] = []
    due = time.perf_counter()
    while not select.select([sys.stdin], [], [], max(0.0, due - time.perf_counter()))[0]:
        seconds = ask(path)
        # Who would have asked while this answer was awaited would have waited for the rest of it.
        found += [seconds - late * PERIOD for late in range(int(seconds / PERIOD) + 1)]
        due = max(due + PERIOD, time.perf_counter())
    print(json.dumps(found))


def answer(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(64)
        while True:
            sock, _ = server.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(ANSWER)


if __name__ == "__main__":
    answer(sys.argv[2]) if sys.argv[1] == "--answer" else probe(sys.argv[1])
