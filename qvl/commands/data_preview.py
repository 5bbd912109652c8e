"""qvl data preview: one HTML page with pictures, boxes, frames and the text with what is learned marked."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from qvl.data.index import BAD, fingerprint, read_index
from qvl.data.order import key_of, permuted
from qvl.data.preview import preview_page
from qvl.data.shard import Entry, read_entry
from qvl.data.store import Store, all_shards
from qvl.outside.hub import resolve
from qvl.outside.media import MediaLimits
from qvl.outside.workers import WorkerPool
from qvl.prompt.processor import Processor


@dataclass(frozen=True, kw_only=True)
class DataPreview:
    """The page is one file that asks nobody for anything; open it in any browser."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Indexed shards, folders of shards, patterns or addresses."""
    model: str
    """Model folder the indexes were built with, or a name on the hub."""
    out: Path = Path("preview.html")
    """The page to write."""
    count: int = 20
    """Records to show, drawn at random."""
    ids: tuple[str, ...] = ()
    """Show these records instead."""
    seed: int = 0
    """Another seed shows other records."""


def run(args: DataPreview) -> int:
    processor = Processor.from_folder(resolve(args.model))
    store, mark = Store(), fingerprint(processor)
    chosen = list(_chosen(args, store, mark))
    if not chosen:
        raise ValueError("no record fits; name ids that are in the data, or leave --ids out.")
    with WorkerPool(MediaLimits(max_seconds=60)) as decoder:
        title = ", ".join(Path(path).name for path in args.data)
        args.out.write_text(preview_page(chosen, processor, decoder, title=title), encoding="utf-8")
    print(f"wrote {len(chosen)} records to {args.out}")
    return 0


def _chosen(args: DataPreview, store: Store, mark: str) -> Iterator[Entry]:
    indexes = [read_index(shard, mark, store) for shard in all_shards(args.data)]
    places = [(index, i) for index in indexes for i in np.flatnonzero((index.flag_S & BAD) == 0).tolist()]
    if args.ids:
        places = [(index, i) for index, i in places if index.ids[i] in args.ids]
    elif len(places) > args.count:
        order = permuted(np.arange(args.count), len(places), key_of(args.seed, "preview"))
        places = [places[i] for i in sorted(order.tolist())]
    for index, i in places:
        data = store.read(index.url, int(index.offset_S[i]), int(index.size_S[i]))
        yield read_entry(data, f"{index.url} at byte {int(index.offset_S[i])}")
