"""Image-caption pairs out of indexed shards: which records are one, and the packs that V0 learns from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

from qvl.core.log import log, say_once
from qvl.data.draft import fit
from qvl.data.index import MEDIA, VIDEO, fingerprint
from qvl.data.loader import Loader, make_loader
from qvl.data.mixture import Mixture
from qvl.data.packing import PackBudget
from qvl.data.plan import Item
from qvl.data.record import Record, content_blocks
from qvl.data.sample import materialise
from qvl.data.source import Source, open_source
from qvl.data.store import Store
from qvl.finetune.tune_data import only, plan_held_out, split
from qvl.model.config import ModelConfig
from qvl.model.siglip_text import fixed_length
from qvl.outside.workers import Decoder
from qvl.parallel.data_parallel import World
from qvl.prompt.processor import Processor
from qvl.prompt.tokenizer import Tokenizer
from qvl.train.contrastive import CaptionPack, caption_id, picture_batch

MAX_PROBED = 256
"""Records that are looked at before data without a pair is refused."""
MAX_BAD_RATE = 0.5
"""Share of records that may be no pair, or unreadable."""

Encode = Callable[[Sequence[str]], Tensor]
"""Captions -> int64 rows of fixed length (S, T), as the text tower reads them."""


def caption_of(record: Record) -> str:
    """The caption of a record that is one image and its caption: a document of an image and text, or a chat of one turn about one image,
    whose answer is the caption. ValueError says why another record is no pair."""
    where = f"record {record.id!r}"
    blocks = list(record.blocks())
    shown = [block for block in blocks if block["type"] in ("image", "video", "document")]
    if len(shown) != 1 or shown[0]["type"] != "image":
        kinds = ", ".join(block["type"] for block in shown) or "no media"
        raise ValueError(f"{where} shows {kinds}; an image-caption pair shows one image.")
    told = [message for message in record.messages if message["role"] in ("assistant", "document")]
    if len(told) != 1:
        raise ValueError(
            f"{where} has {len(told)} answers; the caption of its image is one answer, or a document's text."
        )
    caption = " ".join(block["text"] for block in content_blocks(told[0]) if block["type"] == "text").strip()
    if not caption:
        raise ValueError(f"{where} has no text beside its image; expected a caption.")
    return " ".join(caption.split())


@dataclass(frozen=True, kw_only=True)
class Pair:
    patch_PX: Tensor
    grid_I3: Tensor
    """One row."""
    caption: str


@dataclass(frozen=True, kw_only=True)
class CaptionReader:
    """Records as pairs of an image and its caption (a `qvl.data.loader.Reader`)."""

    encode: Encode

    def read(
        self, source: Source, item: Item, processor: Processor, decoder: Decoder, store: Store, budget: PackBudget
    ) -> tuple[str, Pair, str]:
        entry = source.entry(item.record, store)
        caption = caption_of(entry.record)
        made = fit(entry.record, processor, budget.tokens, budget.patches)
        sample = materialise(made, entry.media, processor, decoder)
        if sample.patch_PX is None or sample.grid_I3 is None:
            raise ValueError(f"the image of record {entry.record.id!r} does not fit into a pack; raise --pack-tokens.")
        return entry.record.id, Pair(patch_PX=sample.patch_PX, grid_I3=sample.grid_I3, caption=caption), made.fate

    def collate(
        self, samples: list[Pair], ids: tuple[str, ...], categories: tuple[str, ...], model_config: ModelConfig
    ) -> CaptionPack:
        captions = [pair.caption for pair in samples]
        return CaptionPack(
            batch=picture_batch([(pair.patch_PX, pair.grid_I3) for pair in samples]),
            ids=ids,
            categories=categories,
            caption_ST=self.encode(captions),
            caption_id_S=torch.tensor([caption_id(caption) for caption in captions]),
        )

    def num_tokens(self, micro: CaptionPack) -> int:
        return micro.batch.num_tokens


@dataclass(frozen=True, kw_only=True)
class HeldOutPairs:
    """Pairs that are never trained on."""

    packs: tuple[CaptionPack, ...]

    @property
    def num_images(self) -> int:
        return sum(len(pack.caption_ST) for pack in self.packs)

    def classes(self) -> tuple[Tensor, Tensor]:
        """Each caption once: its tokens (S, T) and its id (S,)."""
        found: dict[int, Tensor] = {}
        for pack in self.packs:
            for id, caption_T in zip(pack.caption_id_S.tolist(), pack.caption_ST, strict=True):
                found.setdefault(id, caption_T)
        return torch.stack(list(found.values())), torch.tensor(list(found))


def open_pairs(
    mixture: Mixture,
    processor: Processor,
    model_config: ModelConfig,
    budget: PackBudget,
    encode: Encode,
    *,
    packs_per_step: int,
    held_out: float,
    seed: int,
    world: World,
    workers: int,
    out: Path,
) -> tuple[Loader, HeldOutPairs]:
    """The loader over the pairs that are trained on, and those held out. Records that are no pair are rejected: those without an image
    here, others when they are read (quarantine.jsonl names them). ValueError where there are no pairs at all."""
    reader, held, store = CaptionReader(encode=encode), list[Source](), Store()

    def trained_part(number: int, source: Source) -> Source:
        trained, kept = split(with_images(source), held_out)
        held.append(kept)
        return trained

    mixture = probe(mixture, processor, store)
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
        max_bad_rate=MAX_BAD_RATE,
        select=trained_part,
        reader=reader,
    )
    packs = []
    for planned in plan_held_out(tuple(held), budget):
        read = list(_readable(planned, held, reader, loader))
        if read:
            ids, pairs, categories = zip(*read, strict=True)
            packs.append(reader.collate(list(pairs), ids, categories, model_config))
    return loader, HeldOutPairs(packs=tuple(packs))


def _readable(
    planned: tuple[Item, ...], sources: Sequence[Source], reader: CaptionReader, loader: Loader
) -> Iterator[tuple[str, Pair, str]]:
    """(id, pair, category) of each place that is a pair."""
    for item in planned:
        source = sources[item.source]
        try:
            id, pair, _ = reader.read(source, item, loader.processor, loader.decoder, loader.store, loader.plan.budget)
        except ValueError as error:
            log.warning("a held-out record is skipped: %s", error)
            continue
        yield id, pair, source.category(item.record)


def with_images(source: Source) -> Source:
    """Those of its records that show images and no video, as their index says."""
    flag_S = np.concatenate(
        [shard.flag_S[source.row_S[source.shard_S == number]] for number, shard in enumerate(source.shards)]
    )
    return only(source, ((flag_S & MEDIA) != 0) & ((flag_S & VIDEO) == 0))


def probe(mixture: Mixture, processor: Processor, store: Store) -> Mixture:
    """The mixture without the sources that show no image. ValueError where none of the first records is an image-caption pair, with the
    reason of the last one."""
    mark = fingerprint(processor)
    from_sources = [with_images(open_source(one, mark, store)) for one in mixture.resolved()]
    reason, probed = "no record shows an image", 0
    for source in from_sources:
        for record in range(min(source.lengths.num_records, MAX_PROBED)):
            probed += 1
            try:
                caption_of(source.entry(record, store).record)
            except ValueError as error:
                reason = str(error)
            else:
                return _without_empty(mixture, from_sources)
    raise ValueError(
        f"the data holds no image-caption pair that --stage v0 could learn from ({probed} records with an image were looked at: "
        f"{reason.rstrip('.')}); give records of one image and its caption."
    )


def _without_empty(mixture: Mixture, sources: Sequence[Source]) -> Mixture:
    kept = [one for one, source in zip(mixture.sources, sources, strict=True) if source.lengths.num_records]
    for one in mixture.sources:
        if one not in kept:
            say_once(f"{one.path}: no record shows an image; --stage v0 skips this source")
    # Stages name their sources, so those are left to the planner's own words.
    return mixture if mixture.stages else replace(mixture, sources=tuple(kept))


# ---- captions as tokens -------------------------------------------------------------------------------------------


def own_encoding(tokenizer: Tokenizer, length: int) -> Encode:
    """By the model's own tokenizer, for a text tower that is initialised with it."""
    eos_id, pad_id = tokenizer.control_id("<|im_end|>"), tokenizer.control_id("<|endoftext|>")

    def encode(captions: Sequence[str]) -> Tensor:
        ids = [tokenizer.encode_text(caption) for caption in captions]
        return fixed_length(ids, length=length, eos_id=eos_id, pad_id=pad_id)

    return encode


def siglip_encoding(folder: Path, length: int) -> Encode:
    """By the tokenizer of a SigLIP-2 folder, which lower-cases first; its ids end with 1 and are padded with 0."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ValueError(f"{file} is missing; the text tower of --siglip needs the tokenizer it was trained with.")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def encode(captions: Sequence[str]) -> Tensor:
        lowered = [caption.lower() for caption in captions]
        ids = [coded.ids for coded in tokenizer.encode_batch(lowered, add_special_tokens=False)]
        return fixed_length(ids, length=length, eos_id=1, pad_id=0)

    return encode
