"""A draft becomes a Sample: its media are decoded, and must be what the record says they are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qvl.core.batch import Sample
from qvl.data.draft import Draft
from qvl.data.messages import MediaName, Page
from qvl.outside.workers import Decoder
from qvl.prompt.message import Document, Image, Video
from qvl.prompt.processor import Processor
from qvl.prompt.visual import Visual


def materialise(
    draft: Draft, media: Mapping[str, bytes], processor: Processor, decoder: Decoder | None = None
) -> Sample:
    """The sample with its patches. ValueError when a medium cannot be decoded or has another size than its facts say."""
    if not draft.parts:
        return draft.sample
    return replace(draft.sample, patch_PX=joined_patches(draft, load_visuals(draft, media, processor, decoder)))


def load_visuals(
    draft: Draft, media: Mapping[str, bytes], processor: Processor, decoder: Decoder | None = None
) -> list[Visual]:
    """Those of the draft's parts, in order. ValueError as of `materialise`."""
    visuals = []
    for part, expected in zip(draft.parts, draft.stand_ins, strict=True):
        visuals.append(load_part(part, media, processor, decoder))
        _check(visuals[-1], expected, part)
    return visuals


def joined_patches(draft: Draft, visuals: Sequence[Visual]) -> Tensor | None:
    """What the draft keeps of its visuals' patches; None of no visuals."""
    if not visuals:
        return None
    patch_PX = torch.cat([v.patch_PX for v in visuals]) if len(visuals) > 1 else visuals[0].patch_PX
    return patch_PX[: draft.num_patches]


def load_part(
    part: Image | Video, media: Mapping[str, bytes], processor: Processor, decoder: Decoder | None = None
) -> Visual:
    """The patches of one picture, page or video of a record."""
    file: Image | Video | Document = part
    if isinstance(part.source, Page):
        assert isinstance(part, Image) and part.min_tokens is None
        page = part.source
        file = Document(MediaName(page.name), pages=str(page.number + 1), max_tokens=part.max_tokens)

    def opened(source: Any) -> bytes:
        assert isinstance(source, MediaName)
        return media[source.name]

    (item,) = processor.media_loader(decoder, opened).load(file)
    return item.visual


def _check(visual: Visual, expected: Visual, part: Image | Video) -> None:
    name = part.source[0].name if isinstance(part.source, tuple) else part.source.name
    if not torch.equal(visual.grid_I3, expected.grid_I3):
        raise ValueError(
            f"{name} gives {visual.grid_I3.shape[0]} x {visual.grid_I3[0].tolist()} patches and its facts promise "
            f"{expected.grid_I3.shape[0]} x {expected.grid_I3[0].tolist()}; import the record again."
        )
    if visual.seconds is not None and expected.seconds is not None:
        pairs = zip(visual.seconds, expected.seconds, strict=True)
        if any(not math.isclose(a, b, abs_tol=1e-6) for a, b in pairs):
            raise ValueError(f"{name} has other frame times than its facts promise; import the record again.")
