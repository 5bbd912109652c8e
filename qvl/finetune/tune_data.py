"""What a tuning run reads: the mixture with its replay, dealt out in packs, and the part of it that is held out to judge by."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qvl.core.batch import Sample
from qvl.core.log import log
from qvl.data.loader import Loader, MicroBatch, make_loader, micro_batch
from qvl.data.mixture import Mixture
from qvl.data.packing import PackBudget
from qvl.data.plan import Item, Lengths
from qvl.data.source import Source
from qvl.data.store import Store
from qvl.model.config import ModelConfig
from qvl.outside.workers import Decoder
from qvl.parallel.data_parallel import World
from qvl.prompt.processor import Processor

HELD_OUT_PACKS = 8
"""Packs of held-out records that are read at each judgement."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Records that are never trained on, in packs; their media are decoded anew at each reading."""

    sources: tuple[Source, ...]
    planned: tuple[tuple[Item, ...], ...]
    processor: Processor
    model_config: ModelConfig
    budget: PackBudget
    store: Store
    decoder: Decoder

    @property
    def num_records(self) -> int:
        return sum(map(len, self.planned))

    def packs(self) -> Iterator[MicroBatch]:
        for planned in self.planned:
            samples: list[Sample] = []
            ids, categories = [], []
            for item in planned:
                source = self.sources[item.source]
                try:
                    id, sample, _ = source.read(item, self.processor, self.decoder, self.store, self.budget)
                except ValueError as error:
                    log.warning("a held-out record cannot be read and is left out: %s", error)
                    continue
                samples.append(sample)
                ids.append(id)
                categories.append(source.category(item.record))
            if samples:
                yield micro_batch(samples, ids, categories, self.model_config)


def open_data(
    mixture: Mixture,
    processor: Processor,
    model_config: ModelConfig,
    budget: PackBudget,
    *,
    packs_per_step: int,
    held_out: float,
    seed: int,
    world: World,
    workers: int,
    out: Path,
) -> tuple[Loader, HeldOut]:
    """The loader over what is trained on, and what is held out of the mixture's own sources (not of what is replayed)."""
    held: list[Source] = []

    def trained_part(number: int, source: Source) -> Source:
        trained, kept = split(source, held_out)
        # Of what is replayed nothing judges, but what is held out above is not learned from here either.
        held.append(kept if number < len(mixture.sources) else only(kept, np.zeros(len(kept.row_S), bool)))
        return trained

    loader = make_loader(
        mixture,
        processor,
        model_config,
        pack_tokens=budget.tokens,
        pack_patches=budget.patches,
        packs_per_step=packs_per_step,
        seed=seed,
        rank=world.rank,
        world_size=world.size,
        workers=workers,
        out=out,
        buffer=budget.buffer,
        select=trained_part,
    )
    held_out_records = HeldOut(
        sources=tuple(held),
        planned=plan_held_out(tuple(held), budget),
        processor=processor,
        model_config=model_config,
        budget=budget,
        store=loader.store,
        decoder=loader.decoder,
    )
    if held_out and not held_out_records.num_records and world.rank == 0:
        log.warning(
            "a share of %g of your records is to be held out, but they are too few to give one: there will be no held-out loss. "
            "Give more records, or a larger --held-out.",
            held_out,
        )
    return loader, held_out_records


def split(source: Source, share: float) -> tuple[Source, Source]:
    """(what is trained on, what is held out): by what a record says and shows, so that it stays on its side whatever is added beside it
    and whatever it is called, and repeats of it stay with it. A source too small to give a record gives none."""
    is_held_S = (contents(source) >> np.uint64(11)).astype(np.float64) / 2.0**53 < share
    if is_held_S.all():
        is_held_S[:] = False
    return only(source, ~is_held_S), only(source, is_held_S)


def contents(source: Source) -> np.ndarray:
    """uint64, the same for records that say and show the same."""
    rows = [source.row_S[source.shard_S == number] for number in range(len(source.shards))]
    return np.concatenate([shard.content_S[row] for shard, row in zip(source.shards, rows, strict=True)])


def only(source: Source, is_kept_S: np.ndarray) -> Source:
    """The source with the records that are marked."""
    old = source.lengths
    lengths = Lengths(
        token_S=old.token_S[is_kept_S],
        patch_S=old.patch_S[is_kept_S],
        square_S=old.square_S[is_kept_S],
        is_text_S=old.is_text_S[is_kept_S],
        max_epochs=old.max_epochs,
    )
    return replace(source, shard_S=source.shard_S[is_kept_S], row_S=source.row_S[is_kept_S], lengths=lengths)


def plan_held_out(sources: tuple[Source, ...], budget: PackBudget) -> tuple[tuple[Item, ...], ...]:
    """Up to HELD_OUT_PACKS packs of records, in the order of their contents' digests; of a long text the first piece."""
    order = sorted(
        (digest, number, record)
        for number, source in enumerate(sources)
        for record, digest in enumerate(contents(source).tolist())
    )
    packs: list[list[Item]] = []
    tokens = patches = 0
    for _, number, record in order:
        lengths = sources[number].lengths
        need_tokens = min(int(lengths.token_S[record]), budget.tokens)
        need_patches = min(int(lengths.patch_S[record]), budget.patches)
        if not packs or tokens + need_tokens > budget.tokens or patches + need_patches > budget.patches:
            if len(packs) == HELD_OUT_PACKS:
                break
            packs.append([])
            tokens = patches = 0
        tokens, patches = tokens + need_tokens, patches + need_patches
        item = Item(
            source=number,
            draw=0,
            piece=0,
            record=record,
            tokens=need_tokens,
            patches=need_patches,
            square=int(lengths.square_S[record]),
            is_long=False,
        )
        packs[-1].append(item)
    return tuple(map(tuple, packs))
