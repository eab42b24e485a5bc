"""The limit as a contender: the two processes of bench/bare.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.bare import Way
from bench.rounds import Contender
from bench.standing import Standing


@contextlib.contextmanager
def limit(
    source: Path,
    folder: Path,
    way: Way,
    name: str = "limit",
    *,
    host: str = "127.0.0.1",
    prefixes: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> Iterator[Contender]:
    """``prefixes``: what to run the sender's and the receiver's command with; ``host``: where the sender listens."""
    size, target = source.stat().st_size, folder / "limit"

    with Standing("bench.bare", "send", host, str(source), str(way), prefix=prefixes[0]) as sender:
        arguments = ("receive", host, sender.line(), str(size), str(way))
        with Standing("bench.bare", *arguments, prefix=prefixes[1]) as receiver:

            def reserve() -> None:
                receiver.start()
                with open(target, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)

            yield Contender(
                name,
                size,
                lambda: receiver.seconds(target),
                lambda: target.unlink(missing_ok=True),
                reserve,
                sender.pids,
                receiver.pids,
                "" if way.sendfile else "the sender's memory is the mapped file",
            )
