"""A source as a real path, complete, for as long as somebody works on it."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

from weightcache.client import Globs, Json, Progress, SyncClient
from weightcache.core.patterns import MAX_PATTERN, MAX_PATTERNS
from weightcache.core.source import is_source, parse_source
from weightcache.errors import DaemonError, SourceError
from weightcache.runtime.needed import superfluous

RESTART_SECONDS = 30.0  # for which a daemon that went away is waited for

Result = TypeVar("Result")


@contextmanager
def held(
    client: SyncClient, source: str, allow: Globs = None, ignore: Globs = None, on_event: Progress | None = None
) -> Iterator[str]:
    """The real path of a source, whole or as far as it is meant, leased while the block runs.

    Without a daemon the store is free meanwhile, and nothing is leased. Raises WeightcacheError.
    """
    with ExitStack() as stack:
        report = patiently(
            client, lambda: stack.enter_context(client.holding(source, on_event, allow=allow, ignore=ignore))
        )
        if client.embedded:
            stack.close()
            client.close()
        yield str(report["path"])


def patiently(client: SyncClient, call: Callable[[], Result]) -> Result:
    """``call``, again and again while a daemon that was there restarts: what has arrived is kept."""
    deadline = time.monotonic() + RESTART_SECONDS
    while True:
        try:
            return call()
        except DaemonError:
            if not client.has_daemon or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def bring(name: str, method: Callable[..., Any], owner: type | None, given: Mapping[str, Any]) -> Iterator[str]:
    """The real path of what ``method`` was called with: a source, or the id of a repository on the hub.

    Brought is what it will read, as far as that can be told from ``given``, its keywords; with ``local_files_only``
    nothing is, and what is not here is an error. Raises WeightcacheError of a source, and what huggingface_hub raises
    of an id: its callers know how to answer that.
    """
    is_id = not is_source(name)
    source = with_revision(f"hf://{name}" if is_id else name, given.get("revision"))
    with SyncClient() as client, ExitStack() as stack:
        try:
            local = bool(given.get("local_files_only"))
            found = patiently(client, lambda: client.files(source, local=local))
            ignore = [] if found["single"] else _left_out(found["files"], method, owner, given)
            path = (
                str(client.path(source, ignore=ignore))
                if local
                else stack.enter_context(held(client, source, ignore=ignore))
            )
        except Exception as error:
            if is_id:
                from weightcache.runtime.hub_errors import as_hub_error

                raise as_hub_error(error) from error
            raise
        yield path


def _left_out(
    files: Sequence[Json], method: Callable[..., Any], owner: type | None, given: Mapping[str, Any]
) -> list[str]:
    """Patterns for what the call will not read, or for some of it: as many as a daemon takes."""
    sizes = {file["path"]: file["size"] for file in files}
    paths = superfluous(sizes, method.__module__, owner.__name__ if owner is not None else "", given)
    if len(paths) == len(files):
        return []  # whatever is wanted of it, it is not what was thought
    return [text for text in map(glob.escape, paths) if len(text) <= MAX_PATTERN][:MAX_PATTERNS]


def with_revision(source: str, revision: object) -> str:
    """``source`` at ``revision``, which is a hub's and may be None. Raises SourceError if it names another already."""
    if revision is None or not source.lower().startswith("hf://"):
        return source
    wanted = quote(str(revision), safe="")
    org, _, rest = source[5:].partition("/")
    name, slash, path = rest.partition("/")
    repository, at, said = name.partition("@")
    if at and said not in (wanted, str(revision)):
        raise SourceError(f"{parse_source(source).public}: it names one revision, and revision={revision!r} another")
    return f"hf://{org}/{repository}@{wanted}{slash}{path}"


def hub_directory() -> str:
    """Where the store of this configuration keeps its directories: a cache in the layout of huggingface_hub."""
    from weightcache.config import load_config

    return os.path.join(load_config().store, "hub")
