"""What a data set holds and whether it is whole: counts from the indexes, and a check that reads and decodes every record."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qvl.data.index import BAD, ShardIndex, drafts, records_of
from qvl.data.record import KINDS
from qvl.data.sample import materialise
from qvl.data.shard import content_digest, read_entry, read_members
from qvl.data.store import Store
from qvl.outside.workers import Decoder
from qvl.prompt.processor import Processor

EDGES = (0, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)


@dataclass(kw_only=True)
class Tally:
    records: int = 0
    text: int = 0
    visual: int = 0
    targets: int = 0


@dataclass(kw_only=True)
class Stats:
    """Sums over shards. Tokens are counted as the indexes' processor counts them."""

    by_category: dict[str, Tally] = field(default_factory=dict)
    by_source: dict[str, Tally] = field(default_factory=dict)
    by_license: dict[str, int] = field(default_factory=dict)
    by_kind: dict[str, int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    """Lower edge in tokens -> records."""
    bad: int = 0
    longest: int = 0
    twice: int = 0
    """Records whose content another record has too."""

    @property
    def total(self) -> Tally:
        tallies = self.by_category.values()
        return Tally(
            records=sum(t.records for t in tallies),
            text=sum(t.text for t in tallies),
            visual=sum(t.visual for t in tallies),
            targets=sum(t.targets for t in tallies),
        )


def stats_of(indexes: Sequence[ShardIndex]) -> Stats:
    stats = Stats()
    seen: set[int] = set()
    for index in indexes:
        good = (index.flag_S & BAD) == 0
        stats.bad += int((~good).sum())
        for number, (source, category, license) in enumerate(index.names):
            mine = good & (index.name_S == number)
            if not mine.any():
                continue
            count = int(mine.sum())
            for tally in (stats.by_category.setdefault(category, Tally()), stats.by_source.setdefault(source, Tally())):
                tally.records += count
                tally.text += int(index.text_S[mine].sum())
                tally.visual += int(index.visual_S[mine].sum())
                tally.targets += int(index.target_S[mine].sum())
            _add(stats.by_license, license or "unknown", count)
        token_S = index.text_S + index.visual_S
        places = np.searchsorted(EDGES, token_S[good], side="right") - 1
        for place, count in Counter(places.tolist()).items():
            _add(stats.lengths, EDGES[place], count)
        stats.longest = max(stats.longest, int(token_S[good].max(initial=0)))
        for number, kind in enumerate(KINDS):
            if count := int((good & (index.kind_S == number)).sum()):
                _add(stats.by_kind, kind, count)
        for content in index.content_S[good].tolist():
            stats.twice += content in seen
            seen.add(content)
    return stats


def _add(counts: dict[Any, int], key: Any, count: int) -> None:
    counts[key] = counts.get(key, 0) + count


@dataclass(frozen=True, kw_only=True)
class Fault:
    id: str
    shard: str
    reason: str


def verify(
    indexes: Sequence[ShardIndex],
    processor: Processor,
    decoder: Decoder,
    store: Store,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Fault]:
    """Reads every record, compares its hashes, decodes its media, makes its sample. Gives what is wrong, one record at a time."""
    ids: dict[str, str] = {}
    done = 0
    for index in indexes:
        for i, data in records_of(index, store):
            where = f"{index.url} at byte {int(index.offset_S[i])}"
            try:
                _verify_one(index, i, data, where, processor, decoder)
            except ValueError as error:
                yield Fault(id=index.ids[i], shard=index.url, reason=str(error))
            else:
                if first := ids.get(index.ids[i]):
                    reason = f"the id {index.ids[i]!r} stands in {first} too; ids must differ."
                    yield Fault(id=index.ids[i], shard=index.url, reason=reason)
                ids[index.ids[i]] = index.url
            done += 1
            progress(done)


def _verify_one(index: ShardIndex, i: int, data: bytes, where: str, processor: Processor, decoder: Decoder) -> None:
    members = read_members(data, where)
    entry = read_entry(data, where)
    if int(index.flag_S[i]) & BAD:
        raise ValueError(f"{where}: the index flags it as unreadable, though it reads now; build the index again.")
    for name, medium in entry.record.media.items():
        if medium.sha256 is not None and hashlib.sha256(entry.media[name]).hexdigest() != medium.sha256:
            raise ValueError(f"{where}: {name} has another SHA-256 than the record says; it was damaged or replaced.")
    if int.from_bytes(content_digest(members), "big") != int(index.digest_S[i]):
        raise ValueError(f"{where}: the bytes changed since the index was built.")
    made = drafts(entry.record, processor)
    if sum(one.sample.num_tokens for one in made) != int(index.text_S[i]) + int(index.visual_S[i]):
        raise ValueError(f"{where}: the record has another length than its index says; build the index again.")
    for one in made:
        materialise(one, entry.media, processor, decoder)
