"""Where bytes come from: object stores, the hub, web servers and disks behind one interface."""

from weightcache.origin.base import Origin
from weightcache.origin.router import Origins

__all__ = ["Origin", "Origins"]
