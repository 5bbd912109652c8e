"""One arm of an ablation: every switch there is, and the samples and network that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qvl.core.batch import Sample
from qvl.model.config import ModelConfig
from qvl.prompt.message import Message
from qvl.prompt.placeholder import Pads, build_sample, encode, expand
from qvl.prompt.processor import Processor, visual_of
from qvl.prompt.template import Segment, VisualSlot, Written
from qvl.prompt.visual import Visual
from qvl.recipes.made_stream import Maker
from qvl.worlds.world import World


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The defaults are Qwen3-VL's; an arm differs from its partner in one field."""

    axes: Literal["interleaved", "chunked"] = "interleaved"
    """Which rotary frequencies time, height and width turn: all kinds each (Qwen3-VL), or one block each (Qwen2-VL)."""
    time: Literal["marks", "order", "seconds"] = "marks"
    """How the network learns when a slice was: text before it (Qwen3-VL), the slice's number in the rotary ids (Qwen2-VL), or its
    seconds there (Qwen2.5-VL)."""
    deepstack: bool = True
    power: float = 0.5
    """Loss weight n^-power of each of a sample's n targets."""
    pre_stage: bool = True
    """Part of the pictures goes to the vision pre-stage; where an ablation has none, this says nothing."""


def config_of(arm: Arm, base: ModelConfig) -> ModelConfig:
    assert base.vision is not None
    # Qwen2.5-VL's scheme is chunked as published.
    scheme = "absolute_time" if arm.time == "seconds" else arm.axes
    return replace(
        base,
        text=replace(base.text, rope=replace(base.text.rope, scheme=scheme)),
        vision=base.vision if arm.deepstack else replace(base.vision, deepstack_visual_indexes=()),
    )


def maker_of(world: World, processor: Processor, arm: Arm, *, seed: int) -> Maker:
    """The world's training split in the arm's form; what the assistant says is trained."""

    def make(index: int) -> tuple[str, Sample]:
        example = world(seed, index, "train")
        return example.id, sample_of(example.messages, processor, arm)

    return make


def sample_of(messages: Sequence[Message], processor: Processor, arm: Arm, *, is_prompt: bool = False) -> Sample:
    """A training sample, or with `is_prompt` what stands before an answer. Only clips differ between arms."""
    shown, _ = processor.media_loader().load_all(messages)
    segments = processor.render(shown, add_generation_prompt=is_prompt, targets="none" if is_prompt else "all")
    visuals = [visual_of(segment) for segment in segments if isinstance(segment, VisualSlot)]
    left = list(visuals)
    pieces: list[Segment | Pads] = []
    for segment in segments:
        if not isinstance(segment, VisualSlot):
            pieces.append(segment)
        elif arm.time == "marks" or left[0].kind == "image":
            pieces += expand(left.pop(0))
        else:
            pads = Pads("<|video_pad|>", left.pop(0).num_tokens)
            pieces += [Written("<|vision_start|>"), pads, Written("<|vision_end|>")]
    ids, is_target = encode(pieces, processor.tokenizer)
    sample = build_sample(ids, None if is_prompt else is_target, visuals)
    if arm.time == "marks" or not visuals:
        return sample
    grid_I3 = torch.cat([_one_row(visual) for visual in visuals])
    second_I = torch.tensor([_mean_gap(visual) for visual in visuals])
    return replace(sample, grid_I3=grid_I3, second_I=second_I if arm.time == "seconds" else None)


def _one_row(visual: Visual) -> Tensor:
    """All slices as one run (t, h, w), as Qwen2-VL and Qwen2.5-VL have them; an image is one already."""
    row_I3 = visual.grid_I3[:1].clone()
    row_I3[0, 0] = len(visual.grid_I3)
    return row_I3


def _mean_gap(visual: Visual) -> float:
    """Qwen2.5-VL knows one gap a video, two frames over the rate: where frames come unevenly, their mean."""
    if visual.seconds is None or len(visual.seconds) < 2:
        return 1.0
    return (visual.seconds[-1] - visual.seconds[0]) / (len(visual.seconds) - 1)
