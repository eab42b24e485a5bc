"""The Run:ai streamer as a process: ``python -m bench.streamer SIZE`` reads the address of an object of that size,
brings it into memory, and prints seconds; and again."""

from __future__ import annotations

import sys
import time

from runai_model_streamer import FileStreamer
from runai_model_streamer.file_streamer import FileChunks

CHUNK = 8 << 20


def main(size: int) -> None:
    starts = list(range(0, size, CHUNK))
    for path in sys.stdin:
        began = time.perf_counter()
        with FileStreamer() as streamer:
            chunks = FileChunks(0, path.rstrip("\n"), starts, [min(CHUNK, size - start) for start in starts])
            streamer.stream_files([chunks], None, "cpu")
            got = sum(buffer.nbytes for _, _, buffer in streamer.get_chunks())
        if got != size:
            raise SystemExit(f"{got} bytes of {size}")
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
