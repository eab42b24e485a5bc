"""A pipeline from a peer, over a link of 1 Gbit/s, to a device: what streaming adds to the slowest stage alone.

The device is emulated (a thread copies from the ring), so every stage is there: link, disk, ring, device.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time

from bench import link, rounds, sd15
from bench.hosts import MB, Host, connected_host, holder
from bench.run import Run
from bench.table import Column, Row, Table, at_most
from tests.servers.s3 import S3Server
from weightcache.openfile import open_snapshot
from weightcache.runtime import stream_snapshot
from weightcache.runtime.emulated import Emulated

TITLE = "a pipeline shaped as SD 1.5 with a small UNet, from a peer, over a link of 1 Gbit/s"
ABOUT = (
    "From the call until the last tensor is on the device. 'slowest stage': what took longest alone; here the daemon's "
    "transfer. 'text bytes': until all of the text encoder's bytes were had; 'text usable': until its last tensor was "
    "on the device, while the rest was still on its way."
)
OURS = "weightcache stream_snapshot"
TEXT = "text_encoder/model.safetensors"
COLUMNS = (
    Column("total", "total s"), Column("slowest", "slowest\nstage s"), Column("ratio", "total /\nslowest", bars=True),
    Column("text_had", "text\nbytes s"), Column("text_usable", "text\nusable s"),
    Column("text_ratio", "usable /\nbytes"),
)  # fmt: skip


def stream_cold(run: Run) -> Table:
    """Streaming beside its slowest stage."""
    table = Table("stream-cold", TITLE, ABOUT, COLUMNS)
    try:
        with contextlib.ExitStack() as stack:
            table.rows.append(_measure(run, stack))
    except rounds.Unavailable as error:
        table.rows.append(Row(OURS, skipped=str(error)))
    table.expect(at_most(1.1, "times its slowest stage"), OURS, "ratio")
    table.expect(at_most(1.1, "times the text encoder's bytes alone, until it is usable"), OURS, "text_ratio")
    return table


def _measure(run: Run, stack: contextlib.ExitStack) -> Row:
    enter = stack.enter_context
    inside = enter(link.shaped())
    folder = run.folder / "pipeline"
    sizes = sd15.write_snapshot(folder, small=True)
    key = run.folder / "key"
    key.write_text("known to this benchmark only")
    key.chmod(0o600)
    server = enter(S3Server(run.folder / "s3"))
    for name in sizes:
        server.put("bench", f"sd15/{name}", folder / name)
    source = "s3://bench/sd15/"
    # The far end cannot reach the object store: what the near one saw an hour ago must do.
    options = (f"--cluster-key-file={key}", "--fresh=3600")
    os.environ |= server.env()
    sending = enter(holder(link.Placed(run.folder / "a", link.HERE, *options), [source]))
    far = link.Placed(run.folder / "b", link.THERE, *options, f"--peer={sending.daemon.address}", prefix=inside)
    receiving = enter(connected_host(far, [sending.daemon.address]))
    os.environ |= far.worker_env
    taken = []
    for _ in range(run.rounds):
        receiving.forget(source)
        rounds.drain()
        taken.append(_once(source, receiving))
    values = {name: statistics.median(turn[name] for turn in taken) for name in taken[0]}
    return Row(OURS, values, f"{sum(sizes.values()) / MB:.0f} MB, of which the text encoder's {sizes[TEXT] / MB:.0f}")


def _once(source: str, host: Host) -> dict[str, float]:
    device = Emulated()
    had: list[float] = []
    began = time.perf_counter()
    with stream_snapshot(source, device=device) as stream, open_snapshot(source) as same:
        text = next(file for file in same.files if file.name == TEXT)

        def watch() -> None:
            text.wait(0, text.size)
            had.append(time.perf_counter() - began)

        watching = threading.Thread(target=watch)
        watching.start()
        usable = 0.0
        for path, _, _ in stream:
            if path == TEXT:
                usable = time.perf_counter() - began
        total = time.perf_counter() - began
        watching.join()
    device.close()
    report = stream.report
    assert report.daemon is not None
    slowest = max(report.daemon["stages"]["transfer"], *(report.busy(stage) for stage in ("read", "disk", "copy")))
    return {
        "total": total, "slowest": slowest, "ratio": total / slowest,
        "text_had": had[0], "text_usable": usable, "text_ratio": usable / had[0],
    }  # fmt: skip
