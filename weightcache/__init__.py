"""weightcache: the fleet is the cache of model weights.

    import weightcache
    with weightcache.SyncClient() as client:
        report = client.pull("hf://org/name")

``weightcache.runtime`` has the drop-in for safetensors (it imports torch; this does not).
"""

from __future__ import annotations

from weightcache import errors as _errors
from weightcache.client import Client, SyncClient
from weightcache.config import Config, load_config
from weightcache.errors import *  # noqa: F403
from weightcache.version import __version__


__all__ = ["Client", "Config", "SyncClient", "__version__", "load_config", *_errors.__all__]
