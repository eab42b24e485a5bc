"""``snapshot_download``: that of huggingface_hub, with the fleet in the hub's place.

What a caller may give and this cannot honour is said in its docstring: what would change the result is refused, what
would not is accepted and has no effect.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightcache.client import Json, Progress, SyncClient
from weightcache.core.patterns import Patterns
from weightcache.core.source import is_source
from weightcache.errors import SourceError
from weightcache.runtime.directories import held, hub_directory, patiently, with_revision
from weightcache.runtime.hub_errors import as_hub_error

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

log = logging.getLogger(__name__)

LINKED = 8 << 20  # bytes from which on a file in local_dir is a hard link, and read-only; smaller ones are copies


def snapshot_download(
    repo_id: str,
    *,
    repo_type: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_dir: str | Path | None = None,
    library_name: str | None = None,
    library_version: str | None = None,
    user_agent: dict[str, Any] | str | None = None,
    etag_timeout: float = 10,
    force_download: bool = False,
    token: bool | str | None = None,
    local_files_only: bool = False,
    allow_patterns: list[str] | str | None = None,
    ignore_patterns: list[str] | str | None = None,
    max_workers: int = 8,
    tqdm_class: type[Any] | None = None,
    headers: dict[str, str] | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
) -> str | list[DryRunFileInfo]:
    """Bring a repository here, or the files of it that the patterns mean, and return its directory.

    ``repo_id``: "org/name" on the hub that the daemon uses (its HF_ENDPOINT), or any source that is a directory. The
    directory lies in the store, complete, its files hard links to what is cached; they may be evicted later unless
    they are in use or pinned. In ``local_dir`` the same files are put instead: those of 8 MiB and more as hard links,
    read-only, where the disk is the same, all others as copies. ``force_download``: the hub is asked for the current
    state; bytes that are here have been checked and are kept. ``local_files_only`` (or HF_HUB_OFFLINE): nobody is
    asked. When the hub cannot be reached, the newest state that the fleet has seen serves. ``dry_run``: a list of
    huggingface_hub's DryRunFileInfo, sizes in bytes; nothing is brought.

    Without effect: ``token`` (credentials are the daemon's), ``library_name``, ``library_version``, ``user_agent``,
    ``etag_timeout`` and ``max_workers`` (the daemon's settings). Refused with ValueError: ``headers``, an ``endpoint``
    or ``cache_dir`` other than the one in force; with SourceError: a ``repo_type`` other than "model".

    Raises what huggingface_hub raises: RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError,
    LocalEntryNotFoundError, DryRunError, HFValidationError; and other WeightcacheErrors as they are.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import DryRunError

    _refuse(repo_type, cache_dir, headers, endpoint)
    source = _source(repo_id, revision)
    local = local_files_only or constants.HF_HUB_OFFLINE
    if local and dry_run:
        raise DryRunError("a dry run asks the hub what there is; this one may ask nobody")
    with SyncClient() as client:
        try:
            listing = patiently(
                client, lambda: client.files(source, revalidate=force_download and not local, local=local)
            )
            patterns = Patterns.of(allow_patterns, ignore_patterns)
            files = {file["path"]: file for file in listing["files"] if patterns.admit(file["path"])}
            if dry_run:
                return _planned(listing, files, local_dir)
            if not files:
                log.warning("%s: no file matches the patterns (%s)", repo_id, patterns)
            return _brought(client, source, listing, files, patterns, local_dir, tqdm_class, local=local)
        except Exception as error:
            found = as_hub_error(error)
            if found is error:
                raise
            raise found from error


def _refuse(
    repo_type: str | None, cache_dir: str | Path | None, headers: dict[str, str] | None, endpoint: str | None
) -> None:
    from huggingface_hub import constants

    if repo_type not in (None, "model"):
        if repo_type not in constants.REPO_TYPES_WITH_KERNEL:
            raise ValueError(f"Invalid repo type: {repo_type}. Accepted repo types are: model")
        raise SourceError(
            f"repo_type={repo_type!r}: only models are cached; use huggingface_hub.snapshot_download for it"
        )
    if headers:
        raise ValueError("headers: the daemon asks the hub, with headers of its own; use huggingface_hub for others")
    if endpoint is not None and endpoint.rstrip("/") != constants.ENDPOINT.rstrip("/"):
        raise ValueError(f"endpoint={endpoint!r}: it is the daemon's to choose; start it with HF_ENDPOINT")
    if cache_dir is not None:
        here, wanted = (os.path.realpath(os.path.expanduser(path)) for path in (hub_directory(), cache_dir))
        if here != wanted:
            raise ValueError(f"cache_dir={str(cache_dir)!r}: the files lie in {here}; for another place give local_dir")


def _source(repo_id: str, revision: str | None) -> str:
    if is_source(repo_id):
        return with_revision(repo_id, revision)
    from huggingface_hub.utils._validators import validate_repo_id

    validate_repo_id(repo_id)
    return with_revision(f"hf://{repo_id}", revision)


def _planned(listing: Json, files: Mapping[str, Json], local_dir: str | Path | None) -> list[DryRunFileInfo]:
    from huggingface_hub import DryRunFileInfo

    folder = listing["directory"] if local_dir is None else str(Path(local_dir).expanduser().resolve())
    return [
        DryRunFileInfo(
            commit_hash=listing["revision"],
            file_size=file["size"],
            filename=path,
            local_path=os.path.join(folder, path),
            is_cached=file["here"],
            will_download=not file["here"],
        )
        for path, file in files.items()
    ]


def _brought(
    client: SyncClient,
    source: str,
    listing: Json,
    files: Mapping[str, Json],
    patterns: Patterns,
    local_dir: str | Path | None,
    tqdm_class: type[Any] | None,
    *,
    local: bool,
) -> str:
    """The directory with the files, once they are there."""
    directory = str(listing["directory"])
    allow, ignore = patterns.allow, patterns.ignore
    with contextlib.ExitStack() as stack:
        if files and local:
            found = str(client.path(source, allow=allow, ignore=ignore))
        elif files:
            heard = stack.enter_context(_bar(tqdm_class, len(files)))
            found = stack.enter_context(held(client, source, allow, ignore, on_event=heard))
        else:
            found = directory
        if not listing["single"]:
            directory = found
        if local_dir is None:
            return directory
        target = Path(local_dir).expanduser().resolve()
        for path in files:
            _place(Path(directory, path), target / path)
        return str(target)


def _place(source: Path, target: Path) -> None:
    """``target`` with the bytes of ``source``; one that has them already stays. Whoever reads it sees old or new."""
    have, want = target.stat() if target.exists() else None, source.stat()
    if have is not None and (have.st_ino, have.st_dev) == (want.st_ino, want.st_dev):
        return
    if have is not None and (have.st_size, have.st_mtime_ns) == (want.st_size, want.st_mtime_ns):
        return  # an earlier copy: it has the original's times
    target.parent.mkdir(parents=True, exist_ok=True)
    spare = target.with_name(f".{target.name}.{os.getpid()}.incomplete")
    spare.unlink(missing_ok=True)
    linked = False
    if want.st_size >= LINKED:
        with contextlib.suppress(OSError):  # another disk, or another user's file
            spare.hardlink_to(source)
            linked = True
    if not linked:
        shutil.copyfile(source, spare)
        os.utime(spare, ns=(want.st_atime_ns, want.st_mtime_ns))
    os.replace(spare, target)


@contextlib.contextmanager
def _bar(tqdm_class: type[Any] | None, count: int) -> Iterator[Progress]:
    """What hears of a load's progress and shows it as huggingface_hub would: by its bar, or the caller's."""
    from huggingface_hub.utils.tqdm import tqdm

    with (tqdm_class or tqdm)(total=0, unit="B", unit_scale=True, desc=f"Fetching {count} files") as bar:

        def heard(event: Json) -> None:
            if event["event"] == "progress":
                bar.total = event["total"]
                bar.update(event["done"] - bar.n)
            elif event["event"] == "done":
                bar.total = event["report"]["bytes_total"]
                bar.update(bar.total - bar.n)

        yield heard
