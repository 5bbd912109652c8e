"""Pair timestamps: a slice's time as text before it (Qwen3-VL), or as seconds in its rotary ids (Qwen2.5-VL)."""

from collections.abc import Mapping

from qvl.recipes.ablate.ablation import Ablation, Material, answers_right
from qvl.recipes.ablate.arm import Arm, maker_of
from qvl.recipes.ablate.clips import change
from qvl.recipes.ablate.toy import toy_processor
from qvl.recipes.made_stream import Maker

TRAIN = change((1.0, 2.0))
TOLD = change((0.0,), is_told=True)
"""Times in words: what a language model reads before it sees. Both arms get it; only one can use it for clips."""


def prepare() -> Material:
    return Material(processor=toy_processor([TRAIN, TOLD]))


def learn(material: Material, arm: Arm, seed: int) -> Mapping[str, tuple[Maker, float]]:
    return {
        "change": (maker_of(TRAIN, material.processor, arm, seed=seed), 2.0),
        "told": (maker_of(TOLD, material.processor, arm, seed=seed), 1.0),
    }


TIMESTAMPS = Ablation(
    name="timestamps",
    question="Do times written before the slices carry over to unseen frame rates better than times in the rotary ids?",
    expectation=(
        "Report 2: absolute-time ids grow large and sparse in long videos and need training at many frame rates; text needs neither. "
        "Training sees 1 and 2 frames a second of clips of 8 to 16 seconds; .5, 4 and uneven rates show the same seconds otherwise spaced."
    ),
    # The rotary arm's axes are chunked, as published; frames here are one token wide, so the axes' layout cannot matter in the text arm.
    arms={"text": Arm(), "ids": Arm(time="seconds")},
    prepare=prepare,
    learn=learn,
    probes={
        "1 and 2 fps, within 1 s": answers_right(TRAIN, 96),
        "0.5 fps, within 1 s": answers_right(change((0.5,)), 96),
        "4 fps, within 1 s": answers_right(change((4.0,)), 96),
        "uneven, within 1 s": answers_right(change((0.0,)), 96),
        "told in words, within 1 s": answers_right(TOLD, 96),
    },
    steps=400,
    samples=32,
    notes=(
        "Uneven frames: one rate a video is all that the rotary ids of Qwen2.5-VL can say, so the ids arm gets the mean gap.",
        "The truth is the middle of the slice, as time marks have it; an arm that knows only its start is up to .75 s off at other rates, "
        "which the tolerance of 1 s forgives.",
    ),
)
