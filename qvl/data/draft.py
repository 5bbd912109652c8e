"""A record as ids before anything is decoded: exact lengths from facts alone, and what is done when it is too long."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qvl.core.batch import Sample
from qvl.data.messages import MediaName, Page, conversation, document_segments, trained_messages
from qvl.data.record import Record, prompt_end
from qvl.prompt.budget import ImageBudget, smart_resize
from qvl.prompt.document import DPI, page_target
from qvl.prompt.media import image_budget_for, video_sampling_for
from qvl.prompt.message import Image, Video
from qvl.prompt.placeholder import (
    MERGED_PATCHES,
    EncodeRun,
    build_sample,
    encode,
    expand_slots,
    run_encoder,
    tokens_of_rows,
    truncate,
)
from qvl.prompt.processor import Processor
from qvl.prompt.sampling import VideoMeta, VideoSampling, sample_indices, video_size
from qvl.prompt.template import Segment, VisualSlot
from qvl.prompt.video import slice_seconds
from qvl.prompt.visual import FRAMES, PATCH, Visual

Fate = Literal["whole", "piece", "rebudgeted", "cut"]
SHRINK = 0.8
LEAST_IMAGE_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A sample whose pictures are still to be decoded."""

    sample: Sample
    """`patch_PX` is missing; the grid and the placeholders are there."""
    parts: tuple[Image | Video, ...]
    """The media to load, in order; the last may reach beyond what is kept of its slices."""
    stand_ins: tuple[Visual, ...]
    """For each part, the visual without patches that it will become."""
    fate: Fate = "whole"

    @property
    def num_patches(self) -> int:
        return 0 if self.sample.grid_I3 is None else int(self.sample.grid_I3.prod(1).sum())

    @property
    def num_visual_tokens(self) -> int:
        return self.num_patches // MERGED_PATCHES


def draft(record: Record, processor: Processor) -> Draft:
    """The whole record. Runs the very code that makes the sample, on visuals without patches: the lengths cannot drift apart."""
    return _draft(record, _segments(record, processor), processor, run_encoder(processor.tokenizer))


def fit(record: Record, processor: Processor, max_tokens: int, max_patches: int, piece: int = 0) -> Draft:
    """The record within a pack's two budgets.

    A text document gives its tokens in pieces of `max_tokens`, the first here for piece 0, and so on: none is lost. Videos that are
    too long get fewer frames and tokens; then, in a chat, pictures get fewer tokens; what is still too long is cut, never inside a
    picture or slice.
    """
    segments = _segments(record, processor)
    encode_run = run_encoder(processor.tokenizer)  # the text is tokenized once, however often media shrink
    whole = _draft(record, segments, processor, encode_run)
    if record.kind == "pretrain" and not whole.parts:
        return whole if whole.sample.num_tokens <= max_tokens else _piece(whole, max_tokens, piece)
    if _fits(whole, max_tokens, max_patches):
        return whole
    kinds = (Video,) if record.kind == "pretrain" else (Video, Image)
    smaller = whole
    for kind in kinds:
        ratio = 1.0
        while any(isinstance(part, kind) for part in smaller.parts):
            ratio *= SHRINK
            before = segments
            segments = [_shrunk(s, kind, ratio, whole, processor) for s in segments]
            if segments == before or ratio < 1e-4:
                break
            smaller = _draft(record, segments, processor, encode_run)
            if _fits(smaller, max_tokens, max_patches):
                return replace(smaller, fate="rebudgeted")
    return _cut(smaller, max_tokens, max_patches, processor)


def _fits(draft: Draft, max_tokens: int, max_patches: int) -> bool:
    return draft.sample.num_tokens <= max_tokens and draft.num_patches <= max_patches


def _segments(record: Record, processor: Processor) -> list[Segment]:
    if record.kind == "pretrain":
        return document_segments(record)
    if record.kind == "rl":  # answers are sampled, so whatever answer the record has is no part of it
        asked = replace(record, messages=record.messages[: prompt_end(record.messages)])
        return processor.render(conversation(asked), tools=record.tools or None, add_generation_prompt=True)
    return processor.render(
        conversation(record),
        tools=record.tools or None,
        add_generation_prompt=False,
        targets=trained_messages(record) if record.kind == "sft" else "none",
    )


def _draft(record: Record, segments: Sequence[Segment], processor: Processor, encode_run: EncodeRun) -> Draft:
    parts = tuple(segment.part for segment in segments if isinstance(segment, VisualSlot))
    stand_ins = tuple(stand_in(part, record, processor) for part in parts)
    expanded = expand_slots(segments, stand_ins, form=processor.form, label_style=record.time_style)
    ids, targets = encode(expanded, processor.tokenizer, encode_run=encode_run)
    if not ids:
        raise ValueError(f"record {record.id!r} holds no text and no media; nothing can be learned from it.")
    targets[0] = False  # nothing stands before it that could predict it
    return Draft(sample=replace(build_sample(ids, targets, stand_ins), patch_PX=None), parts=parts, stand_ins=stand_ins)


def _piece(whole: Draft, max_tokens: int, piece: int) -> Draft:
    sample, start = whole.sample, piece * max_tokens
    assert sample.is_target_T is not None and start < sample.num_tokens
    is_target_T = sample.is_target_T[start : start + max_tokens].clone()
    is_target_T[0] = False
    cut = Sample(token_T=sample.token_T[start : start + max_tokens], is_target_T=is_target_T)
    return Draft(sample=cut, parts=(), stand_ins=(), fate="piece")


def _cut(long: Draft, max_tokens: int, max_patches: int, processor: Processor) -> Draft:
    """The beginning, up to the last token, picture or slice that fits."""
    sample = long.sample
    if sample.grid_I3 is not None:
        patches, rows = 0, 0
        for area in sample.grid_I3.prod(1).tolist():
            if patches + area > max_patches:
                max_tokens = min(max_tokens, max(1, _place_of_row(sample, rows, processor)))
                break
            patches, rows = patches + area, rows + 1
    kept = truncate(sample, max_tokens, processor.tokenizer)
    if kept.is_target_T is not None and not bool(kept.is_target_T.any()):
        raise ValueError(f"nothing that is trained is left of the sample within {max_tokens} tokens; shorten it.")
    rows_kept = 0 if kept.grid_I3 is None else kept.grid_I3.shape[0]
    parts: list[Image | Video] = []
    stand_ins: list[Visual] = []
    for part, visual in zip(long.parts, long.stand_ins, strict=True):
        if rows_kept <= 0:
            break
        parts.append(part)
        stand_ins.append(visual)
        rows_kept -= visual.grid_I3.shape[0]
    return Draft(sample=kept, parts=tuple(parts), stand_ins=tuple(stand_ins), fate="cut")


def _place_of_row(sample: Sample, row: int, processor: Processor) -> int:
    """Where the placeholders of a row of the grid begin."""
    assert sample.grid_I3 is not None
    ids = [processor.tokenizer.control_id(name) for name in ("<|image_pad|>", "<|video_pad|>")]
    places = torch.isin(sample.token_T, torch.tensor(ids)).nonzero().flatten()
    return int(places[sum(tokens_of_rows(sample.grid_I3[:row]))])


def _shrunk(segment: Segment, kind: type, ratio: float, whole: Draft, processor: Processor) -> Segment:
    """The segment with its picture or video at `ratio` of the tokens it has in the whole record."""
    if not isinstance(segment, VisualSlot) or not isinstance(segment.part, kind):
        return segment
    original = next(
        visual for part, visual in zip(whole.parts, whole.stand_ins, strict=True) if part.source == segment.part.source
    )
    tokens = max(LEAST_IMAGE_TOKENS, int(original.num_tokens * ratio))
    part = segment.part
    if isinstance(part, Image):
        return replace(segment, part=replace(part, max_tokens=tokens, min_tokens=None))
    if isinstance(part.source, tuple):
        return replace(segment, part=replace(part, max_tokens=tokens))  # its frames are all shown
    slices = original.grid_I3.shape[0]
    # Frames and their size shrink alike: half the tokens is 0.7 of the frames at 0.7 of the area.
    frames = max(2, FRAMES * int(slices * ratio**0.5))
    return replace(segment, part=replace(part, num_frames=frames, sample_fps=None, max_tokens=tokens))


# ---- what a medium will become ------------------------------------------------------------------------------------


def stand_in(part: Image | Video, record: Record, processor: Processor) -> Visual:
    """The visual of a part without its patches, from the record's facts."""
    if processor.image_budget is None or processor.video_sampling is None:
        raise ValueError(
            f"{processor.folder.path} has no preprocessor_config.json, so the size of pictures is unknown."
        )
    if isinstance(part, Image):
        return _image(part, record, image_budget_for(processor.image_budget, part.min_tokens, part.max_tokens))
    return _video(part, record, video_sampling_for(processor.video_sampling, part))


def _image(part: Image, record: Record, budget: ImageBudget) -> Visual:
    if isinstance(part.source, Page):
        sizes = record.media[part.source.name].page_sizes
        assert sizes is not None
        height, width, _ = page_target(*sizes[part.source.number], budget, DPI)
        return _visual("image", height, width, 1)
    medium = record.media[part.source.name]
    assert medium.h is not None and medium.w is not None
    height, width = smart_resize(medium.h, medium.w, budget)
    return _visual("image", height, width, 1)


def _video(part: Video, record: Record, sampling: VideoSampling) -> Visual:
    if isinstance(part.source, tuple):
        names: Iterable[MediaName] = part.source
        first = record.media[next(iter(names)).name]
        count = len(part.source)
        times = part.frame_seconds or [i / part.frame_fps for i in range(count)]  # type: ignore[operator]
    else:
        if sampling.times == "real":
            raise ValueError(
                "times 'real' are known only after decoding, and lengths are planned before; use times 'index'."
            )
        first = record.media[part.source.name]
        assert first.num_frames is not None and first.fps is not None
        meta = VideoMeta(num_frames=first.num_frames, fps=first.fps)
        times = [meta.time(i) for i in sample_indices(meta, sampling)]
        count = len(times)
    assert first.h is not None and first.w is not None
    height, width = video_size(count, first.h, first.w, sampling)
    return _visual("video", height, width, -(-count // FRAMES), slice_seconds(list(times)))


def _visual(
    kind: Literal["image", "video"], height: int, width: int, slices: int, seconds: tuple[float, ...] | None = None
) -> Visual:
    return Visual(
        kind=kind,
        patch_PX=torch.empty(0, 0),
        grid_I3=torch.tensor([[1, height // PATCH, width // PATCH]]).repeat(slices, 1),
        height=height,
        width=width,
        source_height=height,
        source_width=width,
        seconds=seconds,
    )
