"""weightcache: the fleet is the cache of model weights.

    import weightcache
    with weightcache.SyncClient() as client:
        report = client.pull("hf://org/name")

``weightcache.runtime`` has the drop-in for safetensors (it imports torch; this does not).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightcache import errors as _errors
from weightcache.errors import *  # noqa: F403
from weightcache.version import __version__

if TYPE_CHECKING:
    from weightcache.client import Client, SyncClient
    from weightcache.config import Config, load_config

__all__ = ["Client", "Config", "SyncClient", "__version__", "load_config", *_errors.__all__]

# Bulk processes import this package, too, and need neither: each is imported when it is first asked for.
_LAZY = {
    "Client": "weightcache.client",
    "SyncClient": "weightcache.client",
    "Config": "weightcache.config",
    "load_config": "weightcache.config",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
