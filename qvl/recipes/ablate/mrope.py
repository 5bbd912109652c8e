"""Pair mrope: rotary frequencies interleaved over time, height and width (Qwen3-VL), or one block for each (Qwen2-VL)."""

from collections.abc import Mapping

from qvl.recipes.ablate.ablation import Ablation, Material, answers_right, surprise
from qvl.recipes.ablate.arm import Arm, maker_of
from qvl.recipes.ablate.clips import after_flash
from qvl.recipes.ablate.toy import toy_processor
from qvl.recipes.made_stream import Maker

SLICES = 8
"""The longest clip of training; each slice is two frames."""
TRAIN = after_flash(2, SLICES)
"""Short ones too: of two slices the second is the answer, which is where learning begins."""
FOURFOLD, SIXTEENFOLD = (after_flash(SLICES * times, SLICES * times) for times in (4, 16))


def prepare() -> Material:
    return Material(processor=toy_processor([TRAIN]))


def learn(material: Material, arm: Arm, seed: int) -> Mapping[str, tuple[Maker, float]]:
    return {"after_flash": (maker_of(TRAIN, material.processor, arm, seed=seed), 1.0)}


MROPE = Ablation(
    name="mrope",
    question="Do interleaved rotary axes read clips longer than those of training better than one block for each axis?",
    expectation=(
        "Report 2: blocks give time the fast frequencies alone and width the slow ones, which is said to hurt long video; interleaved, "
        "each axis has all kinds. The question needs the slice after a white one and its left or right half: time and width, at 16 frames "
        "as in training, at 64 and at 256."
    ),
    # Slices stand together, so that time lives in the rotary ids: with a time mark between slices, as Qwen3-VL has them, all three ids
    # move on together and the arms would differ by a picture's rows and columns alone.
    arms={"interleaved": Arm(time="order"), "chunked": Arm(time="order", axes="chunked")},
    prepare=prepare,
    learn=learn,
    probes={
        "16 frames, right": answers_right(TRAIN, 96),
        "64 frames, right": answers_right(FOURFOLD, 96),
        "256 frames, right": answers_right(SIXTEENFOLD, 64),
        "16 frames, nats": surprise(TRAIN, 96),
        "64 frames, nats": surprise(FOURFOLD, 96),
        "256 frames, nats": surprise(SIXTEENFOLD, 64),
    },
    steps=400,
    samples=48,
)
