"""What a complete blob is held against: what its origin states of the whole file, and the plan its own header gives."""

from __future__ import annotations

from weightcache.core.layout import head_length, plan_from_head
from weightcache.core.manifest import Manifest
from weightcache.core.snapshot import FileEntry
from weightcache.store import Store


def contradiction(store: Store, entry: FileEntry) -> str:
    """How the complete blob of ``entry`` differs from it; "": not at all, as far as can be told. Slow.

    Where the origin states a digest, and it is right, the blob is recorded as checked. Raises UnknownBlob, StoreError.
    """
    manifest = store.manifest(entry.blob)
    if manifest is not None and not _plan_fits(store, manifest):
        return "the chunks that were told of do not follow from its header"
    if not entry.digest:
        return ""
    same = store.verify_digest(entry.blob, entry.digest)
    if same:
        store.set_checked(entry.blob)
    return "" if same is not False else f"its bytes are not those that the origin states ({entry.digest[:18]}…)"


def _plan_fits(store: Store, manifest: Manifest) -> bool:
    with open(store.path(manifest.blob), "rb") as file:
        length = head_length(file.read(9), manifest.size)
        head = None
        if length is not None:
            file.seek(0)
            head = file.read(length)
    return list(plan_from_head(manifest.size, head)) == list(manifest.plan)
