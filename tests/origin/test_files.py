from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from weightcache.core.source import Source, parse_source
from weightcache.errors import SourceChanged, SourceDenied, SourceError, SourceNotFound
from weightcache.origin import Origins
from weightcache.origin.base import read_whole

Make = Callable[..., Origins]
BODY = random.Random(5).randbytes(2_500_000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    (root / "unet").mkdir(parents=True)
    (root / "model.bin").write_bytes(BODY)
    (root / "unet" / "config.json").write_bytes(b"{}")
    (tmp_path / "secret").write_bytes(b"not for you")
    (tmp_path / "models-2").mkdir()
    (tmp_path / "models-2" / "other").write_bytes(b"nor this")
    return root


def source(path: Path) -> Source:
    return parse_source(f"file://{path}")


async def test_files_and_directories_below_a_root(root: Path, origins: Make) -> None:
    ours = origins(file_roots=(root,))
    snapshot = await ours.resolve(source(root / "model.bin"))
    (entry,) = snapshot.files
    assert (snapshot.single, entry.path, entry.size) == (True, "model.bin", len(BODY))
    assert await read_whole(ours, entry, 100, 2_000_000) == BODY[100:2_000_000]
    assert b"".join([bytes(piece) async for piece in ours.stream(entry)]) == BODY
    tree = await ours.resolve(source(root))
    assert [entry.path for entry in tree.files] == ["model.bin", "unet/config.json"]
    assert await read_whole(ours, tree.files[1], 0, 2) == b"{}"


async def test_without_roots_nothing_is_read(root: Path, origins: Make) -> None:
    with pytest.raises(SourceDenied, match=r"origin\.file_roots"):
        await origins().resolve(source(root / "model.bin"))


async def test_nothing_outside_the_roots_is_read_or_told_of(root: Path, origins: Make) -> None:
    ours = origins(file_roots=(root,))
    (root / "link").symlink_to(root.parent / "secret")
    (root / "unet" / "up").symlink_to("../../secret")
    (root / "inside").symlink_to("model.bin")
    for name in ("link", "unet/up", "../secret", "../missing", "../models-2/other"):
        path = os.path.normpath(root / name)
        with pytest.raises(SourceDenied, match="outside"):
            await ours.resolve(source(Path(path)))
    with pytest.raises(SourceDenied, match="link: outside"):
        await ours.resolve(source(root))
    (entry,) = (await ours.resolve(source(root / "inside"))).files
    assert await read_whole(ours, entry, 0, 10) == BODY[:10]
    (root / "inside").unlink()
    (root / "inside").symlink_to(root.parent / "secret")  # after it was resolved
    with pytest.raises(SourceDenied, match="outside"):
        await read_whole(ours, entry, 0, 10)


async def test_a_root_that_is_a_link_itself(root: Path, origins: Make, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    ours = origins(file_roots=(tmp_path / "alias",))
    (entry,) = (await ours.resolve(source(tmp_path / "alias" / "model.bin"))).files
    assert await read_whole(ours, entry, 0, 10) == BODY[:10]


@pytest.mark.parametrize("how", ["rewritten", "replaced", "truncated"])
async def test_a_file_that_changes_is_an_error(how: str, root: Path, origins: Make) -> None:
    ours = origins(file_roots=(root,))
    path = root / "model.bin"
    (entry,) = (await ours.resolve(source(path))).files
    if how == "rewritten":
        with path.open("r+b") as file:
            file.write(b"x")
        os.utime(path, ns=(1, 1))
    elif how == "replaced":
        times = path.stat()
        (root / "new").write_bytes(bytes(len(BODY)))
        os.utime(root / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.replace(root / "new", path)
    else:
        os.truncate(path, 1000)
    with pytest.raises(SourceChanged, match=r"model\.bin changed"):
        await read_whole(ours, entry, 0, 10)


async def test_what_cannot_be_a_blob(root: Path, origins: Make) -> None:
    ours = origins(file_roots=(root,))
    os.mkfifo(root / "pipe")
    with pytest.raises(SourceError, match="not a regular file"):  # and it must not wait for a writer
        await ours.resolve(source(root / "pipe"))
    with pytest.raises(SourceNotFound, match="no such file"):
        await ours.resolve(source(root / "missing.bin"))
    (root / "pipe").unlink()
    (root / "loop").symlink_to(root)
    with pytest.raises(SourceError, match="link to a directory"):
        await ours.resolve(source(root))
