"""A source of the mixture at work: its shards' indexes joined, its records read by number."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qvl.core.batch import Sample
from qvl.core.log import say_once
from qvl.data.draft import fit
from qvl.data.index import BAD, MEDIA, ShardIndex, read_index
from qvl.data.mixture import SourceConfig
from qvl.data.packing import PackBudget
from qvl.data.plan import Item, Lengths
from qvl.data.quarantine import Failure
from qvl.data.record import KINDS, Kind
from qvl.data.sample import materialise
from qvl.data.shard import Entry, content_digest, entry_of, read_members
from qvl.data.store import Store, shards_of
from qvl.outside.workers import Decoder
from qvl.prompt.processor import Processor

TRAINED: tuple[Kind, ...] = ("pretrain", "sft")


@dataclass(frozen=True, kw_only=True)
class Source:
    config: SourceConfig
    shards: tuple[ShardIndex, ...]
    shard_S: np.ndarray
    """int32: which shard a record is in; unusable records are left out, so numbers are those of the plan."""
    row_S: np.ndarray
    """int64: its row there."""
    lengths: Lengths
    left_out: int
    """Records that could not be indexed, or that hold no token to train."""

    def key(self, record: int) -> tuple[str, int, int]:
        """What the quarantine knows a record by."""
        shard, row = self.place(record)
        return shard.url, int(shard.offset_S[row]), int(shard.digest_S[row])

    def failure(self, record: int, store: Store, reason: str) -> Failure:
        url, offset, digest = self.key(record)
        # The ids are not held: they would be most of the memory.
        id = read_index(url, None, store).ids[self.place(record)[1]]
        return Failure(id=id, shard=url, offset=offset, digest=digest, reason=reason)

    def place(self, record: int) -> tuple[ShardIndex, int]:
        return self.shards[int(self.shard_S[record])], int(self.row_S[record])

    def category(self, record: int) -> str:
        shard, row = self.place(record)
        return self.config.category or shard.names[int(shard.name_S[row])][1]

    def data_digest(self) -> int:
        """Changes with any record of the source."""
        return int(sum(int(np.bitwise_xor.reduce(s.digest_S)) + s.num_records for s in self.shards) % 2**63)

    def read(
        self, item: Item, processor: Processor, decoder: Decoder, store: Store, budget: PackBudget
    ) -> tuple[str, Sample, str]:
        """The id and sample of a place in the plan, and what was done to make it fit. ValueError when the record gives none."""
        shard, row = self.place(item.record)
        entry = self.entry(item.record, store)
        made = fit(entry.record, processor, budget.tokens, budget.patches, item.piece)
        if made.fate == "whole" and made.sample.num_tokens != int(shard.text_S[row]) + int(shard.visual_S[row]):
            raise ValueError(
                f"{shard.url} at byte {int(shard.offset_S[row])}: the record has another length than its index says; build the index again."
            )
        return entry.record.id, materialise(made, entry.media, processor, decoder), made.fate

    def entry(self, record: int, store: Store) -> Entry:
        """A record with its media. ValueError when its bytes are not those that were indexed."""
        shard, row = self.place(record)
        where = f"{shard.url} at byte {int(shard.offset_S[row])}"
        data = store.read(shard.url, int(shard.offset_S[row]), int(shard.size_S[row]))
        members = read_members(data, where)
        if int.from_bytes(content_digest(members), "big") != int(shard.digest_S[row]):
            raise ValueError(f"{where}: the bytes changed since the index was built.")
        return entry_of(members, where)


def open_source(config: SourceConfig, mark: str, store: Store, *, kinds: Sequence[Kind] = TRAINED) -> Source:
    """Reads the indexes of a source, which must hold records of these kinds alone. Records that could not be indexed, or that hold no token
    to train (prompts need none), are left out."""
    shards = tuple(read_index(url, mark, store, with_ids=False) for url in shards_of(config.path))
    for shard in shards:
        found = [KINDS[k] for k in set(shard.kind_S[(shard.flag_S & BAD) == 0].tolist())]
        if bad_kind := [kind for kind in found if kind not in kinds]:
            raise ValueError(
                f"{shard.url} holds {bad_kind[0]} records; the loader takes {' and '.join(kinds)} records."
            )
    is_prompt = [s.kind_S == KINDS.index("rl") for s in shards]
    usable = [
        np.flatnonzero(((s.flag_S & BAD) == 0) & (is_prompt_S | (s.target_S > 0)))
        for s, is_prompt_S in zip(shards, is_prompt, strict=True)
    ]
    left_out = sum(s.num_records for s in shards) - sum(len(rows) for rows in usable)
    if left_out:
        say_once(f"{config.path}: {left_out:,} records cannot be read or hold nothing to train; they are left out")
    shard_S = np.repeat(np.arange(len(shards), dtype=np.int32), [len(rows) for rows in usable])
    row_S = np.concatenate(usable)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(s, name)[rows] for s, rows in zip(shards, usable, strict=True)])

    is_text_S = (joined("kind_S") == KINDS.index("pretrain")) & ((joined("flag_S") & MEDIA) == 0)
    lengths = Lengths(
        token_S=joined("text_S") + joined("visual_S"),
        patch_S=joined("patch_S"),
        square_S=joined("square_S"),
        is_text_S=is_text_S,
        max_epochs=config.max_epochs,
    )
    return Source(config=config, shards=shards, shard_S=shard_S, row_S=row_S, lengths=lengths, left_out=left_out)


def stand_in_items(source: Source, number: int, item: Item, keys: Sequence[int]) -> list[Item]:
    """Records that may take the place of one that failed, the fullest first, among equals in the order of `keys`.

    They follow from `keys` and the source alone, so every rank and every worker finds the same.
    """
    lengths = source.lengths
    found: dict[int, Item] = {}
    for key in keys:
        record = key % lengths.num_records
        tokens, patches = int(lengths.token_S[record]), int(lengths.patch_S[record])
        if record != item.record and tokens <= item.tokens and patches <= item.patches:
            found[record] = Item(
                source=number,
                draw=item.draw,
                piece=0,
                record=record,
                tokens=tokens,
                patches=patches,
                square=int(lengths.square_S[record]),
                is_long=False,
            )
    return sorted(found.values(), key=lambda candidate: -candidate.tokens)
