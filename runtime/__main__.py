"""``python -m weightcache.runtime SOURCE``: stream a source to a device, tensor by tensor, and print the report."""

from __future__ import annotations

import argparse
import sys

import torch

from weightcache.config import load_config
from weightcache.errors import WeightcacheError
from weightcache.runtime.ceilings import measure
from weightcache.runtime.stream import stream_snapshot


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise argparse.ArgumentTypeError(f"{name!r} is no dtype of torch")
    return found


def main() -> int:
    parser = argparse.ArgumentParser("python -m weightcache.runtime", description=__doc__)
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="a source, a local directory or a file")
    parser.add_argument("--ceilings", action="store_true", help="measure what this machine can do, and keep it")
    parser.add_argument("--device", default="cpu", help="as torch names it [cpu]")
    parser.add_argument("--dtype", type=_dtype, help="cast floating tensors, on the device: float16, bfloat16")
    parser.add_argument("--trace", metavar="FILE", help="write the time line here; it opens in Perfetto")
    given = parser.parse_args()
    if given.source is None and not given.ceilings:
        parser.error("a source is needed")
    if given.ceilings:
        store = load_config().store
        unknown = {
            "disk": f"{store}: no such directory yet, not writable, or a filesystem without O_DIRECT",
            "link": "no interface that is up says its speed",
            "device": "this torch has no accelerator",
        }
        for name, speed in measure(store).to_json().items():
            print(f"{name:8} {f'unknown ({unknown[name]})' if speed is None else f'{speed / 1e9:.2f} GB/s'}")
        if given.source is None:
            return 0
    try:
        if given.trace:
            open(given.trace, "a").close()  # rather than after minutes
        stream = stream_snapshot(given.source, device=given.device, dtype=given.dtype)
        for _ in stream:
            pass
        print(stream.report)
        if given.trace:
            stream.report.trace(given.trace)
    except (WeightcacheError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, WeightcacheError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
