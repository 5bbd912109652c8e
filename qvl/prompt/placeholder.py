"""Placeholders: the one place where pictures become runs of pad tokens, for training, RL and serving alike."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, get_args

import torch
from torch import Tensor

from qvl.core.batch import Sample
from qvl.prompt.template import PlainText, Segment, VisualSlot, Written
from qvl.prompt.tokenizer import Tokenizer
from qvl.prompt.video import slice_label
from qvl.prompt.visual import MERGE, Visual

Form = Literal["release", "transformers5"]
"""How a video stands in the prompt. The processor of the release (transformers before 5.10) puts each slice's time and
pads in place of the whole `<|vision_start|><|video_pad|><|vision_end|>`; transformers since 5.10 keeps that outer pair
around them, two tokens more. The released weights were trained and served with the first, so it is the default."""
LabelStyle = Literal["seconds", "hms"]

MERGED_PATCHES = MERGE**2


@dataclass(frozen=True)
class Pads:
    """A run of placeholders, one for each visual token. A count, not text: a long video has a hundred thousand."""

    name: str
    count: int

    @property
    def text(self) -> str:
        return self.name * self.count


def expand(
    visual: Visual, *, form: Form = "release", label_style: LabelStyle = "seconds"
) -> list[Written | PlainText | Pads]:
    """What stands in the prompt for one image or video.

    The time before each slice (report 2, "Video Timestamp") is plain text and is tokenized together with the words
    before it.
    """
    if form not in get_args(Form):
        raise ValueError(f"The placeholder form is {form!r}; it must be one of {', '.join(get_args(Form))}.")
    counts = tokens_of_rows(visual.grid_I3)
    if visual.kind == "image":
        return [Written("<|vision_start|>"), *(Pads("<|image_pad|>", n) for n in counts), Written("<|vision_end|>")]
    if visual.seconds is None or len(visual.seconds) != len(counts):
        raise ValueError("The video has no time for each of its slices; give fps or timestamps.")
    slices: list[Written | PlainText | Pads] = []
    for second, count in zip(visual.seconds, counts, strict=True):
        label = PlainText(slice_label(second, label_style))
        slices += [label, Written("<|vision_start|>"), Pads("<|video_pad|>", count), Written("<|vision_end|>")]
    if form == "transformers5":
        return [Written("<|vision_start|>"), *slices, Written("<|vision_end|>")]
    return slices


def tokens_of_rows(grid_I3: Tensor) -> list[int]:
    """Visual tokens of each row of a grid."""
    return [t * h * w // MERGED_PATCHES for t, h, w in grid_I3.tolist()]


def expand_slots(
    segments: Iterable[Segment],
    visuals: Sequence[Visual],
    *,
    form: Form = "release",
    label_style: LabelStyle = "seconds",
) -> list[Written | PlainText | Pads]:
    """Puts the visuals, in order, where the slots are."""
    expanded: list[Written | PlainText | Pads] = []
    used = 0
    for segment in segments:
        if not isinstance(segment, VisualSlot):
            expanded.append(segment)
            continue
        if used < len(visuals):
            expanded += expand(visuals[used], form=form, label_style=label_style)
        used += 1
    if used != len(visuals):
        raise ValueError(f"The prompt has {used} places for pictures and videos, and {len(visuals)} were given.")
    return expanded


Run = tuple[tuple[str, bool], ...]
"""Plain text between two control tokens: its pieces, each with whether it is a training target."""
EncodeRun = Callable[[Run], tuple[list[int], list[bool]]]
"""A run -> its ids, and for each whether it is a training target."""


def run_encoder(tokenizer: Tokenizer) -> EncodeRun:
    """Tokenizes each run once and remembers its ids. Make one for a conversation that is encoded several times, with other counts of
    placeholders; it grows with every new run."""
    return cache(partial(_encode_run, tokenizer=tokenizer))


def encode(
    segments: Iterable[Segment | Pads], tokenizer: Tokenizer, *, encode_run: EncodeRun | None = None
) -> tuple[list[int], list[bool]]:
    """Ids of the segments, and for each id whether it is a training target. `encode_run` tokenizes the runs
    in the tokenizer's place (see `run_encoder`).

    All plain text between two control tokens is tokenized as one run, whoever wrote its pieces, because that is what a
    tokenizer sees that gets the whole prompt as a string: the ids equal transformers'. A token that reaches over the
    edge of a target is none.
    """
    ids: list[int] = []
    targets: list[bool] = []
    run: list[tuple[str, bool]] = []
    encode_run = encode_run or partial(_encode_run, tokenizer=tokenizer)

    def close_run() -> None:
        run_ids, run_targets = encode_run(tuple(run))
        ids.extend(run_ids)
        targets.extend(run_targets)
        run.clear()

    for segment in segments:
        if isinstance(segment, Pads):
            close_run()
            ids.extend([tokenizer.control_id(segment.name)] * segment.count)
            targets.extend([False] * segment.count)
        elif isinstance(segment, VisualSlot):
            raise ValueError("A picture's place has no patches yet; put the visuals there with expand_slots first.")
        elif isinstance(segment, PlainText):
            run.append((segment.text, segment.is_target))
        else:
            for piece in tokenizer.split_control(segment.text):
                if isinstance(piece, str):
                    run.append((piece, segment.is_target))
                else:
                    close_run()
                    ids.append(piece)
                    targets.append(segment.is_target)
    close_run()
    return ids, targets


def _encode_run(run: Run, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    text = "".join(piece for piece, _ in run)
    if not text:
        return [], []
    if len({is_target for piece, is_target in run if piece}) == 1:
        ids = tokenizer.encode_text(text)
        return ids, [next(is_target for piece, is_target in run if piece)] * len(ids)
    ids, spans = tokenizer.encode_text_with_spans(text)
    is_target = [flag for piece, flag in run for _ in piece]
    return ids, [all(is_target[start:end]) for start, end in spans]


def build_sample(ids: Sequence[int], targets: Sequence[bool] | None, visuals: Sequence[Visual]) -> Sample:
    """The ids, and the patches of all visuals in the order of their places."""
    patches = [visual.patch_PX for visual in visuals]
    return Sample(
        token_T=torch.tensor(ids, dtype=torch.int64),
        # Two hours of film are a gigabyte of patches: one visual's are not copied.
        patch_PX=patches[0] if len(patches) == 1 else torch.cat(patches) if patches else None,
        grid_I3=torch.cat([visual.grid_I3 for visual in visuals]) if visuals else None,
        is_target_T=None if targets is None else torch.tensor(targets, dtype=torch.bool),
    )


def truncate(sample: Sample, max_tokens: int, tokenizer: Tokenizer) -> Sample:
    """The first `max_tokens` tokens, or fewer: a picture or slice that does not fit whole is left out with its patches.

    For training only; a prompt that is too long for serving is an error there.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1.")
    if sample.num_tokens <= max_tokens:
        return sample
    start_id = tokenizer.control_id("<|vision_start|>")
    pad_ids = torch.tensor([tokenizer.control_id("<|image_pad|>"), tokenizer.control_id("<|video_pad|>")])
    is_pad_T = torch.isin(sample.token_T, pad_ids)
    # A pad just before the cut means that its span's end is lost: the cut moves before the pads and before their start.
    other_places = (~is_pad_T[:max_tokens]).nonzero().flatten().tolist()
    keep = other_places[-1] + 1 if other_places else 0
    while keep > 0 and int(sample.token_T[keep - 1]) == start_id:
        keep -= 1
    if keep == 0:
        raise ValueError(
            f"Nothing is left of the sample within {max_tokens} tokens; its first picture is larger. Resize it."
        )
    return _first(sample, keep, int(is_pad_T[:keep].sum()))


def _first(sample: Sample, keep: int, num_pads: int) -> Sample:
    """The first `keep` tokens with the rows of the grid whose pads are among them."""
    rows, patches = 0, 0
    if sample.grid_I3 is not None:
        for count in tokens_of_rows(sample.grid_I3):
            if num_pads < count:
                break
            num_pads -= count
            rows, patches = rows + 1, patches + count * MERGED_PATCHES
    assert num_pads == 0, "pads are left that belong to no row of the grid"
    return replace(
        sample,
        token_T=sample.token_T[:keep],
        patch_PX=sample.patch_PX[:patches] if sample.patch_PX is not None and rows else None,
        grid_I3=sample.grid_I3[:rows] if sample.grid_I3 is not None and rows else None,
        is_target_T=None if sample.is_target_T is None else sample.is_target_T[:keep],
        second_I=sample.second_I[:rows] if sample.second_I is not None and rows else None,
    )
