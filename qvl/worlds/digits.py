"""Digits: one real handwritten digit anywhere on a noisy picture; which one is it."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image as Raster

from qvl.prompt.message import ContentPart, Image
from qvl.worlds.paint import COLOURS, background, blend, check_size, picture
from qvl.worlds.scans import scans
from qvl.worlds.world import Plan, Prior, Split, World, combinations

INKS = tuple(COLOURS)
QUESTION = "Which digit is written here?"


@dataclass(frozen=True, kw_only=True)
class Written:
    """A scan, by its split, digit and number there; its place in thousandths of the picture."""

    split: Split
    digit: int
    scan: int
    ink: str
    x: int
    y: int
    side: int


def digit(size: int = 64) -> World:
    """The answer is the digit; train, calibration and heldout show scans of their own."""
    check_size(size)

    def plan(random: Generator, split: Split) -> Plan:
        drawn, ink = draw_digit(random, split)
        side = int(random.integers(300, 801))
        x, y = random.integers(0, 1001 - side, size=2).tolist()
        number = int(random.integers(len(scans(split)[drawn])))
        written = Written(split=split, digit=drawn, scan=number, ink=ink, x=x, y=y, side=side)
        return Plan(
            question=QUESTION,
            answer=str(drawn),
            truth={"number": drawn, "ink": ink, "scan_box": [x, y, x + side, y + side], "scan": number},
            scorer="number",
            facts=written,
            splits_by=None,
        )

    return World(
        name="digits",
        category="ocr",
        plan=plan,
        show=lambda written, random: _show(written, random, size),
        find_prior=prior,
    )


def draw_digit(random: Generator, split: Split) -> tuple[int, str]:
    """Every digit is equally likely, whatever inks it may be written in."""
    pairs = combinations(10, len(INKS), split)
    drawn = int(random.choice(sorted({row for row, _ in pairs})))
    inks = [column for row, column in pairs if row == drawn]
    return drawn, INKS[inks[random.integers(len(inks))]]


def prior(_: Split) -> Prior:
    return Prior(answer="0", score=1 / 10, nats=math.log(10))


def _show(written: Written, random: Generator, size: int) -> tuple[ContentPart, ...]:
    raster = background(random, size)
    scan = scans(written.split)[written.digit][written.scan]
    left, top = round(written.x * size / 1000), round(written.y * size / 1000)
    side = max(8, round((written.x + written.side) * size / 1000) - left)
    enlarged = Raster.fromarray(scan).resize((side, side), Raster.Resampling.BICUBIC)
    if written.split == "train":
        enlarged = _leaning(enlarged, random)
    cover = np.asarray(enlarged).clip(0, 1)
    ink = np.array(COLOURS[written.ink], dtype=np.float32)
    # Ink of the same lightness as the paper would be hard to read: a dark picture takes light ink and the other way round.
    ink = ink * 0.6 if raster.mean() > 128 else ink * 0.6 + 102
    blend(raster, cover[: size - top, : size - left], top, left, ink)
    return (Image(picture(raster)),)


def _leaning(scan: Raster.Image, random: Generator) -> Raster.Image:
    """The same scan turned by up to 12 degrees, slanted and stretched by up to a tenth about its middle: the scans to learn from are few,
    and a model that knows each of them by heart reads no other (dev/LOG.md)."""
    turn, slant = random.uniform(-0.2, 0.2), random.uniform(-0.1, 0.1)
    wide, high = random.uniform(0.9, 1.1, size=2)
    middle = scan.width / 2
    a, b = math.cos(turn) / wide, (math.sin(turn) + slant) / high
    d, e = -math.sin(turn) / wide, math.cos(turn) / high
    affine = (a, b, middle - a * middle - b * middle, d, e, middle - d * middle - e * middle)
    return scan.transform(scan.size, Raster.Transform.AFFINE, affine, Raster.Resampling.BICUBIC)
