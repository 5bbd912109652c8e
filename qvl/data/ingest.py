"""Importing: files of other formats in, shards out, and every row that cannot be used written down with its reason."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qvl.core.log import JsonlWriter
from qvl.data.formats import FORMATS, Format, detect, to_record, unread_keys
from qvl.data.media import MediaBag
from qvl.data.record import Kind, Record
from qvl.data.shard import ShardWriter
from qvl.data.tables import table_rows
from qvl.outside.workers import Decoder, InProcess

REJECTS = "rejects.jsonl"
SHOWN = 3
"""Rejected rows that a report names."""
ENDINGS = (".jsonl", ".json", ".parquet", ".arrow")
BOOKKEEPING = {"dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json"}
"""What Hugging Face's save_to_disk and load_dataset keep beside the rows."""


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    written: int
    rejected: int
    shards: tuple[Path, ...]
    rejects: Path | None
    """Where the rows that were left out are listed; None when there are none."""
    files: tuple[Path, ...] = ()
    """What was read: of a folder all its data files, its parts for testing too."""
    first: tuple[str, ...] = ()
    """The first few of them, as FILE, line N: REASON."""
    repeated: int = 0
    """Rows whose id an earlier row had: a mark of their content was put behind it, for ids must differ."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Keys that records have no place for -> the number of rows that had them."""


def import_data(
    source: Path,
    out: Path,
    *,
    format: Format | None = None,
    kind: Kind = "sft",
    media_root: Path | None = None,
    name: str = "",
    category: str = "",
    license: str = "",
    lang: str = "",
    max_records: int = 10_000,
    max_bytes: int = 1024**3,
    decoder: Decoder | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> ImportReport:
    """Reads a .jsonl, .json, .parquet or .arrow file, or a folder of them (a Hugging Face data set), and writes shards to `out`.

    `format` None: told by each row's keys. `media_root`: the folder that the rows' paths start from, the source's own without it.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"the format is {format!r}; expected one of {', '.join(FORMATS)}.")
    files = input_files(source)
    root = media_root or (source if source.is_dir() else source.parent)
    decoder = decoder or InProcess()
    facts = {"source": name or source.stem, "category": category, "license": license, "lang": lang}
    written, rejected, repeated, first = 0, 0, 0, []
    seen: set[int] = set()
    unread: Counter[str] = Counter()
    rejects: JsonlWriter | None = None
    with ShardWriter(out, max_records=max_records, max_bytes=max_bytes) as writer:
        for file in files:
            for number, row in rows_of(file):
                progress(written + rejected)
                try:
                    if isinstance(row, ValueError):
                        raise row
                    bag = MediaBag(root=root, decoder=decoder)
                    place = f"{file.relative_to(source) if source.is_dir() else file.name}:{number}"
                    record, row_format = _record(row, format, bag, place=place, kind=kind, **facts)
                    if hash(record.id) in seen:
                        record = replace(record, id=f"{record.id}-{_mark(place, row)}")
                        repeated += 1
                    writer.write(record, bag.files)
                    seen.add(hash(record.id))
                    unread.update(unread_keys(row, row_format, record.kind))
                    written += 1
                except ValueError as error:
                    rejected += 1
                    if rejected <= SHOWN:
                        first.append(f"{file.name}, line {number}: {error}")
                    rejects = rejects or JsonlWriter(out / REJECTS)
                    id = row.get("id") if isinstance(row, dict) else None
                    told = {"id": None if id is None else _whole(str(id)), "reason": _whole(str(error))}
                    rejects.write({"file": file.name, "line": number, **told})
        if rejects is not None:
            rejects.close()
    return ImportReport(
        written=written,
        rejected=rejected,
        shards=tuple(writer.paths),
        rejects=out / REJECTS if rejected else None,
        files=tuple(files),
        first=tuple(first),
        repeated=repeated,
        unread=dict(unread),
    )


def _mark(place: str, row: Mapping[str, Any]) -> str:
    """Of a row's place and content: rows of two files of one name, in this import or another, share none."""
    digest = hashlib.blake2b(place.encode("utf-8", "replace"), digest_size=6)
    digest.update(json.dumps(row, sort_keys=True, default=_hashable).encode("utf-8", "replace"))
    return digest.hexdigest()


def _hashable(value: Any) -> str:
    return hashlib.blake2b(value, digest_size=16).hexdigest() if isinstance(value, bytes | bytearray) else str(value)


def input_files(source: Path) -> list[Path]:
    """The data files that `source` names, in order: of a folder all of them, whatever their endings. The bookkeeping of a Hugging Face
    folder and the list of rejected rows that an import wrote are skipped."""
    if source.is_file():
        if source.suffix not in ENDINGS:
            raise ValueError(f"{source} ends in {source.suffix or 'nothing'}; expected one of {', '.join(ENDINGS)}.")
        return [source]
    if not source.is_dir():
        raise ValueError(f"{source} does not exist; give a file or a folder of {', '.join(ENDINGS)}.")
    found = sorted(
        f for f in source.rglob("*") if f.suffix in ENDINGS and f.name not in BOOKKEEPING and not _is_rejects(f)
    )
    if not found:
        raise ValueError(f"{source} holds no {', '.join(ENDINGS)} files.")
    return found


def _is_rejects(file: Path) -> bool:
    """Whether an import wrote it: rows that are no data."""
    if file.name != REJECTS:
        return False
    with file.open("rb") as lines:
        first = _parsed(lines.readline())
    return isinstance(first, dict) and first.keys() == {"file", "line", "id", "reason"}


def rows_of(file: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """(line or row number from 1, row). A line that is no object comes as the error that says so."""
    if file.suffix in (".parquet", ".arrow"):
        for number, row in enumerate(table_rows(file), 1):
            yield number, _without_none(row)
        return
    if file.suffix == ".json":
        try:
            data = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}.") from None
        if not isinstance(data, list):
            raise ValueError(
                f"{file} holds a {type(data).__name__}; expected a list of rows. If it is no data, move it out of the folder."
            )
        for number, row in enumerate(data, 1):
            yield number, _object(row)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _parsed(line)


def _record(
    row: dict[str, Any], format: Format | None, bag: MediaBag, *, place: str, **facts: Any
) -> tuple[Record, Format]:
    """Rows come from anywhere: whatever is wrong with one is a reason to reject it, and no end of the import."""
    try:
        found = format or detect(row)
        name, _, number = place.rpartition(":")
        id = "" if row.get("id") else f"{Path(name).stem}-{number}-{_mark(place, row)}"
        return to_record(row, found, bag, id=id, **facts), found
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the row is in no form we know ({type(error).__name__}: {error}).") from error


def _whole(text: str) -> str:
    """Without half surrogate pairs, which no file can hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _without_none(value: Any) -> Any:
    """Tables give every row every key; what is null was not there."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _parsed(line: bytes) -> dict[str, Any] | ValueError:
    try:
        return _object(json.loads(line))
    except (ValueError, RecursionError) as error:
        return ValueError(f"no JSON: {error}.")


def _object(row: Any) -> dict[str, Any] | ValueError:
    return row if isinstance(row, dict) else ValueError(f"a {type(row).__name__}; expected an object.")
