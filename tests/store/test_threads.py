"""Many threads at once: loads come and go, room is short, and what is there stays right."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from tests.store.support import CHUNK, content, fill
from weightcache.errors import StoreFull
from weightcache.store import Store

LOADERS = 4
ROUNDS = 25


def test_loads_evictions_and_scrubs_at_once(open_store: Callable[..., Store]) -> None:
    """Twelve blobs, half of them twins, in a store that holds eight; every load reads back what it asked for."""
    store = open_store(capacity=CHUNK * 40 * 8)
    contents = [content(str(number), CHUNK * 40, seed=number // 2) for number in range(12)]
    alone = [threading.Lock() for _ in contents]  # the node loads a blob once at a time
    failures: list[BaseException] = []
    loaded = threading.Semaphore(0)
    ended = threading.Event()

    def load(seed: int) -> None:
        choices = random.Random(seed)
        try:
            for _ in range(ROUNDS):
                number = choices.randrange(len(contents))
                made = contents[number]
                with alone[number]:
                    store.lease(made.blob)
                    try:
                        fill(store, made)
                        store.settle(made.blob)
                        assert store.path(made.blob).read_bytes() == made.data
                        assert store.had(made.blob).is_full
                        loaded.release()
                    except StoreFull:
                        pass
                    finally:
                        store.release(made.blob)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test fails with it
            failures.append(error)

    def disturb() -> None:
        choices = random.Random(0)
        try:
            while not ended.is_set():
                store.evict(need=CHUNK * 40)
                for info in choices.sample(store.blobs(), k=len(store.blobs()) // 2):
                    found = store.manifest(info.blob)
                    chunk = found.id(0) if found else None
                    if chunk:
                        store.find_chunk(chunk)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    loaders = [threading.Thread(target=load, args=(seed,)) for seed in range(LOADERS)]
    other = threading.Thread(target=disturb)
    for thread in (*loaders, other):
        thread.start()
    for thread in loaders:
        thread.join()
    ended.set()
    other.join()
    assert not failures, failures[0]
    assert loaded.acquire(blocking=False)
    before = {info.blob: info.had_bytes for info in store.blobs()}
    assert store.used <= CHUNK * 40 * 8
    store.close()
    store = open_store()
    assert {info.blob: info.had_bytes for info in store.blobs()} == before
    for info in store.blobs():
        assert all(good for _, good in store.scrub(info.blob, deep=True))
