"""The limit: two processes that do what a pull must do, and nothing else.

One sends a file's bytes over TCP; the other receives them into one warm buffer, chunk by chunk, hashes each with BLAKE3
and writes it to a file whose space is reserved. Both are up, and connected, before a turn begins. What a turn may do in
different ways is a Way; ``python -m bench landing`` compares them.

    python -m bench.bare send HOST FILE WAY             prints its port
    python -m bench.bare receive HOST PORT SIZE WAY     reads the name of a reserved file, prints seconds; and again
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import sys
import time
from dataclasses import dataclass

from blake3 import blake3
from xxhash import xxh3_128

CHUNK = 8 << 20
PIECE = 1 << 20
LOW_WATER = 512 << 10


@dataclass(frozen=True, slots=True)
class Way:
    """``pieces``: hash each piece of up to 1 MiB as it comes, instead of each chunk when it is whole. ``low_water``: be
    woken for 512 KiB."""

    sendfile: bool = False
    pieces: bool = False
    low_water: bool = False
    blake3: bool = True
    xxh3: bool = False

    def __str__(self) -> str:
        return ",".join(name for name in self.__slots__ if getattr(self, name)) or "plain"

    @classmethod
    def parse(cls, text: str) -> Way:
        return cls(**{name: name in text.split(",") for name in cls.__slots__})


def send(host: str, path: str, way: Way) -> None:
    with open(path, "rb") as file, socket.create_server((host, 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
        size = os.fstat(file.fileno()).st_size
        with connection, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while connection.recv(1):
                at = 0
                while at < size:
                    end = min(at + CHUNK, size)
                    if way.sendfile:
                        at += os.sendfile(connection.fileno(), file.fileno(), at, end - at)
                    else:
                        at += connection.send(data[at:end])


def receive(host: str, port: int, size: int, way: Way) -> None:
    buffer = memoryview(bytearray(CHUNK))
    with socket.create_connection((host, port)) as connection:
        for name in sys.stdin:
            target = os.open(name.rstrip("\n"), os.O_WRONLY)
            began = time.perf_counter()
            connection.send(b".")
            for offset in range(0, size, CHUNK):
                _land(connection, target, offset, buffer[: min(CHUNK, size - offset)], way)
            print(time.perf_counter() - began, flush=True)
            os.close(target)


def _land(connection: socket.socket, target: int, offset: int, chunk: memoryview, way: Way) -> None:
    hasher, care, got = blake3(), xxh3_128(), 0
    while got < len(chunk):
        count = _take(connection, chunk[got:], way)
        if way.pieces and way.blake3:
            hasher.update(chunk[got : got + count])
        if way.pieces and way.xxh3:
            care.update(chunk[got : got + count])
        got += count
    if way.blake3 and not way.pieces:
        hasher.update(chunk)
    hasher.digest()
    if way.xxh3 and not way.pieces:
        care.update(chunk)
    care.digest()
    os.pwrite(target, chunk, offset)


def _take(connection: socket.socket, rest: memoryview, way: Way) -> int:
    """The next bytes of a chunk."""
    if way.low_water:
        # Waiting apart from taking: what a blocking call has taken does not count as there when the kernel asks whether
        # enough has come, so it may wait for ever for the end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(LOW_WATER, len(rest)))
        select.select([connection], [], [])
    count = connection.recv_into(rest[:PIECE] if way.pieces else rest, 0, socket.MSG_DONTWAIT if way.low_water else 0)
    if not count:
        raise SystemExit("the sender is gone")
    return count


def main(role: str, host: str, *arguments: str) -> None:
    if role == "send":
        path, way = arguments
        send(host, path, Way.parse(way))
    else:
        port, size, way = arguments
        receive(host, int(port), int(size), Way.parse(way))


if __name__ == "__main__":
    main(*sys.argv[1:])
