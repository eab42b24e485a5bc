"""Ten fine-tunes that share 60% of their bytes, their manifests published: what moves over the network."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.hosts import MB, Host, host
from bench.run import Run
from bench.table import Column, Row, Table, at_most
from tests.servers.s3 import S3Server

BUCKET = "tunes"
COUNT = 10
SHARE = 0.6
TENSOR = 2_000_000  # bytes: a chunk of its own
AT_ONCE = 4  # as pull does it
HOSTS = 3
ABOUT = (
    "Network: bodies that left the S3 server (headers and manifests, too) and bytes from peers. Distinct: what hosts "
    "must get if each gets each different chunk of what it loads once. Control messages between peers are not counted: "
    "for a fine-tune some 40 bytes a chunk of at most 2 MiB. Each host's manifests come from beside the objects."
)
Reports = list[dict[str, object]]


def finetunes(run: Run) -> Table:
    """Bytes by source: one host, one after the other and together; a fleet, all on each and dealt out."""
    tensors = run.size(100 * MB, 20 * MB) // TENSOR
    table = Table(
        "finetunes", f"{COUNT} fine-tunes of {tensors * TENSOR / MB:.0f} MB that share {SHARE:.0%}", ABOUT,
        (
            Column("origin", "MB from\nthe origin", "{:.1f}"), Column("peers", "from\npeers", "{:.1f}"),
            Column("local", "copied on\nits own disk", "{:.1f}"), Column("distinct", "distinct\n(bound)", "{:.1f}"),
            Column("ratio", "network /\ndistinct", "{:.3f}", bars=True),
            Column("egress", "origin / distinct\nof the fleet", "{:.3f}"),
        ),
    )  # fmt: skip
    with S3Server(run.folder / "s3") as s3:
        sources = write(s3, run.folder, tensors)
        with host(run.folder / "publisher", env=s3.env()) as publisher:
            for source in sources:
                publisher.client.publish(source)
                publisher.forget(source)
        own = tensors - round(SHARE * tensors)

        def together(hosts: Sequence[Host]) -> Reports:
            with ThreadPoolExecutor(AT_ONCE) as threads:
                return list(threads.map(hosts[0].client.pull, sources))

        def each(hosts: Sequence[Host]) -> Reports:
            return [one.client.pull(source) for one in hosts for source in sources]

        def dealt(hosts: Sequence[Host]) -> Reports:
            return [hosts[index % len(hosts)].client.pull(source) for index, source in enumerate(sources)]

        cases: Mapping[str, tuple[int, Callable[[Sequence[Host]], Reports]]] = {
            "one host, one after the other": (1, each),
            f"one host, {AT_ONCE} at once": (1, together),
            f"{HOSTS} hosts, each all of them": (HOSTS, each),
            f"{HOSTS} hosts, dealt out": (HOSTS, dealt),
        }
        for number, (name, (count, load)) in enumerate(cases.items()):
            with fleet(run.folder / str(number), count, s3) as hosts:
                s3.proxy.reset_counts()
                reports = load(hosts)
                needed = count * (tensors - own) + len(reports) * own
                whole = tensors - own + COUNT * own
                table.rows.append(Row(name, values(reports, s3.proxy.egress, needed * TENSOR, whole * TENSOR)))
    for name in cases:
        table.expect(at_most(1.02, f"network bytes / distinct bytes: {name}"), name, "ratio")
    return table


def values(reports: Reports, egress: int, needed: int, whole: int) -> dict[str, float]:
    """The row of a case whose hosts ``needed`` so many distinct bytes, ``whole`` of them different ones."""
    by: list[dict[str, object]] = [report["bytes_by_source"] for report in reports]  # type: ignore[misc]
    peers = sum(sum(one["peer"].values()) for one in by)  # type: ignore[attr-defined]
    local = sum(one["local"] for one in by)  # type: ignore[misc]
    return {
        "origin": egress / MB, "peers": peers / MB, "local": local / MB, "distinct": needed / MB,
        "ratio": (egress + peers) / needed, "egress": egress / whole,
    }  # fmt: skip


@contextlib.contextmanager
def fleet(folder: Path, count: int, s3: S3Server) -> Iterator[list[Host]]:
    """Empty hosts that know each other."""
    with contextlib.ExitStack() as stack:
        hosts: list[Host] = []
        for index in range(count):
            hosts.append(stack.enter_context(host(folder / str(index), peers=hosts, env=s3.env())))
        yield hosts


def write(s3: S3Server, folder: Path, tensors: int) -> list[str]:
    """Put the fine-tunes into the bucket; their sources."""
    draw = random.Random(1)
    common = [draw.randbytes(TENSOR) for _ in range(round(SHARE * tensors))]
    head = {
        f"t{index}": {"dtype": "U8", "shape": [TENSOR], "data_offsets": [index * TENSOR, (index + 1) * TENSOR]}
        for index in range(tensors)
    }
    text = json.dumps(head).encode()
    sources = []
    for number in range(COUNT):
        path = folder / "tune"
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.writelines(common)
            file.writelines(draw.randbytes(TENSOR) for _ in range(tensors - len(common)))
        s3.put(BUCKET, f"{number}.safetensors", path)
        sources.append(f"s3://{BUCKET}/{number}.safetensors")
    path.unlink()
    return sources
