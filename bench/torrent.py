"""libtorrent's two ends, as processes: ``seed FILE META`` writes the torrent and prints its port; ``fetch META PORT``
reads the name of a folder, brings the torrent there, and prints seconds; and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libtorrent as lt

PIECE = 4 << 20
SETTINGS: Any = {
    "listen_interfaces": "127.0.0.1:0",
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


def add(session: Any, info: Any, folder: Path) -> Any:
    """Add a torrent that begins at once; returns when what is there has been checked."""
    parameters = lt.add_torrent_params()
    parameters.ti, parameters.save_path = info, str(folder)
    parameters.flags &= ~(lt.torrent_flags.paused | lt.torrent_flags.auto_managed)
    torrent = session.add_torrent(parameters)
    checking = (lt.torrent_status.checking_files, lt.torrent_status.checking_resume_data)
    wait(lambda: torrent.status().state not in checking)
    return torrent


def seed(source: Path, meta: Path) -> None:
    files = [lt.create_file_entry(source.name, source.stat().st_size)]
    torrent = lt.create_torrent(files, PIECE, lt.create_torrent.v1_only)
    lt.set_piece_hashes(torrent, str(source.parent))
    meta.write_bytes(lt.bencode(torrent.generate()))
    session = lt.session(SETTINGS)
    seeding = add(session, lt.torrent_info(str(meta)), source.parent)
    wait(lambda: seeding.status().is_seeding and session.listen_port())
    print(session.listen_port(), flush=True)
    sys.stdin.read()


def fetch(meta: Path, port: int) -> None:
    session = lt.session(SETTINGS)
    for folder in sys.stdin:
        torrent = add(session, lt.torrent_info(str(meta)), Path(folder.rstrip("\n")))
        began = time.perf_counter()
        torrent.connect_peer(("127.0.0.1", port))
        wait(lambda: torrent.status().is_seeding)  # noqa: B023 - it is over before the next one
        print(time.perf_counter() - began, flush=True)
        session.remove_torrent(torrent)


if __name__ == "__main__":
    role, first, second = sys.argv[1:]
    if role == "seed":
        seed(Path(first), Path(second))
    else:
        fetch(Path(first), int(second))
