"""The index beside each shard: where every record lies and what it costs, so that packs are planned without reading data."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from qvl.data.draft import Draft, draft
from qvl.data.preference import draft_pair
from qvl.data.record import KINDS, Record, record_to_json
from qvl.data.shard import INDEX_SUFFIX, content_digest, entry_of, extents, read_members
from qvl.data.store import Store
from qvl.prompt.processor import Processor

VERSION = 2
BAD, MEDIA, VIDEO = 1, 2, 4
"""Flags of a record: it could not be read when the index was built; it has media; one of them is a video."""
_PROBE = "The quick brown fox, 3.14 and 2,718: «Größe», 速い茶色の狐, 12 < 34\n\n\tdef f(x): return x  # 🦊"


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """One row for each record of a shard, in its order (the letter S: each record is a sequence).

    Of an rl record the prompt is counted, of a pref record its two conversations together.
    """

    url: str
    offset_S: np.ndarray
    """int64: where its bytes begin."""
    size_S: np.ndarray
    """int64: how many they are, tar headers included."""
    text_S: np.ndarray
    """int32: tokens that are no placeholders."""
    visual_S: np.ndarray
    """int32: placeholders."""
    patch_S: np.ndarray
    """int32: patches."""
    square_S: np.ndarray
    """int64: sum over frames of (patches of the frame) squared: what attention in the vision tower costs."""
    target_S: np.ndarray
    """int32: tokens that are trained."""
    flag_S: np.ndarray
    """uint8: BAD, MEDIA, VIDEO."""
    kind_S: np.ndarray
    """uint8: place in KINDS."""
    digest_S: np.ndarray
    """uint64: content_digest, which changes with any byte."""
    content_S: np.ndarray
    """uint64: the same for records that say and show the same, whatever they are called and wherever they come from."""
    name_S: np.ndarray
    """int32: place of (source, category, license) in `names`."""
    names: tuple[tuple[str, str, str], ...]
    ids: tuple[str, ...]
    """Empty where they were not asked for."""

    @property
    def num_records(self) -> int:
        return len(self.offset_S)


def fingerprint(processor: Processor) -> str:
    """Changes with anything that changes a record's length: vocabulary, template, budgets, the rules in the code."""
    tokenizer = processor.tokenizer
    digest = hashlib.sha256()
    for id in range(tokenizer.num_ids):
        data = tokenizer.token_bytes(id)
        digest.update(len(data).to_bytes(4, "big") + data)
    facts = {
        "version": VERSION,
        "control": [[token.id, token.name] for token in tokenizer.control_tokens],
        "probe": tokenizer.encode_text(_PROBE),  # merges and the split, which the vocabulary alone does not show
        "style": processor.style,
        "form": processor.form,
        "images": _numbers(processor.image_budget),
        "videos": _numbers(processor.video_sampling),
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _numbers(budget: Any) -> dict[str, Any] | None:
    """A budget's fields; 64 and 64.0 are the same budget."""
    if budget is None:
        return None
    return {k: float(v) if isinstance(v, int | float) else v for k, v in asdict(budget).items()}


def index_url(shard: str) -> str:
    return shard + INDEX_SUFFIX


def build_index(
    shard: str,
    processor: Processor,
    store: Store | None = None,
    *,
    complain: Callable[[str], None] = lambda _: None,
    mark: str | None = None,
) -> ShardIndex:
    """Reads every record of a shard once and writes the index beside it. Media are not decoded.

    A record that cannot be read gets the flag BAD and a sentence through `complain`; the loader never plans it.
    """
    store = store or Store()
    rows: list[dict[str, Any]] = []
    names: dict[tuple[str, str, str], int] = {}
    with store.open(shard) as stream:
        places = list(extents(stream, shard))
        for place in places:
            stream.seek(place.offset)
            data = stream.read(place.size)
            row: dict[str, Any] = {"offset": place.offset, "size": place.size, "id": place.key, "kind": 0, "flag": 0}
            try:
                row |= _costs(data, f"{shard} at byte {place.offset}", processor, names)
            except Exception as error:  # records come from anywhere: none may leave its whole shard without an index
                row |= {"flag": BAD, "name": names.setdefault(("", "", ""), len(names)), "digest": 0}
                where = f"{shard} at byte {place.offset} is in no form we know: {type(error).__name__}: "
                complain(str(error) if isinstance(error, ValueError) else f"{where}{error}")
            rows.append(row)
    index = _from_rows(shard, rows, tuple(names))
    store.write(index_url(shard), _to_bytes(index, mark or fingerprint(processor)))
    return index


def drafts(record: Record, processor: Processor) -> tuple[Draft, ...]:
    """What is indexed of a record: itself, or both conversations of a pref record."""
    return draft_pair(record, processor) if record.kind == "pref" else (draft(record, processor),)


def _costs(data: bytes, where: str, processor: Processor, names: dict[tuple[str, str, str], int]) -> dict[str, Any]:
    members = read_members(data, where)
    record = entry_of(members, where).record
    nameless = replace(record, id="", source="", category="", license="", lang="", extra={})
    made = drafts(record, processor)
    grids = [one.sample.grid_I3 for one in made]
    areas = [h * w for grid_I3 in grids if grid_I3 is not None for t, h, w in grid_I3.tolist() for _ in range(t)]
    targets = [one.sample.is_target_T for one in made]
    has_video = any(block["type"] == "video" for block in record.blocks())
    return {
        "id": record.id,
        "text": sum(one.sample.num_tokens - one.num_visual_tokens for one in made),
        "visual": sum(one.num_visual_tokens for one in made),
        "patch": sum(one.num_patches for one in made),
        "square": sum(area * area for area in areas),
        "target": sum(0 if is_target_T is None else int(is_target_T.sum()) for is_target_T in targets),
        "flag": MEDIA * bool(record.media) | VIDEO * has_video,
        "kind": KINDS.index(record.kind),
        "digest": int.from_bytes(content_digest(members), "big"),
        "content": int.from_bytes(content_digest(members | {"json": record_to_json(nameless)}), "big"),
        "name": names.setdefault((record.source, record.category, record.license), len(names)),
    }


_COLUMNS = {
    "offset": np.int64,
    "size": np.int64,
    "text": np.int32,
    "visual": np.int32,
    "patch": np.int32,
    "square": np.int64,
    "target": np.int32,
    "flag": np.uint8,
    "kind": np.uint8,
    "digest": np.uint64,
    "content": np.uint64,
    "name": np.int32,
}


def _from_rows(shard: str, rows: Sequence[dict[str, Any]], names: tuple[tuple[str, str, str], ...]) -> ShardIndex:
    columns = {f"{k}_S": np.array([row.get(k, 0) for row in rows], dtype) for k, dtype in _COLUMNS.items()}
    return ShardIndex(url=shard, names=names, ids=tuple(row["id"] for row in rows), **columns)


def _to_bytes(index: ShardIndex, mark: str) -> bytes:
    buffer = io.BytesIO()
    head = {"version": VERSION, "fingerprint": mark, "names": index.names}
    columns = {name: getattr(index, f"{name}_S") for name in _COLUMNS}
    np.savez_compressed(buffer, head=_json(head), ids=_json(index.ids), **columns)
    return buffer.getvalue()


def _json(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def read_index(shard: str, mark: str | None, store: Store | None = None, *, with_ids: bool = True) -> ShardIndex:
    """The index of a shard. ValueError when there is none, or when it was built with another tokenizer, template or budget.

    `mark` is the fingerprint it must have; None takes any, for tools that only count.
    """
    store = store or Store()
    url = index_url(shard)
    if not store.exists(url):
        raise ValueError(f"{shard} has no index; build it with qvl data index.")
    try:
        with np.load(io.BytesIO(store.read(url)), allow_pickle=False) as file:
            head = json.loads(bytes(file["head"]))
            ids = tuple(json.loads(bytes(file["ids"]))) if with_ids else ()
            columns = {f"{name}_S": file[name] for name in _COLUMNS if head["version"] == VERSION}
    except (KeyError, OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{url} is no index of ours ({type(error).__name__}); build it again with qvl data index."
        ) from error
    if head["version"] != VERSION:
        raise ValueError(
            f"{url} has version {head['version']}, this code reads {VERSION}; build it again with qvl data index."
        )
    if mark is not None and head["fingerprint"] != mark:
        raise ValueError(
            f"{url} was built with another tokenizer, template or visual budget than this model's, so its lengths are wrong; "
            "build it again with qvl data index and this model."
        )
    names = tuple((source, category, license) for source, category, license in head["names"])
    return ShardIndex(url=shard, names=names, ids=ids, **columns)


def records_of(index: ShardIndex, store: Store) -> Iterator[tuple[int, bytes]]:
    """Each record's number and bytes, in order."""
    for i in range(index.num_records):
        yield i, store.read(index.url, int(index.offset_S[i]), int(index.size_S[i]))
