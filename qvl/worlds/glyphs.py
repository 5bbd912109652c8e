"""Glyphs: three capital letters a few pixels high, near what a patch of 16 pixels can carry; read them."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.random import Generator
from PIL import Image as Raster
from PIL import ImageDraw

from qvl.prompt.message import ContentPart, Image
from qvl.show.letters import Font, font_for
from qvl.worlds.paint import background, blend, check_size, picture
from qvl.worlds.world import Plan, Prior, Split, World, combinations

LETTERS = "ABCDEFGHJKLMNPRSTUVXYZ"
"""Capitals that no other sign looks like: without I, O, Q and W."""
LENGTH = 3
QUESTION = "Read the letters."


@dataclass(frozen=True, kw_only=True)
class Sign:
    """`height` in pixels of a capital letter; x and y in thousandths of the room that the word leaves."""

    word: str
    height: int
    x: int
    y: int
    is_dark: bool


def letters(size: int = 64, *, heights: tuple[int, int] = (6, 10)) -> World:
    """A word of three letters anywhere on the picture. No word of train holds a pair of neighbours kept for novel."""
    check_size(size)
    if not 4 <= heights[0] <= heights[1] <= size // 4:
        raise ValueError(
            f"heights is {heights}; give 4 <= least <= most <= {size // 4}, a quarter of the picture's side."
        )

    def plan(random: Generator, split: Split) -> Plan:
        word = draw_word(random, split)
        x, y = random.integers(0, 1001, size=2).tolist()
        height = int(random.integers(heights[0], heights[1] + 1))
        sign = Sign(word=word, height=height, x=x, y=y, is_dark=bool(random.integers(2)))
        return Plan(
            question=QUESTION,
            answer=word,
            truth={"text": word, "height": height},
            scorer="text",
            facts=sign,
            splits_by=repr(sign),
        )

    return World(
        name=f"glyphs{heights[0]}-{heights[1]}",
        category="ocr",
        plan=plan,
        show=lambda sign, random: _show(sign, random, size),
        find_prior=prior,
    )


def draw_word(random: Generator, split: Split) -> str:
    """Any word the split may show, all equally likely; a word is novel if it holds a pair kept for novel."""
    kept = combinations(len(LETTERS), len(LETTERS), "novel")
    while True:
        numbers = random.integers(len(LETTERS), size=LENGTH).tolist()
        pairs = pairwise(numbers)
        if any(pair in kept for pair in pairs) == (split == "novel"):
            return "".join(LETTERS[number] for number in numbers)


@cache
def prior(_: Split) -> Prior:
    """Every word is worth nearly the same: the score is the mean over all words of train that one constant word gets."""
    words = _words()
    guesses = words[:: len(words) // 24]
    means = {guess: math.fsum(_likeness(guess, word) for word in words) / len(words) for guess in guesses}
    best = max(means, key=means.__getitem__)
    return Prior(answer=best, score=means[best], nats=math.log(len(words)))


def _words() -> list[str]:
    known = combinations(len(LETTERS), len(LETTERS), "train")
    follows = {a: [b for first, b in known if first == a] for a in range(len(LETTERS))}
    return [LETTERS[a] + LETTERS[b] + LETTERS[c] for a in follows for b in follows[a] for c in follows[b]]


def _likeness(one: str, two: str) -> float:
    """1 - edits / length, for two words of three letters: one that is the other moved on by a place is two edits away."""
    same = sum(a == b for a, b in zip(one, two, strict=True))
    is_moved = one[1:] == two[:-1] or one[:-1] == two[1:]
    return max(same, int(is_moved)) / LENGTH


def _show(sign: Sign, random: Generator, size: int) -> tuple[ContentPart, ...]:
    raster = background(random, size)
    cover = _stencil(sign.word, sign.height)
    top = round(sign.y * (size - cover.shape[0]) / 1000)
    left = round(sign.x * (size - cover.shape[1]) / 1000)
    level = raster[top : top + cover.shape[0], left : left + cover.shape[1]].mean()
    # Black or white as drawn, unless that is too near the paper.
    is_dark = sign.is_dark if 90 < level < 160 else level > 125
    blend(raster, cover, top, left, np.full(3, 5 if is_dark else 250, dtype=np.float32))
    return (Image(picture(raster)),)


def _stencil(word: str, height: int) -> np.ndarray:
    """The word as a mask, cut to its ink."""
    font = _font(height)
    left, top, right, bottom = font.getbbox(word)
    canvas = Raster.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), word, fill=255, font=font)
    return np.asarray(canvas.crop(canvas.getbbox()), dtype=np.float32) / 255


@cache
def _font(height: int) -> Font:
    """The font at the least size whose capitals are so many pixels high."""
    return next(font for size in range(height, 4 * height) if _capital(font := font_for(size)) >= height)


def _capital(font: Font) -> float:
    _, top, _, bottom = font.getbbox("H")
    return bottom - top
