"""qvl data index: count every record's tokens with a model's processor, so that packs are planned without reading data."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from qvl.data.index import BAD, build_index, fingerprint, read_index
from qvl.data.store import Store, all_shards
from qvl.outside.hub import resolve
from qvl.prompt.processor import Processor


@dataclass(frozen=True, kw_only=True)
class DataIndex:
    """Writes NAME.tar.index.npz beside each shard. An index holds for one tokenizer, template and visual budget."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Shards, folders of shards, patterns or addresses."""
    model: str
    """Model folder whose tokenizer, template and budgets count, or a name on the hub."""
    force: bool = False
    """Build indexes anew that are there already and fit the model."""


def run(args: DataIndex) -> int:
    processor = Processor.from_folder(resolve(args.model))
    mark, store = fingerprint(processor), Store()
    records = tokens = bad = 0
    for shard in all_shards(args.data):
        index = None
        if not args.force:
            try:
                index = read_index(shard, mark, store)
            except ValueError:
                index = None  # none there, or another model's
        if index is None:
            index = build_index(shard, processor, store, mark=mark, complain=lambda text: print(text, file=sys.stderr))
        records += index.num_records
        tokens += int(index.text_S.sum()) + int(index.visual_S.sum())
        bad += int(((index.flag_S & BAD) > 0).sum())
    print(f"{records:,} records, {tokens:,} tokens; {bad:,} records cannot be read and will not be used")
    return 0 if bad < records else 1
