"""Bytes by address: local files and object stores behind one `read`, with shards kept on disk, the least used dropped first."""

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from qvl.core.files import write_bytes, writing

OPEN_FILES = 64
CHUNK = 16 * 1024**2


class Store:
    """Reads ranges of files. Threads may share one; so may processes a cache folder."""

    def __init__(self, cache: Path | str | None = None, cache_bytes: int = 50 * 1024**3) -> None:
        """`cache`: a folder in which whole remote shards are kept. Without it each range is fetched by itself."""
        self.cache = None if cache is None else Path(cache)
        self.cache_bytes = cache_bytes
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}
        if self.cache is not None:
            self.cache.mkdir(parents=True, exist_ok=True)

    def read(self, url: str, offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `offset`; ValueError when the file ends before."""
        if is_remote(url) and self.cache is None:
            fs, path = _filesystem(url)
            data = fs.cat_file(path, start=offset, end=None if size is None else offset + size)
        else:
            file = self._open(url)
            data = os.pread(file.fileno(), file.size - offset if size is None else size, offset)
            while size is not None and len(data) < size:  # one read gives at most 2 GB
                more = os.pread(file.fileno(), size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        if size is not None and len(data) != size:
            raise ValueError(
                f"{url} ends after {offset + len(data)} bytes; {offset + size} were expected. Copy it again."
            )
        return data

    def open(self, url: str) -> Any:
        """The whole file as a stream."""
        fs, path = _filesystem(url)
        return fs.open(path, "rb")

    def exists(self, url: str) -> bool:
        fs, path = _filesystem(url)
        return fs.exists(path)

    def write(self, url: str, data: bytes) -> None:
        """A whole small file, such as an index; on a local disk whole or not at all, even after a loss of power."""
        fs, path = _filesystem(url)
        if is_remote(url):
            fs.pipe_file(path, data)
            return
        write_bytes(path, data, sync=True)

    def _open(self, url: str) -> "_File":
        with self._lock:
            if file := self._files.get(url):
                self._files.move_to_end(url)
                return file
            turn = self._fetching.setdefault(url, threading.Lock())
        with turn:  # two threads that want the same shard fetch it once
            with self._lock:
                if file := self._files.get(url):
                    return file
            file = _File(self._fetch(url) if is_remote(url) else local_path(url))
            with self._lock:
                self._files[url] = file
                while len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)  # closed when its last reader lets go of it
            return file

    def _fetch(self, url: str) -> str:
        """The local copy of a remote file. It is touched on use; what was untouched longest goes when room is needed."""
        assert self.cache is not None
        fs, path = _filesystem(url)
        # The size is part of the name: a shard that was written anew is fetched anew.
        size = fs.size(path)
        copy = self.cache / f"{hashlib.sha256(f'{url} {size}'.encode()).hexdigest()[:32]}.shard"
        if copy.exists():
            os.utime(copy)
            return str(copy)
        self._make_room(size or 0)
        with writing(copy) as new, fs.open(path, "rb") as source, new.open("wb") as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
        return str(copy)

    def _make_room(self, size: int) -> None:
        assert self.cache is not None
        kept = []
        for file in self.cache.glob("*.shard"):
            try:
                facts = file.stat()
            except FileNotFoundError:  # another process was faster
                continue
            kept.append((facts.st_mtime_ns, facts.st_size, file))
        total = sum(size for _, size, _ in kept)
        for _, freed, file in sorted(kept, key=lambda entry: entry[:2]):
            if total + size <= self.cache_bytes:
                return
            file.unlink(missing_ok=True)  # who has it open reads on
            total -= freed


class _File:
    """An open file that closes when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

    def fileno(self) -> int:
        return self._fd

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


def is_remote(url: str) -> bool:
    return bool(re.match(r"[a-zA-Z][a-zA-Z0-9+.\-]+://", url)) and not url.startswith("file://")


def local_path(url: str) -> str:
    return url.removeprefix("file://")


def all_shards(paths: Sequence[str]) -> list[str]:
    """Those of every path in turn. ValueError where none is named."""
    if not paths:
        raise ValueError("no data was named; give shards, folders of shards, or patterns.")
    return [shard for path in paths for shard in shards_of(path)]


def shards_of(path: str | Path) -> list[str]:
    """The tar shards that `path` names: one file, a folder's, or a pattern's, in the order of their names."""
    text = str(path)
    fs, inner = _filesystem(text)
    if "*" in inner or "?" in inner:
        found = fs.glob(inner)
    elif fs.isdir(inner):
        found = fs.glob(inner.rstrip("/") + "/*.tar")
    else:
        found = [inner] if fs.exists(inner) else []
    if not found:
        is_there = "*" in inner or "?" in inner or fs.exists(inner)
        what = "holds no .tar shards" if is_there else "does not exist"
        raise ValueError(f"{path} {what}; make shards with qvl data import.")
    shards: Sequence[str] = sorted(str(name) for name in found)
    return [fs.unstrip_protocol(name) if is_remote(text) else name for name in shards]


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url if is_remote(url) else local_path(url))
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url} cannot be opened: {error}.") from error
