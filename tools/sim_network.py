"""A network in virtual time: a clock, ports with so many bytes a second, and flows that share them.

A flow goes out by one port and in by another. Ports are fair: each flow is sure of an even share of both of its ports,
and what some cannot use, because their other port is the narrower one, goes to the others. When a flow begins or ends,
only the flows of its two ports are weighed again: what changes at their other ends waits for a change there. No port
ever carries more than it can; a little may stay unused.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial

NEVER = float("inf")

Job = Callable[[], None]


class Clock:
    """What happens when. Of what is due at the same time, the first said comes first."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._due: list[tuple[float, int, Job]] = []
        self._said = 0

    def at(self, when: float, job: Job) -> None:
        self._said += 1
        heapq.heappush(self._due, (when, self._said, job))

    def step(self) -> bool:
        """Do what comes next; False when nothing will ever happen."""
        if not self._due:
            return False
        when, _, job = heapq.heappop(self._due)
        if when > self.now:
            self.now = when
        self.events += 1
        job()
        return True


class Port:
    """One direction of a link. ``used``, ``capacity``: bytes/s; ``carried``: bytes, ever."""

    __slots__ = ("capacity", "carried", "flows", "used")

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.used = self.carried = 0.0
        self.flows: dict[Flow, None] = {}


class Flow:
    """So many bytes from one port to another; ``done`` is called when the last has come."""

    __slots__ = ("alarm", "done", "down", "due", "left", "rate", "since", "up")

    def __init__(self, up: Port, down: Port, size: float, done: Job) -> None:
        self.up, self.down, self.left, self.done = up, down, size, done
        self.rate = self.since = 0.0
        self.due = self.alarm = NEVER  # when it ends as things stand; when it is looked at


class Network:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def begin(self, flow: Flow) -> None:
        flow.since = self._clock.now
        flow.up.flows[flow] = flow.down.flows[flow] = None
        self._share(flow.up, flow.down)

    def more(self, flow: Flow, size: float, done: Job) -> None:
        """A flow that has just ended goes on with other bytes, on the same way."""
        flow.left, flow.done, flow.since = size, done, self._clock.now
        self._schedule(flow)

    def end(self, flow: Flow) -> None:
        """It is over, finished or not."""
        if flow in flow.up.flows:
            self._settle(flow)
            flow.up.used -= flow.rate
            flow.down.used -= flow.rate
            flow.rate = 0.0
            flow.due = NEVER
            del flow.up.flows[flow], flow.down.flows[flow]
            self._share(flow.up, flow.down)

    def _settle(self, flow: Flow) -> None:
        now = self._clock.now
        passed = min(flow.left, flow.rate * (now - flow.since))
        flow.left -= passed
        flow.up.carried += passed
        flow.down.carried += passed
        flow.since = now

    def _share(self, up: Port, down: Port) -> None:
        """Weigh the flows of two ports again."""
        touched = {**up.flows, **down.flows}
        even_up = up.capacity / (len(up.flows) or 1)
        even_down = down.capacity / (len(down.flows) or 1)
        before = []
        for flow in touched:  # what each is sure of, as far as its other port has room
            rate, out, into = flow.rate, flow.up, flow.down
            before.append(rate)
            sure_up = even_up if out is up else out.capacity / len(out.flows)
            sure_down = even_down if into is down else into.capacity / len(into.flows)
            sure = sure_up if sure_up < sure_down else sure_down
            if out is not up:
                sure = min(sure, rate + max(0.0, out.capacity - out.used))
            if into is not down:
                sure = min(sure, rate + max(0.0, into.capacity - into.used))
            self._settle(flow)
            out.used += sure - rate
            into.used += sure - rate
            flow.rate = sure
        sharing = [len(up.flows), len(down.flows)]
        for flow, rate in zip(touched, before, strict=True):  # what is left over
            out, into = flow.up, flow.down
            extra_up, extra_down = out.capacity - out.used, into.capacity - into.used
            if out is up:
                extra_up /= sharing[0]
                sharing[0] -= 1
            if into is down:
                extra_down /= sharing[1]
                sharing[1] -= 1
            extra = extra_up if extra_up < extra_down else extra_down
            if extra > 0.0:
                out.used += extra
                into.used += extra
                flow.rate += extra
            if flow.rate != rate:
                self._schedule(flow)

    def _schedule(self, flow: Flow) -> None:
        flow.due = self._clock.now + flow.left / flow.rate if flow.rate > 0.0 else NEVER
        if flow.due < flow.alarm:
            flow.alarm = flow.due
            self._clock.at(flow.due, partial(self._look, flow))

    def _look(self, flow: Flow) -> None:
        now = self._clock.now
        if flow.alarm > now:
            return  # an older alarm
        flow.alarm = NEVER
        if flow.due <= now:
            self._settle(flow)
            flow.due = NEVER
            flow.done()
        elif flow.due < NEVER:
            flow.alarm = flow.due
            self._clock.at(flow.due, partial(self._look, flow))
