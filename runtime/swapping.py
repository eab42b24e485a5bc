"""``swap``: a pipeline becomes a fine-tune of itself, in place, and only what differs is moved.

Theory of operation. Everything is compared and fetched before anything changes: names, shapes and dtypes from the
headers, then the bytes of what differs, which the daemon has checked when they landed. Two tensors have the same bytes
when their chunks have the same ids (a chunk begins with each large tensor, so these are alike in both files), and such
a tensor stays as it is. The rest is copied into the memory where the old one is: parameters remain the same objects at
the same addresses, and compiled graphs remain good.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from weightcache.core.source import is_source
from weightcache.errors import LoadFailed, SourceError, WeightcacheError
from weightcache.openfile import OpenFile, OpenSnapshot, manifest_of, open_snapshot
from weightcache.runtime.assembly import is_heavy
from weightcache.runtime.checkpoint import NotPlain, Stored, stored_tensors, weight_files
from weightcache.runtime.device import target_of
from weightcache.runtime.loaded import Held, Loaded, recall, remember, wait
from weightcache.runtime.moving import Moving
from weightcache.runtime.report import LoadReport
from weightcache.runtime.skeleton import stem_of
from weightcache.runtime.streamer import Piece, Streamer

Chunks = tuple[tuple[str, int], ...]  # ids, and where in each the tensor begins


@dataclass(frozen=True, slots=True)
class _Change:
    """One tensor that is to get other bytes."""

    component: str
    stored: Stored
    tensor: torch.Tensor


def swap(
    pipe: Any,
    source: str | os.PathLike[str],
    *,
    components: str | Iterable[str] | None = None,
    variant: str | None = None,
) -> LoadReport:
    """Give components of ``pipe`` the weights of ``source``: another snapshot of the same kind, or a single file.

    ``components``: which; by default each that the source has weights of. With a single file, one has to be named.
    Nobody may use the pipeline meanwhile. The report has the bytes that were moved, and what could not be compared.

    Raises SourceError, before anything is changed, when names, shapes or dtypes do not fit; whatever opening the source
    raises, likewise; LoadFailed if copying breaks off, saying which tensors are new by then. ValueError
    while LoRAs are fused: their weights are no longer those of a file.
    """
    if getattr(pipe, "num_fused_loras", 0):
        raise ValueError("swap: LoRAs are fused into the weights; call unfuse_lora() first")
    wait(pipe)
    report = LoadReport(str(source), str(pipe.device))
    loaded = recall(pipe)
    if loaded is None:
        remember(pipe, loaded := Loaded(report))
    with contextlib.closing(open_snapshot(source)) as snapshot:
        chosen = [components] if isinstance(components, str) else components
        found = dict(_found(pipe, snapshot, chosen, variant, str(source)))
        changes = [
            _Change(name, stored, tensor)
            for name, tensors in found.items()
            for stored, tensor in _fitting(pipe, name, tensors, loaded.held.get(name, {}), str(source))
        ]
        with report.stage("wait"):
            for change in changes:
                change.stored.file.wait(change.stored.begin, change.stored.end)
        same = _Same(str(source), report)
        different = [
            change
            for change in changes
            if not same.bytes(change.stored, loaded.held.get(change.component, {}).get(change.stored.name))
        ]
        _copy(different, str(source), loaded, report)
        for change in changes:
            held = loaded.held.setdefault(change.component, {})
            held[change.stored.name] = _held(change, str(source))
        report.came(snapshot.report())
    report.finish()
    return report


def _held(change: _Change, source: str) -> Held:
    stored = change.stored
    return Held(weakref.ref(change.tensor), stored.dtype, source, stored.file.path, stored.begin, stored.end)


# -- what is to change


def _found(
    pipe: Any, snapshot: OpenSnapshot, chosen: Iterable[str] | None, variant: str | None, source: str
) -> Iterator[tuple[str, dict[str, Stored]]]:
    """The tensors that the source has for each component."""
    files: dict[str, OpenFile] = {file.name: file for file in snapshot.files}
    models = {name: _plain(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    if chosen is None:
        chosen = [name for name in models if any(is_heavy(path) and path.startswith(f"{name}/") for path in files)]
    names = list(chosen)
    if not names or (unknown := [name for name in names if name not in models]):
        wrong = f"the pipeline has no {unknown[0]}" if names else "it has weights of no component"
        raise SourceError(f"{source}: {wrong}; name some of: {', '.join(models)}")
    single = [path for path in files if path.endswith(".safetensors")]
    for name in names:
        try:
            alone = len(single) == 1 and len(names) == 1 and "/" not in single[0]
            paths = single if alone else weight_files(files, name, stem_of(type(models[name])), variant)
            yield name, stored_tensors(files, paths)
        except NotPlain as error:
            raise SourceError(f"{source}: {name}: {error}; nothing was changed") from None


def _plain(module: torch.nn.Module) -> torch.nn.Module:
    """What torch.compile wraps."""
    return getattr(module, "_orig_mod", module)


def _fitting(
    pipe: Any, name: str, tensors: dict[str, Stored], held: dict[str, Held], source: str
) -> Iterator[tuple[Stored, torch.Tensor]]:
    """The source's tensors, each with the one it replaces. Raises SourceError unless they fit."""

    def refuse(why: str) -> SourceError:
        return SourceError(f"{source}: {name}: {why}; nothing was changed")

    known = {key: (tensor, entry.dtype) for key, entry in held.items() if (tensor := entry.tensor()) is not None}
    if len(known) < len(held) or not held:
        module = _plain(pipe.components[name])
        known = {key: (tensor, tensor.dtype) for key, tensor in module.state_dict(keep_vars=True).items()}
    if missing := sorted(known.keys() - tensors.keys()):
        raise refuse(f"{len(missing)} tensors of the pipeline's are not there ({missing[0]})")
    for key, stored in tensors.items():
        if key not in known:
            raise refuse(f"{key} is unknown to the pipeline")
        tensor, dtype = known[key]
        if tuple(tensor.shape) != stored.shape:
            raise refuse(f"{key} has shape {list(stored.shape)}, the pipeline's {list(tensor.shape)}")
        if stored.dtype not in (tensor.dtype, dtype):
            raise refuse(f"{key} is {stored.dtype}, the pipeline's {tensor.dtype}")
        yield stored, tensor


# -- what differs


class _Same:
    """Says which tensors have the same bytes, by the ids of their chunks."""

    def __init__(self, source: str, report: LoadReport) -> None:
        self._source = source
        self._report = report
        self._blobs: dict[str, dict[str, list[Any]]] = {}  # source -> blob -> chunks
        self._told: set[str] = set()

    def bytes(self, stored: Stored, held: Held | None) -> bool:
        """Whether what is held has the bytes of ``stored``. False where nobody can tell, which the report says."""
        if held is None or held.dtype != stored.dtype:
            return self._unknown(f"what the pipeline held was not loaded from where {self._source} can be compared to")
        ours = self._chunks(held.source, held.path, held.begin, held.end)
        theirs = self._chunks(self._source, stored.file.path, stored.begin, stored.end)
        if ours is None or theirs is None:
            return self._unknown(f"the chunks of {held.source if ours is None else self._source} are unknown")
        return ours == theirs

    def _unknown(self, why: str) -> bool:
        if why not in self._told:
            self._told.add(why)
            self._report.fell_back(f"moved without comparing: {why}")
        return False

    def _chunks(self, source: str, path: str, begin: int, end: int) -> Chunks | None:
        if source not in self._blobs:
            self._blobs[source] = self._ask(source)
        chunks = self._blobs[source].get(os.path.basename(path))  # a blob's file is named by its id
        if chunks is None:
            return None
        starts = [chunk["offset"] for chunk in chunks]
        covering = chunks[bisect.bisect_right(starts, begin) - 1 : bisect.bisect_left(starts, end)]
        if any(chunk["id"] is None for chunk in covering):
            return None
        return tuple((chunk["id"], begin - chunk["offset"]) for chunk in covering)

    @staticmethod
    def _ask(source: str) -> dict[str, list[Any]]:
        if not is_source(source):
            return {}
        try:
            return {row["blob"]: row["chunks"] for row in manifest_of(source)}
        except WeightcacheError:  # gone from its origin, say: then nobody can compare
            return {}


# -- changing it


def _copy(changes: list[_Change], source: str, loaded: Loaded, report: LoadReport) -> None:
    moving = Moving(report)
    new = 0  # tensors, from the first

    def pieces() -> Iterator[Piece]:
        for change in changes:
            yield from moving.pieces(change.stored, change.tensor)

    if not changes:
        return
    target = target_of(changes[0].tensor.device)
    try:
        with Streamer(target, report=report) as streamer:
            for index in streamer.copy(pieces()):
                new += moving.arrived(index)
            target.now().synchronize()
    except BaseException as error:
        for change in changes:  # of neither source for sure: the next swap moves them
            if (held := loaded.held.get(change.component, {}).get(change.stored.name)) is not None:
                held.path = ""
        if not isinstance(error, Exception):
            raise
        names = ", ".join(f"{change.component}.{change.stored.name}" for change in changes[:new]) or "none"
        text = (
            f"{source}: broke off after {new} of {len(changes)} tensors; new: {names}; the others may be old or mixed"
        )
        raise LoadFailed(f"{text}; swap again, or load the pipeline anew: {error}") from error
