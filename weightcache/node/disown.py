"""What a load does whose ids turn out wrong, when no peer gave its word for them: go on with the origin alone.

The published manifest is to blame, not the origin and not the peers, which may have been misled alike (so they are not
asked for this blob any more). What came by such ids from elsewhere is missing until the origin has confirmed it: the
ids of these chunks stay, so their bytes, which may be mapped, can be confirmed but never change. All other ids are
forgotten. Before the first byte is written by what the origin has, whoever still writes by a wrong id must have ended:
requests to peers and to this disk always end by themselves, in an answer or a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from weightcache.node.incoming import Incoming
from weightcache.store import Store


class Disowning:
    """``again(coming, error)`` is called when a blob's load can begin anew: what the store says is true."""

    def __init__(self, store: Store, again: Callable[[Incoming, BaseException | None], None]) -> None:
        self._store = store
        self._again = again
        self._loop = asyncio.get_running_loop()
        self._ending: dict[int, tuple[Incoming, str]] = {}  # requests still to end; the process that answers them

    def __contains__(self, request: int) -> bool:
        return request in self._ending

    def await_end(self, coming: Incoming, requests: Iterable[tuple[int, str]]) -> None:
        """These requests (and the role of the process that does each) write by ids that may be wrong."""
        coming.alone = True
        self._ending.update((request, (coming, role)) for request, role in requests)

    def ended(self, request: int) -> None:
        """A request has been answered, or has failed."""
        if (found := self._ending.pop(request, None)) is not None:
            self.go_on(found[0])

    def died(self, role: str) -> None:
        """With a process, all its requests have ended."""
        for request in [request for request, (_, doing) in self._ending.items() if doing == role]:
            self.ended(request)

    def go_on(self, coming: Incoming) -> None:
        """Correct the store and begin anew, if nobody writes any more."""
        if all(other is not coming for other, _ in self._ending.values()):
            withdrawn = self._loop.run_in_executor(None, self._withdraw, coming)
            withdrawn.add_done_callback(lambda done: self._again(coming, done.exception()))

    def _withdraw(self, coming: Incoming) -> None:
        self._store.forget_ids(coming.blob, list(self._store.had(coming.blob).missing()))
        self._store.unhave(coming.blob, coming.borrowed)
