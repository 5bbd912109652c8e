"""Pair deepstack: middle vision levels added to the first decoder layers (Qwen3-VL), or the last level alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator
from PIL import Image as Raster
from PIL import ImageDraw

from qvl.prompt.message import ContentPart, Image
from qvl.prompt.visual import FACTOR, PATCH
from qvl.recipes.ablate.ablation import Ablation, Material, answers_right, surprise
from qvl.recipes.ablate.arm import Arm, maker_of
from qvl.recipes.ablate.toy import toy_processor
from qvl.recipes.made_stream import Maker
from qvl.show.letters import Font, font_for
from qvl.worlds.world import Plan, Prior, Split, World

LETTERS = "ACHJLTVX"
"""Capitals that differ in many pixels."""
PAPER, INK, GRAIN = 60, 240, 8
"""Always light on dark, nearly without noise: letters anywhere on any paper are not learned in a minute (qvl.worlds.glyphs has them)."""


@dataclass(frozen=True, kw_only=True)
class Letter:
    """`height` in pixels; `patch` is one of the four of a visual token, x and y how many pixels it stands off its middle."""

    letter: str
    height: int
    patch: int
    x: int
    y: int


def letter(least: int, most: int) -> World:
    """One capital of so many pixels near the middle of one of the four patches of a picture of one token; which is it?"""
    if not 4 <= least <= most <= 11:
        raise ValueError(f"heights from {least} to {most} were asked for; a patch of {PATCH} pixels takes 4 to 11.")

    def plan(random: Generator, split: Split) -> Plan:
        word = LETTERS[int(random.integers(len(LETTERS)))]
        height, patch = int(random.integers(least, most + 1)), int(random.integers(4))
        x, y = random.integers(-1, 2, size=2).tolist()
        facts = Letter(letter=word, height=height, patch=patch, x=x, y=y)
        others = [other for other in LETTERS if other != word]
        return Plan(
            question="Which letter?",
            answer=word,
            truth={"answer": word, "others": others, "height": height},
            scorer="exact",
            facts=facts,
            splits_by=repr(facts),
        )

    prior = Prior(answer=LETTERS[0], score=1 / len(LETTERS), nats=math.log(len(LETTERS)))
    return World(name=f"letter{least}-{most}", category="ocr", plan=plan, show=_show, find_prior=lambda _: prior)


def _show(facts: Letter, random: Generator) -> tuple[ContentPart, ...]:
    font = _font(facts.height)
    left, top, right, bottom = font.getbbox(facts.letter)
    row, column = divmod(facts.patch, 2)
    x = column * PATCH + (PATCH - round(right - left)) // 2 + facts.x
    y = row * PATCH + (PATCH - round(bottom - top)) // 2 + facts.y
    mask = Raster.new("L", (FACTOR, FACTOR))
    ImageDraw.Draw(mask).text((x - left, y - top), facts.letter, fill=255, font=font)
    cover = np.asarray(mask, dtype=np.float32)[:, :, None] / 255
    paper = PAPER + random.integers(-GRAIN, GRAIN + 1, size=(FACTOR, FACTOR, 3))
    return (Image(Raster.fromarray((paper + cover * (INK - paper)).astype(np.uint8))),)


@cache
def _font(height: int) -> Font:
    """The least size whose H is so many pixels high."""
    sizes = (font_for(size) for size in range(height, 4 * height))
    return next(font for font in sizes if font.getbbox("H")[3] - font.getbbox("H")[1] >= height)


TRAIN, SMALL, LARGE = letter(4, 11), letter(4, 5), letter(9, 11)
"""Large letters are learned first and open the way to the small ones."""


def prepare() -> Material:
    return Material(processor=toy_processor([TRAIN]))


def learn(material: Material, arm: Arm, seed: int) -> Mapping[str, tuple[Maker, float]]:
    return {"letter": (maker_of(TRAIN, material.processor, arm, seed=seed), 1.0)}


DEEPSTACK = Ablation(
    name="deepstack",
    question="Do middle vision levels, added to the first decoder layers, help to read the smallest letters?",
    expectation=(
        "Report 2 and Table 12: features of lower levels keep detail that the last level has lost, and gains are largest on text in "
        "documents. So letters of 4 and 5 pixels should gain more than those of 9 to 11."
    ),
    arms={"with": Arm(), "without": Arm(deepstack=False)},
    prepare=prepare,
    learn=learn,
    probes={
        "4-5 pixels, right": answers_right(SMALL, 192),
        "9-11 pixels, right": answers_right(LARGE, 192),
        "4-5 pixels, nats": surprise(SMALL, 192),
        "9-11 pixels, nats": surprise(LARGE, 192),
    },
    steps=120,
    samples=48,
    notes=("The arm without has fewer parameters (no DeepStack mergers), as in the report's own comparison.",),
)
