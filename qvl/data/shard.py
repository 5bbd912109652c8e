"""Tar shards in the WebDataset layout: a record's JSON and its media side by side, each written whole or not at all, read by offset."""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from qvl.core.files import remove_leftovers, writing
from qvl.data.record import Medium, Record, read_record, record_to_json

BLOCK = 512
MEDIA_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")


INDEX_SUFFIX = ".index.npz"
"""Of the file beside a shard that `qvl.data.index` writes."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A record with its media, as it stands in a shard."""

    record: Record
    media: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Where a record lies in its shard, headers included."""

    key: str
    offset: int
    size: int


class ShardWriter:
    """Writes PREFIX-000000.tar, PREFIX-000001.tar, ... in a folder.

    Equal records give equal bytes: no times, no owners. A shard gets its name only when it is whole, so a killed run leaves none that is
    cut short; what it was writing is removed by the next run.
    """

    def __init__(
        self, folder: Path | str, *, prefix: str = "shard", max_records: int = 10_000, max_bytes: int = 1024**3
    ) -> None:
        if max_records < 1 or max_bytes < 1:
            raise ValueError(
                f"a shard of {max_records} records and {max_bytes} bytes holds nothing; allow one of each."
            )
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if old := sorted(self.folder.glob(f"{prefix}-*.tar")):
            raise ValueError(
                f"{self.folder} holds {old[0].name} already; write to another folder, or remove the shards."
            )
        remove_leftovers(self.folder, f"{prefix}-??????.tar.*")
        self.prefix, self.max_records, self.max_bytes = prefix, max_records, max_bytes
        self.paths: list[Path] = []
        self.num_records = 0
        self._tar: tarfile.TarFile | None = None
        self._open_shard = ExitStack()
        self._in_shard = 0

    def write(self, record: Record, media: Mapping[str, bytes]) -> None:
        """Adds a record. The hashes of its media are filled in; names that no message or box uses are refused."""
        if set(media) != set(record.media):
            raise ValueError(
                f"record {record.id!r} names the media {sorted(record.media)} and {sorted(media)} came; give the same."
            )
        for name in media:
            if not MEDIA_NAME.fullmatch(name) or name == "json":
                raise ValueError(f"record {record.id!r} has a medium named {name!r}; use letters, digits, - and dots.")
        hashed = {name: _hashed(record.media[name], data) for name, data in media.items()}
        body = record_to_json(replace(record, media=hashed))
        read_record(body)
        tar = self._open()
        key = f"{self.num_records:09d}"
        for name, data in {"json": body, **media}.items():
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size, info.mtime, info.mode = len(data), 0, 0o644
            tar.addfile(info, io.BytesIO(data))
        self.num_records += 1
        self._in_shard += 1
        if self._in_shard >= self.max_records or tar.offset >= self.max_bytes:
            self._finish()

    def _open(self) -> tarfile.TarFile:
        if self._tar is None:
            new = self._open_shard.enter_context(writing(self._path, sync=True))
            file = self._open_shard.enter_context(new.open("wb"))
            self._tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
            self._in_shard = 0
        return self._tar

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.prefix}-{len(self.paths):06d}.tar"

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        # An index of an older shard of that name would fit this one's first records and hide the others.
        self._path.with_name(self._path.name + INDEX_SUFFIX).unlink(missing_ok=True)
        self._open_shard.close()
        self.paths.append(self._path)

    def close(self) -> None:
        self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        else:
            self._open_shard.__exit__(kind, error, trace)


def _hashed(medium: Medium, data: bytes) -> Medium:
    return replace(medium, sha256=hashlib.sha256(data).hexdigest())


def extents(stream: BinaryIO, where: str) -> Iterator[Extent]:
    """The records of a shard in order, from its headers; contents are skipped over."""
    key, start, end = "", 0, 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                stem = member.name.rpartition("/")[2].partition(".")[0]
                stem = member.name[: len(member.name) - len(member.name.rpartition("/")[2])] + stem
                if stem != key and key:
                    yield Extent(key=key, offset=start, size=end - start)
                if stem != key:
                    key, start = stem, member.offset
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        stream.seek(end)
        if stream.read(2 * BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"the header at byte {end} is damaged")
    except tarfile.TarError as error:
        raise ValueError(f"{where} is not a whole tar file ({error}); copy or write it again.") from error
    if key:
        yield Extent(key=key, offset=start, size=end - start)


def read_entry(data: bytes, where: str, *, wanted: bool = True) -> Entry:
    """The record whose bytes these are. `wanted=False` leaves the media out."""
    return entry_of(read_members(data, where), where, wanted=wanted)


def entry_of(members: Mapping[str, bytes], where: str, *, wanted: bool = True) -> Entry:
    """As `read_entry`, of members that are read already."""
    if "json" not in members:
        raise ValueError(f"{where} has no .json member; every record needs one.")
    record = read_record(members["json"], where)
    if not wanted:
        return Entry(record=record, media={})
    if lacking := sorted(set(record.media) - set(members)):
        raise ValueError(f"{where} lacks its media {', '.join(lacking)}.")
    return Entry(record=record, media={name: data for name, data in members.items() if name != "json"})


def read_members(data: bytes, where: str) -> dict[str, bytes]:
    """Name after the key -> bytes."""
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    members[member.name.rpartition("/")[2].partition(".")[2]] = file.read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{where} is not readable as tar ({error}).") from error
    return members


def content_digest(members: Mapping[str, bytes]) -> bytes:
    """8 bytes that change with any byte of the JSON or the media; tar headers do not count."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(members):
        digest.update(f"{name} {len(members[name])}\n".encode())
        digest.update(members[name])
    return digest.digest()
