"""Run by every Python that starts with this directory in PYTHONPATH: what ``install`` did in the parent, here, too.

It takes nothing away from a ``sitecustomize`` that lies elsewhere, and says nothing where weightcache is not installed:
a child may be another Python altogether. So this file keeps to what every Python 3 understands.
"""

import os
import sys


def _others():  # type: ignore[no-untyped-def]
    """Import the sitecustomize that would have been found without this one."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    this = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", this)


try:
    import weightcache.runtime  # noqa: F401 - which looks at WEIGHTCACHE_INSTALL
except ImportError:
    pass

_others()  # type: ignore[no-untyped-call]
