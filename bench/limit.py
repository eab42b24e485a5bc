"""The limit as a contender: the two processes of bench/bare.py, in the way that is fastest on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.bare import Way
from bench.hosts import MB, write_random
from bench.rounds import Contender, Tally, take_turns
from bench.run import Run
from bench.standing import Standing

WAYS = {
    "mapping": Way(),
    "sendfile": Way(sendfile=True),
    "sendfile, low water": Way(sendfile=True, low_water=True),
    "sendfile, pieces": Way(sendfile=True, pieces=True),
    "sendfile, pieces, low water": Way(sendfile=True, pieces=True, low_water=True),
}
_fastest: dict[int, Way] = {}  # by filesystem


def fastest(run: Run) -> Way:
    """The way that won a few turns in this folder; the same for all tables of one run. A quick run does not ask."""
    if run.quick:
        return Way(sendfile=True)
    place = os.stat(run.folder).st_dev
    if place not in _fastest:
        path = write_random(run.folder / "ways", 200 * MB)
        with contextlib.ExitStack() as stack:
            contenders = [stack.enter_context(limit(path, run.folder, way, name)) for name, way in WAYS.items()]
            tallies = take_turns(contenders, Run(run.folder, rounds=3))

        def seconds(tally: Tally) -> float:
            return min((turn.seconds for turn in tally.turns), default=float("inf"))

        _fastest[place] = min(zip(WAYS.values(), tallies, strict=True), key=lambda pair: seconds(pair[1]))[0]
        path.unlink()
    return _fastest[place]


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
                f"its way: {way}" + ("" if way.sendfile else "; the sender's memory is the mapped file"),
            )
