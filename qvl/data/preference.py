"""A pref record as two samples, chosen and rejected: one prompt, the same visuals, targets on what differs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import eq
from typing import Any

from qvl.core.batch import Sample
from qvl.data.draft import Draft, draft
from qvl.data.record import Record, answer_place, same_turn
from qvl.data.sample import joined_patches, load_visuals
from qvl.data.shard import Entry
from qvl.outside.workers import Decoder
from qvl.prompt.processor import Processor


def preference_samples(entry: Entry, processor: Processor, decoder: Decoder | None = None) -> tuple[Sample, Sample]:
    """(chosen, rejected). Media are decoded once.

    Targets are the assistant's tokens from the first turn that differs on, but for messages of weight 0. All before that turn has the same
    ids in both. (Where an answer begins with a line break, the template's own line break is in one token with it.) ValueError when a
    medium is not what the record says, or when an answer has nothing that is trained.
    """
    chosen, rejected = draft_pair(entry.record, processor)
    for name, made in (("chosen", chosen), ("rejected", rejected)):
        if made.sample.is_target_T is None or not bool(made.sample.is_target_T.any()):
            raise ValueError(
                f"record {entry.record.id!r} has nothing to train in its {name} answer; give it text, and a weight that is not 0."
            )
    visuals = load_visuals(chosen, entry.media, processor, decoder)
    first = replace(chosen.sample, patch_PX=joined_patches(chosen, visuals))
    if rejected.parts == chosen.parts:
        return first, replace(rejected.sample, patch_PX=first.patch_PX)
    shared = _num_shared(chosen.parts, rejected.parts)  # an answer shows something itself
    rest = replace(rejected, parts=rejected.parts[shared:], stand_ins=rejected.stand_ins[shared:])
    visuals = visuals[:shared] + load_visuals(rest, entry.media, processor, decoder)
    return first, replace(rejected.sample, patch_PX=joined_patches(rejected, visuals))


def draft_pair(record: Record, processor: Processor) -> tuple[Draft, Draft]:
    """(chosen, rejected) before their media are decoded."""
    if record.kind != "pref":
        raise ValueError(f"record {record.id!r} is of kind {record.kind}; only pref records are pairs of answers.")
    place = answer_place(record.messages)
    chosen, rejected = record.messages[place:], record.rejected
    shared = _num_shared(chosen[:-1], rejected[:-1], same_turn)  # each keeps a turn of its own
    prompt = tuple({**message, "weight": 0} for message in record.messages[: place + shared])
    first, second = (
        draft(replace(record, kind="sft", messages=(*prompt, *answer[shared:]), rejected=()), processor)
        for answer in (chosen, rejected)
    )
    return first, second


def _num_shared(one: Sequence[Any], other: Sequence[Any], same: Callable[[Any, Any], bool] = eq) -> int:
    """How many leading items two lists have in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, pair in enumerate(pairs) if not same(*pair)), min(len(one), len(other)))
