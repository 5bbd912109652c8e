"""Prompts out of rl records: what the model is asked and how its answers are judged, in a stream that shuffles, mixes and resumes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from qvl.core.batch import Sample
from qvl.core.log import say_once
from qvl.data.draft import draft
from qvl.data.loader import Loader, make_loader
from qvl.data.messages import MediaName, conversation
from qvl.data.mixture import Mixture
from qvl.data.packing import PackBudget
from qvl.data.plan import Item, Lengths
from qvl.data.record import prompt_end
from qvl.data.sample import joined_patches, load_visuals
from qvl.data.shard import Entry
from qvl.data.source import Source
from qvl.data.store import Store
from qvl.model.config import ModelConfig
from qvl.outside.workers import Decoder
from qvl.prompt.example import Example
from qvl.prompt.message import ContentPart, Image, Message, Video
from qvl.prompt.processor import Processor
from qvl.prompt.visual import Visual


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model is asked, and what its answers are judged by."""

    sample: Sample
    """Ids up to the assistant's generation prompt, which is their end; no targets."""
    example: Example

    @property
    def id(self) -> str:
        return self.example.id

    @property
    def category(self) -> str:
        return self.example.category


class PromptStream:
    """Made by `make_prompts`: this rank's prompts of each step, in an order that follows from the mixture and the seed alone."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    @property
    def step(self) -> int:
        """Steps given so far, those before a restore included."""
        return self._loader.step

    @property
    def num_prompts(self) -> int:
        """Of one epoch over all sources."""
        return sum(source.lengths.num_records for source in self._loader.sources)

    @property
    def num_rejected(self) -> int:
        """Records of the sources that give no prompt: they could not be indexed, or are too long."""
        return sum(source.left_out for source in self._loader.sources)

    def next_step(self) -> list[Prompt]:
        """This rank's prompts of the next step; empty when the data is over. ValueError when too many records fail.

        A record that cannot be read is replaced by another of its source, and listed in the quarantine.
        """
        return self._loader.next_step()  # type: ignore[return-value] - the reader's micro-batches are prompts

    def state(self) -> dict[str, Any]:
        """What `restore` needs to give the next step that this stream would give: JSON, the same on every rank."""
        return self._loader.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the step at which `state` was taken, with any number of ranks and workers."""
        self._loader.restore(state)

    def close(self) -> None:
        self._loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_prompts(
    mixture: Mixture,
    processor: Processor,
    model_config: ModelConfig,
    *,
    prompts_per_step: int,
    max_tokens: int,
    max_patches: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    decoder: Decoder | None = None,
    out: Path | str | None = None,
    max_bad_rate: float = 0.01,
    prefetch_prompts: int = 16,
) -> PromptStream:
    """A stream of prompts over indexed shards of rl records.

    It is the loader of packs at work on packs of one prompt each. So weights, stages and `tokens` of the mixture count prompts here, and
    each step has its sources in their shares, to a prompt. `prompts_per_step` is global; a rank gets prompts_per_step / world_size of them.
    `max_tokens`, `max_patches`: of one prompt; a longer one is rejected, for a shorter one would ask something else. Other arguments: see
    `make_loader`.
    """
    if prompts_per_step < 1 or not 0 <= rank < world_size or prompts_per_step % world_size:
        raise ValueError(
            f"rank {rank} of {world_size} with {prompts_per_step} prompts a step; ranks count from 0, and prompts_per_step must be a "
            "multiple of the number of ranks."
        )
    loader = make_loader(
        mixture,
        processor,
        model_config,
        pack_tokens=1,
        pack_patches=1,
        packs_per_step=prompts_per_step,
        seed=seed,
        rank=rank,
        world_size=world_size,
        workers=workers,
        decoder=decoder,
        out=out,
        max_bad_rate=max_bad_rate,
        buffer=1,
        prefetch_packs=prefetch_prompts,
        select=lambda number, source: _one_each(source, max_tokens, max_patches),
        reader=PromptReader(),
        kinds=("rl",),
        window=prompts_per_step,
    )
    return PromptStream(loader)


def _one_each(source: Source, max_tokens: int, max_patches: int) -> Source:
    """The source's prompts that are short enough, each planned as one token."""
    lengths = source.lengths
    is_kept_S = (lengths.token_S <= max_tokens) & (lengths.patch_S <= max_patches)
    too_long = int((~is_kept_S).sum())
    if too_long:
        say_once(
            f"{source.config.path}: {too_long:,} prompts have more than {max_tokens:,} tokens or {max_patches:,} patches and are rejected"
        )
    count = int(is_kept_S.sum())
    if too_long and not count:
        raise ValueError(
            f"all {too_long:,} prompts of {source.config.path} have more than {max_tokens:,} tokens or {max_patches:,} patches; raise "
            "max_tokens or max_patches, or import the images smaller."
        )
    planned = Lengths(
        token_S=np.ones(count, np.int64),
        patch_S=np.zeros(count, np.int64),
        square_S=np.zeros(count, np.int64),
        is_text_S=np.zeros(count, bool),
        max_epochs=lengths.max_epochs,
    )
    return replace(
        source,
        shard_S=source.shard_S[is_kept_S],
        row_S=source.row_S[is_kept_S],
        lengths=planned,
        left_out=source.left_out + too_long,
    )


class PromptReader:
    """Records as prompts (a `qvl.data.loader.Reader`)."""

    def read(
        self, source: Source, item: Item, processor: Processor, decoder: Decoder, store: Store, budget: PackBudget
    ) -> tuple[str, Prompt, str]:
        shard, row = source.place(item.record)
        entry = source.entry(item.record, store)
        prompt = prompt_of(entry, processor, decoder)
        if prompt.sample.num_tokens != int(shard.text_S[row]) + int(shard.visual_S[row]):
            raise ValueError(
                f"{shard.url} at byte {int(shard.offset_S[row])}: the prompt has another length than its index says; build the index again."
            )
        return entry.record.id, prompt, "whole"

    def collate(
        self, samples: list[Prompt], ids: tuple[str, ...], categories: tuple[str, ...], model_config: ModelConfig
    ) -> Prompt:
        (prompt,), (category,) = samples, categories
        return replace(prompt, example=replace(prompt.example, category=category))

    def num_tokens(self, micro: Prompt) -> int:
        return micro.sample.num_tokens


# ---- one record


def prompt_of(entry: Entry, processor: Processor, decoder: Decoder | None = None) -> Prompt:
    """The prompt of an rl record: all but what the assistant says at its end, which becomes the example's answer where the reward has none.

    `processor(example.messages, tools=record.tools, label_style=record.time_style)` gives the sample's ids again. ValueError for a record
    of another kind, and when a medium is not what the record says.
    """
    record = entry.record
    if record.kind != "rl" or record.reward is None:
        raise ValueError(
            f"record {record.id!r} is of kind {record.kind}; prompts are made of rl records with a reward."
        )
    made = draft(record, processor)
    visuals = load_visuals(made, entry.media, processor, decoder)
    sample = replace(made.sample, patch_PX=joined_patches(made, visuals), is_target_T=None)
    end = prompt_end(record.messages)
    shown = dict(zip(made.parts, visuals, strict=True))
    messages = conversation(record)
    example = Example(
        id=record.id,
        category=record.category,
        messages=tuple(_with_media(message, entry.media, shown) for message in messages[:end]),
        answer=record.reward.get("answer", "".join(message.text for message in messages[end:])),
        truth=record.reward["truth"],
        scorer=record.reward["scorer"],
    )
    return Prompt(sample=sample, example=example)


def _with_media(message: Message, media: Mapping[str, bytes], shown: Mapping[Image | Video, Visual]) -> Message:
    """The message with files in place of their names, and with a PDF's pages as the network sees them."""

    def given(part: ContentPart) -> ContentPart:
        if not isinstance(part, Image | Video):
            return part
        if isinstance(part.source, tuple):
            return replace(part, source=tuple(media[name.name] for name in part.source))
        return replace(part, source=media[part.source.name] if isinstance(part.source, MediaName) else shown[part])

    return message.with_content(given(part) for part in message.content)
