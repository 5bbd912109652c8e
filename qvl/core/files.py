"""Files and folders written whole or not at all: made in a hidden folder beside their place, then renamed into it.

A kill at any moment leaves the old file or the new one under the final name, never a part of one, and perhaps a folder
`.NAME.RANDOM.partial` beside it. Such a leftover is removed by the next write of the same name that comes a day later, or by
`remove_leftovers`. After a loss of power the same holds for what was written with `sync`.
"""

import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEFTOVER_SECONDS = 24 * 3600
"""A partial folder of this age belongs to no living writer, whatever the host it was on."""


@contextmanager
def writing(path: Path | str, *, sync: bool = False) -> Iterator[Path]:
    """A free path at which the block makes a file, or a folder; it becomes `path` at the block's end, and is removed after an error.

    Of two writers of one path each has a free path of its own, and the one that ends later wins. The mode is what the block gives: by the
    umask, as for any new file. `sync`: what is written is on the disk before it gets its name. A folder that stands at `path` is renamed
    away first: a kill between the two renames leaves none there. The folder around `path` must exist; an OSError names `path`.
    """
    path = Path(path)
    with _partial_folder(path.parent, path) as partial:
        new = partial / "new"
        yield new
        if sync:
            _sync_all(new)
        if new.is_dir() and path.is_dir():
            os.rename(path, partial / "old")
        os.replace(new, path)
        if sync:
            _sync(path.parent)


@contextmanager
def writing_into(folder: Path | str, *, last: str) -> Iterator[Path]:
    """An empty folder for the block to make files in; they move into `folder` at the block's end, the file named `last` after the others.

    What else `folder` holds stays, and the folder is made if need be. Each file is whole or absent; a kill between two moves leaves new
    files beside old ones, so `last` should be the one without which the others count for nothing. After an error nothing has moved.
    """
    folder = Path(folder)
    # Inside where it can be: `folder` may be a link or a mount, and a rename does not cross file systems.
    home = folder if folder.is_dir() else folder.parent
    home.mkdir(parents=True, exist_ok=True)
    with _partial_folder(home, folder) as partial:
        yield partial
        folder.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir(), key=lambda file: (file.name == last, file.name)):
            os.replace(file, folder / file.name)


def write_bytes(path: Path | str, data: bytes, *, sync: bool = False) -> None:
    """A whole file, as `writing` does it."""
    with writing(path, sync=sync) as new:
        new.write_bytes(data)


def write_text(path: Path | str, text: str, *, sync: bool = False) -> None:
    """A whole file in UTF-8, as `writing` does it."""
    write_bytes(path, text.encode(), sync=sync)


def remove_leftovers(folder: Path, names: str, *, min_age_seconds: float = 0) -> None:
    """Removes what killed writers left in `folder`: the partial folders that match `.NAMES.partial`, a pattern as of glob.

    With no age it takes a living writer's too, so it is for a caller who knows that nobody else writes these names now.
    """
    for leftover in folder.glob(f".{names}.partial"):
        try:
            age = time.time() - leftover.stat().st_mtime
        except FileNotFoundError:  # another process removed it
            continue
        if age >= min_age_seconds:
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _partial_folder(home: Path, path: Path) -> Iterator[Path]:
    """A folder of this writer's own, in `home`, for what becomes `path`. A folder and not a file, since a library that is asked for
    a file may make others beside it (safetensors does): those go with it."""
    partial = home / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        remove_leftovers(home, f"{glob.escape(path.name)}.????????", min_age_seconds=LEFTOVER_SECONDS)
        partial.mkdir(mode=0o700)
        yield partial
    except OSError as error:
        if isinstance(error.filename, str) and Path(error.filename).is_relative_to(partial):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync_all(path: Path) -> None:
    """A file, or a folder with all that is in it."""
    for inside in path.rglob("*") if path.is_dir() else ():
        _sync(inside)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
