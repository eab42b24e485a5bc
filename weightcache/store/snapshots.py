"""Snapshots as directories: hard links to complete blobs, in the layout of the Hugging Face cache.

    hub/FOLDER/snapshots/REVISION/PATH    a link to the blob
    hub/FOLDER/refs/NAME                  for a hub: the revision that NAME stood for

A directory never shows a chunk that is not had: links are made when all blobs are complete, and go before a blob does.
With the first link that goes, the refs to its revision go too, so that no library takes what is left for the whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from weightcache.core.snapshot import Snapshot, check_path
from weightcache.errors import StoreError
from weightcache.store.files import BlobFiles, make_dir, prune
from weightcache.store.index import Index


class Hub:
    """The tree below ``hub/``. Not for several threads at once."""

    def __init__(self, root: Path, files: BlobFiles, index: Index) -> None:
        self.root = root
        self._files = files
        self._index = index
        make_dir(root)

    def directory(self, snapshot: Snapshot) -> Path:
        """Where a snapshot lies, materialised or not. Raises FormatError on names that would lead elsewhere."""
        for name in (snapshot.folder, snapshot.revision):
            if "/" in check_path(name):
                raise StoreError(f"{snapshot.source.public}: {name!r} is not a directory's name")
        return self.root / snapshot.folder / "snapshots" / snapshot.revision

    def show(self, snapshot: Snapshot, inode: Callable[[bytes], int], *, whole: bool) -> Path:
        """Link every file of a snapshot whose link is missing or wrong; ``inode`` gives that of a blob's file.

        Not ``whole``: it is a selection of the files, to which no ref may lead.
        """
        directory = self.directory(snapshot)
        links = [(entry.blob, directory / check_path(entry.path)) for entry in snapshot.files]
        wrong = [(blob, target) for blob, target in links if _inode(target) != inode(blob)]
        try:
            if wrong:  # noted first: a link that the index does not know would outlive its blob
                self._index.add_links((blob, str(target.relative_to(self.root))) for blob, target in wrong)
            for blob, target in wrong:
                self._files.link(blob, target)
            make_dir(directory)
            if whole and snapshot.source.scheme == "hf" and snapshot.source.revision != snapshot.revision:
                self._refer(directory, snapshot.source.revision)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise StoreError(f"{error.filename}: a file or directory stands in the way; remove it") from None
        return directory

    def _refer(self, directory: Path, name: str) -> None:
        ref = directory.parent.parent / "refs" / check_path(name)
        if _text(ref) == directory.name:
            return
        make_dir(ref.parent)
        self._files.spare.write_text(directory.name)
        self._files.spare.chmod(0o644)
        os.replace(self._files.spare, ref)

    def relink(self, blob: bytes) -> None:
        """A blob's path leads to another file with the same bytes: let its links follow."""
        for path in self._index.links(blob):
            if _inode(self.root / path) is not None:
                self._files.link(blob, self.root / path)

    def hide(self, blob: bytes) -> None:
        """Remove every link to a blob, the refs to what it leaves incomplete, and directories that become empty."""
        paths = self._index.links(blob)
        for path in paths:
            folder, _, revision, *_ = path.split("/")
            self._unrefer(self.root / folder / "refs", revision)
            target = self.root / path
            target.unlink(missing_ok=True)
            prune(target.parent, self.root)
        if paths:
            self._index.drop_links(blob)

    def _unrefer(self, refs: Path, revision: str) -> None:
        for folder, _, names in os.walk(refs, topdown=False):
            for name in names:
                ref = Path(folder, name)
                if _text(ref) == revision:
                    ref.unlink()
            prune(Path(folder), self.root)


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
