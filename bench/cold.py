"""A pipeline from a peer, over a link of 1 Gbit/s, to a device: what streaming adds to the slowest stage alone.

The device is emulated (a thread copies from the ring), so every stage is there: link, disk, ring, device.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import threading
import time

from bench import rounds, sd15
from bench.hosts import MB, Host, connected_host, holder
from bench.link import RATE, Placed
from bench.run import Run
from bench.standing import Standing
from bench.table import Column, Row, Table, at_most
from weightcache.openfile import open_snapshot
from weightcache.runtime import stream_snapshot
from weightcache.runtime.emulated import Emulated
from weightcache.tools.coldstart_net import NoNamespaces, network
from weightcache.tools.coldstart_origin import BUCKET, variables

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
    except NoNamespaces as error:
        table.rows.append(Row(OURS, skipped=str(error)))
    table.expect(at_most(1.1, "times its slowest stage"), OURS, "ratio")
    table.expect(at_most(1.1, "times the text encoder's bytes alone, until it is usable"), OURS, "text_ratio")
    return table


def _measure(run: Run, stack: contextlib.ExitStack) -> Row:
    enter = stack.enter_context
    net = enter(network({"near": None, "far": RATE}))
    near, far = net.inside("near"), net.inside("far")
    objects = run.folder / "objects"
    sizes = sd15.write_snapshot(objects / "sd15", small=True)
    key = run.folder / "key"
    key.write_text("known to this benchmark only")
    key.chmod(0o600)
    server = enter(Standing("weightcache.tools.coldstart_origin", str(objects), "127.0.0.1", prefix=near))
    env = variables(f"http://127.0.0.1:{json.loads(server.line())['port']}")
    source = f"s3://{BUCKET}/sd15/"
    # The far end cannot reach the object store: what the near one saw an hour ago must do.
    options = (f"--cluster-key-file={key}", "--fresh=3600")
    sender = Placed(run.folder / "a", net.address["near"], *options, prefix=near, env=env)
    sending = enter(holder(sender, [source]))
    peer = f"--peer={sending.daemon.address}"
    receiver = Placed(run.folder / "b", net.address["far"], *options, peer, prefix=far)
    receiving = enter(connected_host(receiver, [sending.daemon.address]))
    os.environ |= receiver.worker_env
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
