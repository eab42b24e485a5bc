"""libtorrent's two ends, as processes: ``seed FILE META [HOST]`` writes the torrent and prints its port, and what it
has sent whenever its input has a line; ``fetch META HOST ADDRESS...`` reads the name of a folder, brings the torrent
there from those addresses (HOST:PORT), listening on HOST itself, and prints seconds; and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import libtorrent as lt

PIECE = 4 << 20
PORT = 6881  # of fetchers that have an address of their own
LOOPBACK = "127.0.0.1"
SETTINGS: Any = {
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_incoming_utp": False,
    "enable_outgoing_utp": False,
    "allow_multiple_connections_per_ip": True,
    "alert_mask": 0,
}


def wait(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.002)


def session(host: str, port: int = 0) -> Any:
    return lt.session(SETTINGS | {"listen_interfaces": f"{host}:{port}"})


def add(session: Any, info: Any, folder: Path) -> Any:
    """Add a torrent that begins at once; returns when what is there has been checked."""
    parameters = lt.add_torrent_params()
    parameters.ti, parameters.save_path = info, str(folder)
    parameters.flags &= ~(lt.torrent_flags.paused | lt.torrent_flags.auto_managed)
    torrent = session.add_torrent(parameters)
    checking = (lt.torrent_status.checking_files, lt.torrent_status.checking_resume_data)
    wait(lambda: torrent.status().state not in checking)
    return torrent


def seed(source: Path, meta: Path, host: str = LOOPBACK, piece: str = str(PIECE)) -> None:
    files = [lt.create_file_entry(source.name, source.stat().st_size)]
    torrent = lt.create_torrent(files, int(piece), lt.create_torrent.v1_only)
    lt.set_piece_hashes(torrent, str(source.parent))
    meta.write_bytes(lt.bencode(torrent.generate()))
    running = session(host)
    seeding = add(running, lt.torrent_info(str(meta)), source.parent)
    wait(lambda: seeding.status().is_seeding and running.listen_port())
    print(running.listen_port(), flush=True)
    for _ in sys.stdin:
        print(seeding.status().total_payload_upload, flush=True)


def fetch(meta: Path, host: str, others: Sequence[str]) -> None:
    running = session(host, PORT if host != LOOPBACK else 0)
    for folder in sys.stdin:
        torrent = add(running, lt.torrent_info(str(meta)), Path(folder.rstrip("\n")))
        began = time.perf_counter()
        for other in others:
            address, _, port = other.rpartition(":")
            torrent.connect_peer((address, int(port)))
        wait(lambda: torrent.status().is_seeding)  # noqa: B023 - it is over before the next one
        print(time.perf_counter() - began, flush=True)
        if host == LOOPBACK:  # in a swarm the others still want it
            running.remove_torrent(torrent)


if __name__ == "__main__":
    role, first, second, *more = sys.argv[1:]
    if role == "seed":
        seed(Path(first), Path(second), *more)
    else:
        fetch(Path(first), second, more)
