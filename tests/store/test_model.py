"""Whatever is done in whatever order, the store is what a simple model says, and its files hold the right bytes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.store.support import CHUNK, content, snapshot_of
from weightcache.core.ids import chunk_id
from weightcache.core.landing import land
from weightcache.errors import StoreFull
from weightcache.store import Store

# Two pairs of twins, a blob of several segments, an empty one: 46 chunks in all, of which 40 fit.
CONTENTS = {
    name: content(name, size, seed=seed)
    for name, size, seed in (
        ("a", CHUNK * 3, "one"),
        ("b", CHUNK * 3, "one"),
        ("c", CHUNK * 2 + 5, "two"),
        ("d", CHUNK * 2 + 5, "two"),
        ("e", CHUNK * 34, "three"),
        ("f", 0, "none"),
    )
}
CAPACITY = CHUNK * 40
NAMES = st.sampled_from(sorted(CONTENTS))


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="weightcache-"))
        self.boot = 0
        self.had: dict[str, set[int]] = {}  # of the blobs that the store has
        self.pinned: set[str] = set()
        self.leased: set[str] = set()
        self.store = self.open()

    def open(self) -> Store:
        with mock.patch("weightcache.store.store.boot_id", return_value=f"boot {self.boot}"):
            return Store.open(self.folder / "store", capacity=CAPACITY)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def sharing(self, name: str) -> list[str]:
        """The blobs whose bytes lie in the same file."""
        inode = self.store.path(CONTENTS[name].blob).stat().st_ino
        return [other for other in self.had if self.store.path(CONTENTS[other].blob).stat().st_ino == inode]

    def forget_evicted(self) -> None:
        here = {info.blob for info in self.store.blobs()}
        gone = {name for name in self.had if CONTENTS[name].blob not in here}
        assert not gone & (self.pinned | self.leased)
        for name in gone:
            del self.had[name]

    @rule(name=NAMES, known=st.booleans())
    def create(self, name: str, known: bool) -> None:
        made = CONTENTS[name]
        try:
            info = self.store.create(made.manifest(known=known), name)
        except StoreFull:
            self.forget_evicted()
            assert name not in self.had
            return
        before = self.had.get(name, set())
        self.had.setdefault(name, set())
        self.forget_evicted()
        if info.state == "complete" and len(before) < len(made.plan):
            assert known
            assert info.shared
            self.had[name] = set(range(len(made.plan)))

    @precondition(lambda self: self.had)
    @rule(data=st.data())
    def record(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.had)))
        made = CONTENTS[name]
        missing = sorted(set(range(len(made.plan))) - self.had[name])
        if not missing:
            return
        some = data.draw(st.lists(st.sampled_from(missing), min_size=1, unique=True) | st.just(missing))
        fd = self.store.open_writer(made.blob)
        try:
            landed = [(i, *land(fd, made.plan.span(i)[0], [made.bytes_of(i)], b"")) for i in some]
        finally:
            os.close(fd)
        self.had[name] |= set(some)
        assert self.store.record(made.blob, landed) == (len(self.had[name]) == len(made.plan))

    @precondition(lambda self: self.had)
    @rule(data=st.data())
    def unhave(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.had)))
        if not self.had[name]:
            return
        some = data.draw(st.sets(st.sampled_from(sorted(self.had[name])), min_size=1, max_size=3))
        for other in self.sharing(name):
            self.had[other] -= some
        self.store.unhave(CONTENTS[name].blob, some)

    @precondition(lambda self: self.had)
    @rule(data=st.data())
    def settle(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.had)))
        self.store.settle(CONTENTS[name].blob)
        info = self.store.info(CONTENTS[name].blob)
        assert info is not None
        assert info.durable == (info.state == "complete")

    @rule(names=st.sets(NAMES))
    def evict(self, names: set[str]) -> None:
        outcome = self.store.evict([CONTENTS[name].blob for name in sorted(names)])
        kept = {name for name in names & set(self.had) if CONTENTS[name].blob in dict(outcome.kept)}
        assert kept == names & set(self.had) & (self.pinned | self.leased)
        self.forget_evicted()
        assert not names & set(self.had) - kept

    @precondition(lambda self: self.had)
    @rule(data=st.data())
    def discard(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.had)))
        self.store.discard(CONTENTS[name].blob)
        del self.had[name]
        self.pinned.discard(name)

    @precondition(lambda self: self.had)
    @rule(data=st.data(), on=st.booleans())
    def pin(self, data: Any, on: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.had)))
        (self.store.pin if on else self.store.unpin)(CONTENTS[name].blob)
        (self.pinned.add if on else self.pinned.discard)(name)

    @rule(name=NAMES)
    def lease(self, name: str) -> None:
        if name in self.leased:
            self.store.release(CONTENTS[name].blob)
            self.leased.remove(name)
        else:
            self.store.lease(CONTENTS[name].blob)
            self.leased.add(name)

    @precondition(lambda self: self.had)
    @rule(data=st.data())
    def show(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.had)))
        if len(self.had[name]) == len(CONTENTS[name].plan):
            shown = snapshot_of("s3://bucket/x", {name: CONTENTS[name]}, folder="s3--bucket--x", revision="r")
            self.store.materialise(shown)

    @rule(crash=st.booleans())
    def reopen(self, crash: bool) -> None:
        durable = {info.blob for info in self.store.blobs() if info.durable}
        self.store.close()
        self.leased.clear()
        self.boot += crash
        self.store = self.open()
        if crash:
            for name, had in self.had.items():
                info = self.store.info(CONTENTS[name].blob)
                assert info is not None
                assert info.suspect == (bool(had) and info.blob not in durable)
                assert self.store.recheck(info.blob) == 0

    @invariant()
    def agrees(self) -> None:
        infos = {info.blob: info for info in self.store.blobs()}
        assert set(infos) == {CONTENTS[name].blob for name in self.had}
        sizes = {}
        for name, had in self.had.items():
            made = CONTENTS[name]
            info = infos[made.blob]
            assert set(self.store.had(made.blob)) == had
            assert (info.state == "complete") == (len(had) == len(made.plan))
            assert info.had_bytes == sum(made.plan.span(index)[1] for index in had)
            assert info.pinned == (name in self.pinned)
            data = self.store.path(made.blob).read_bytes()
            assert len(data) == len(made.data)
            for index in had:
                offset, length = made.plan.span(index)
                assert data[offset : offset + length] == made.bytes_of(index)
            sizes[self.store.path(made.blob).stat().st_ino] = len(data)
        assert self.store.used == sum(sizes.values()) <= CAPACITY

    @invariant()
    def finds_exactly_what_is_had(self) -> None:
        for made in CONTENTS.values():
            for index in range(0, len(made.plan), 7):
                chunk = chunk_id(made.bytes_of(index))
                found = self.store.find_chunk(chunk)
                holders = {
                    CONTENTS[name].blob
                    for name, had in self.had.items()
                    if any(chunk_id(CONTENTS[name].bytes_of(i)) == chunk for i in had)
                }
                assert (found is not None) == bool(holders)
                if found is not None:
                    assert found[0] in holders

    @invariant()
    def shows_only_what_is_complete(self) -> None:
        links = [path for path in (self.folder / "store/hub").rglob("*") if path.is_file()]
        for path in links:
            assert len(self.had[path.name]) == len(CONTENTS[path.name].plan)
            assert path.stat().st_ino == self.store.path(CONTENTS[path.name].blob).stat().st_ino


Model.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestModel = Model.TestCase
