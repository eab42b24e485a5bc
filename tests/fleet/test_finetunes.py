"""Fine-tunes whose manifests are published: only what differs moves, from the first host on."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.fleet.bad_peer import read
from tests.fleet.daemons import Daemon, from_peers
from tests.fleet.weights import tensors
from tests.servers.s3 import S3Server

MIB = 1 << 20
COUNT = 20  # tensors of a MiB and more each: chunks of their own
SIZE = 2 * MIB
SMALL = 400 << 10  # bytes: headers, manifests and the like


def tuned(base: bytes, share: float, seed: int) -> bytes:
    """A fine-tune: the first ``share`` of the tensors are those of the base, the others its own."""
    own = tensors(COUNT, SIZE, seed=seed)
    cut = len(own) - COUNT * SIZE + round(share * COUNT) * SIZE
    return base[:cut] + own[cut:]


def test_a_published_fine_tune_moves_only_what_differs(s3: S3Server, tmp_path: Path) -> None:
    """From the local disk where the base is here, from peers where it is there, from the origin the rest."""
    base = tensors(COUNT, SIZE, seed=1)
    tune = tuned(base, 0.6, seed=2)
    s3.put("tunes", "base.safetensors", base)
    s3.put("tunes", "tune.safetensors", tune)
    own = round(0.4 * COUNT) * SIZE
    with ExitStack() as stack:
        publisher = stack.enter_context(Daemon(tmp_path / "publisher", env=s3.env()))
        with publisher.client() as client:
            (row,) = client.publish("s3://tunes/tune.safetensors")
            assert row["state"] == "published"
            assert client.publish("s3://tunes/tune.safetensors")[0]["state"] == "same"
        publisher.stop()
        holder = stack.enter_context(Daemon(tmp_path / "holder", env=s3.env()))
        holder.pull("s3://tunes/base.safetensors")
        s3.proxy.reset_counts()

        here = holder.pull("s3://tunes/tune.safetensors")
        assert read(here) == tune
        assert here["bytes_by_source"]["local"] >= len(tune) - own - SMALL
        assert s3.proxy.egress <= own + SMALL
        assert here["fallbacks"] == []
        holder.evict("s3://tunes/tune.safetensors")

        other = stack.enter_context(Daemon(tmp_path / "other", env=s3.env(), peers=(holder,)))
        other.meets(holder)
        s3.proxy.reset_counts()
        there = other.pull("s3://tunes/tune.safetensors")
        assert read(there) == tune
        assert from_peers(there) >= len(tune) - own - SMALL
        assert s3.proxy.egress <= own + SMALL
        assert there["fallbacks"] == []
