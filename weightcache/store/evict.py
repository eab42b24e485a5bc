"""Making room: which blobs go, and how one goes.

The unit is the file: blobs that share one go together, since unlinking some of its names frees nothing. The least
recently used go first, only as many as are needed: an unlink is cheap, so there is nothing to gain by clearing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from weightcache.store.catalog import Catalog, Entry
from weightcache.store.files import BlobFiles
from weightcache.store.index import Index
from weightcache.store.snapshots import Hub

Notice = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Evicted:
    """What an eviction did: bytes ``freed``, and each blob that was ``kept`` with the reason.

    Reasons: ``pinned``, ``leased``, ``loading`` (leased and partial), ``mapped`` (somebody has the file open or mapped,
    or the filesystem cannot tell).
    """

    freed: int
    kept: tuple[tuple[bytes, str], ...]


class Evictor:
    """Removes blobs. Not for several threads at once.

    ``let_go`` is told of a blob before it is asked whether somebody has it open, ``gone`` when it has been removed.
    """

    def __init__(
        self, catalog: Catalog, files: BlobFiles, hub: Hub, index: Index, let_go: Notice, gone: Notice
    ) -> None:
        self._catalog = catalog
        self._files = files
        self._hub = hub
        self._index = index
        self._let_go = let_go
        self._gone = gone
        self.freed = 0  # bytes, ever

    def choose(self, need: int) -> tuple[list[list[Entry]], Evicted]:
        """The files to remove for ``need`` bytes, and what that would free: less than asked when the rest must stay."""
        units: dict[int, list[Entry]] = {}
        for entry in self._catalog.entries():
            units.setdefault(entry.inode, []).append(entry)
        chosen: list[list[Entry]] = []
        kept: list[tuple[bytes, str]] = []
        freed = 0
        for unit in sorted(units.values(), key=lambda unit: max(entry.record.last_used for entry in unit)):
            if freed >= need:
                break
            reasons = [(entry.blob, held) for entry in unit if (held := self._catalog.held(entry))]
            if not reasons and self._mapped(unit):
                reasons = [(entry.blob, "mapped") for entry in unit]
            if reasons:
                kept += reasons
            else:
                chosen.append(unit)
                freed += unit[0].record.size
        return chosen, Evicted(freed, tuple(kept))

    def _mapped(self, unit: list[Entry]) -> bool:
        for entry in unit:
            self._let_go(entry.blob)
        with self._files.seized(unit[0].blob) as alone:
            return not alone

    def evict(self, entries: Iterable[Entry]) -> Evicted:
        """Remove these blobs, except those that must stay."""
        freed = 0
        kept: list[tuple[bytes, str]] = []
        for entry in entries:
            if self._catalog.held(entry) is None:
                self._let_go(entry.blob)
            with self._files.seized(entry.blob) as alone, self._catalog.lock:
                reason = self._catalog.held(entry) or (None if alone else "mapped")
                if reason is None:
                    freed += self._unlink(entry)
                else:
                    kept.append((entry.blob, reason))
            if reason is None:
                self._clear(entry)
        self.freed += freed
        return Evicted(freed, tuple(kept))

    def discard(self, entry: Entry) -> None:
        """Remove a blob whoever uses it; who has it mapped keeps its bytes."""
        self._let_go(entry.blob)
        with self._files.seized(entry.blob), self._catalog.lock:
            self._unlink(entry)
        self._clear(entry)

    def _unlink(self, entry: Entry) -> int:
        # In this order a death leaves a blob without some links, or a file without a record: open removes such files.
        self._hub.hide(entry.blob)
        self._catalog.drop(entry.blob)
        self._files.remove(entry.blob)
        shared = any(other.inode == entry.inode for other in self._catalog.entries())
        return 0 if shared else entry.record.size

    def _clear(self, entry: Entry) -> None:
        self._gone(entry.blob)
        while self._index.sweep(entry.record.serial):
            pass


def reasons(kept: Sequence[tuple[bytes, str]]) -> str:
    """``kept`` for an error message: ``2 pinned, 1 mapped``."""
    found = [reason for _, reason in kept]
    return ", ".join(f"{found.count(reason)} {reason}" for reason in dict.fromkeys(found))
