"""qvl data verify: read every record, compare hashes, decode its media and make its sample; say what is wrong."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from qvl.data.index import fingerprint, read_index
from qvl.data.report import verify
from qvl.data.store import Store, all_shards
from qvl.outside.hub import resolve
from qvl.outside.media import MediaLimits
from qvl.outside.workers import WorkerPool
from qvl.prompt.processor import Processor


@dataclass(frozen=True, kw_only=True)
class DataVerify:
    """Prints one JSON line for each record that is wrong, and ends with 1 when there are any."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Indexed shards, folders of shards, patterns or addresses."""
    model: str
    """Model folder the indexes were built with, or a name on the hub."""
    seconds: float = 60.0
    """What decoding one file may take before its process is ended."""


def run(args: DataVerify) -> int:
    processor = Processor.from_folder(resolve(args.model))
    mark, store = fingerprint(processor), Store()
    indexes = [read_index(shard, mark, store) for shard in all_shards(args.data)]
    faults = 0
    with WorkerPool(MediaLimits(max_seconds=args.seconds)) as decoder:
        for fault in verify(indexes, processor, decoder, store):
            print(json.dumps(asdict(fault), ensure_ascii=False), flush=True)
            faults += 1
    total = sum(index.num_records for index in indexes)
    print(f"{total - faults:,} of {total:,} records are whole")
    return 1 if faults else 0
