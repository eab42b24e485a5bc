"""Blobs on this host's disk: reserved, had, shared, evicted, checked again."""

from __future__ import annotations

from weightcache.store.catalog import BlobInfo
from weightcache.store.evict import Evicted
from weightcache.store.flush import Flusher, Landing
from weightcache.store.store import Store

__all__ = ["BlobInfo", "Evicted", "Flusher", "Landing", "Store"]
