"""``python -m bench.beyond FILE``: stream a file's tensors, keep none, and print the MB held meanwhile, at most.

Counted is anonymous memory: the ring, and whatever else was allocated. What stands for the device's memory is shared
memory here, which is counted apart.
"""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import torch

from weightcache.runtime import stream_file
from weightcache.runtime.emulated import Emulated


class Apart(Emulated):
    """A device whose memory is not counted."""

    def allocate(self, size: int) -> torch.Tensor:
        if not size:
            return super().allocate(size)
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)

    def pinned(self, size: int) -> torch.Tensor:
        return super().allocate(size)


def anonymous() -> int:
    """Bytes of this process' memory that are no file's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) << 10


def main(path: str) -> None:
    before = most = anonymous()
    for _ in stream_file(path, device=Apart()):
        most = max(most, anonymous())
    print((most - before) / 1e6)


if __name__ == "__main__":
    main(sys.argv[1])
