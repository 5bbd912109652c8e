"""Clips: frames at uneven times; when does an object appear, and what colour is seen at a given second."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator

from qvl.prompt.message import ContentPart, Video
from qvl.worlds.paint import SHAPES, background, check_size, ink_of, picture
from qvl.worlds.shapes import NAMES, Thing, apart, draw_thing, paint_thing
from qvl.worlds.world import Plan, Prior, Split, World, combinations, mean_log

# Times are whole tenths of a second, as time marks are written. The network sees frames in slices of two, marked with the mean of both
# times: gaps inside a slice are even, so that the mark is exact, and marks are at least 0.6 s apart, so that only one is within 0.5 s.
STARTS = range(0, 41)
INSIDE = (2, 4, 6, 8)
BETWEEN = range(4, 11)
SLICES = range(4, 9)
"""8 to 16 frames."""
SIDES = (250, 500)
OTHER_SIDES = (150, 220)
"""So that the second object finds room beside a first one of half the picture in its middle."""
TOLERANCE = 5
"""What the temporal scorer forgives, in tenths."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """`things[i]` is seen in the frames from `first[i]` up to, not including, `last[i]`."""

    tenths: tuple[int, ...]
    things: tuple[Thing, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def marks(self) -> tuple[int, ...]:
        """The time mark of each slice, in tenths."""
        return tuple((a + b) // 2 for a, b in zip(self.tenths[::2], self.tenths[1::2], strict=True))


def appear(size: int = 64) -> World:
    """When the named object appears; another may be there from the start. The answer is the mark of the slice: `3.4 seconds`."""

    def plan(random: Generator, split: Split) -> Plan:
        return plan_appear(random, split)

    return _world("clips.appear", "video", size, plan, appear_prior)


def plan_appear(random: Generator, split: Split) -> Plan:
    slices = int(random.choice(SLICES))
    tenths = draw_times(random, slices)
    thing = draw_thing(random, split, SIDES)
    things, first = [thing], [int(random.integers(2, 2 * slices))]
    if random.random() < 0.5:
        while True:
            other = draw_thing(random, split, OTHER_SIDES)
            if other.name != thing.name and apart(other, thing):
                break
        things, first = [other, thing], [0, *first]
    clip = Clip(tenths=tenths, things=tuple(things), first=tuple(first), last=tuple(2 * slices for _ in things))
    mark = clip.marks[first[-1] // 2] / 10
    truth = {
        "seconds": mark,
        "first_frame_seconds": tenths[first[-1]] / 10,
        "object": thing.facts(),
        "marks": [m / 10 for m in clip.marks],
    }
    return Plan(
        question=appear_question(thing.name),
        answer=f"{mark:.1f} seconds",
        truth=truth,
        scorer="temporal",
        facts=clip,
        splits_by=repr(clip),
    )


def appear_question(name: str) -> str:
    return f"At what second does the {name} appear?"


def at_second(size: int = 64, *, slices: int = 16) -> World:
    """A needle among frames: each slice shows another object, and the answer is the colour of the one at a given second."""
    if slices < 2:
        raise ValueError(f"slices is {slices}; give at least 2, so that there is something to choose from.")

    def plan(random: Generator, split: Split) -> Plan:
        tenths = draw_times(random, slices)
        things = tuple(draw_thing(random, split, SIDES) for _ in range(slices))
        clip = Clip(
            tenths=tenths,
            things=things,
            first=tuple(range(0, 2 * slices, 2)),
            last=tuple(range(2, 2 * slices + 1, 2)),
        )
        asked = int(random.integers(slices))
        answer = things[asked].colour
        others = [colour for colour in NAMES if colour != answer]
        truth = {"answer": answer, "others": others, "seconds": clip.marks[asked] / 10, "depth": asked / (slices - 1)}
        return Plan(
            question=f"What colour is the object at {clip.marks[asked] / 10:.1f} seconds?",
            answer=answer,
            truth=truth,
            scorer="exact",
            facts=clip,
            splits_by=repr(clip),
        )

    def prior(split: Split) -> Prior:
        pairs = combinations(len(NAMES), len(SHAPES), split)
        shares = {name: sum(NAMES[row] == name for row, _ in pairs) / len(pairs) for name in NAMES}
        best = max(shares, key=shares.__getitem__)
        return Prior(answer=best, score=shares[best], nats=-sum(p * math.log(p) for p in shares.values()))

    return _world(f"clips.at_second{slices}", "long_video", size, plan, prior)


def draw_times(random: Generator, slices: int) -> tuple[int, ...]:
    gaps = np.empty(2 * slices, dtype=np.int64)
    gaps[0] = random.integers(STARTS.start, STARTS.stop)
    gaps[1::2] = random.choice(INSIDE, size=slices)
    gaps[2::2] = random.integers(BETWEEN.start, BETWEEN.stop, size=slices - 1)
    return tuple(np.cumsum(gaps).tolist())


def _world(name: str, category: str, size: int, plan, prior) -> World:
    check_size(size)
    return World(
        name=name, category=category, plan=plan, show=lambda clip, random: _show(clip, random, size), find_prior=prior
    )


def _show(clip: Clip, random: Generator, size: int) -> tuple[ContentPart, ...]:
    """A still scene with fresh grain in each frame."""
    scene = background(random, size)
    inks = [ink_of(thing.colour, random) for thing in clip.things]
    frames = []
    for number in range(len(clip.tenths)):
        raster = scene + random.integers(-6, 7, size=(size, size, 1), dtype=np.int8)
        for thing, ink, first, last in zip(clip.things, inks, clip.first, clip.last, strict=True):
            if first <= number < last:
                paint_thing(raster, thing, ink)
        frames.append(picture(raster))
    return (Video(tuple(frames), frame_seconds=tuple(t / 10 for t in clip.tenths)),)


@cache
def appear_prior(_: Split) -> Prior:
    """The law of the mark, by folding the laws of its gaps; the best answer covers the likeliest stretch of one second."""
    longest = STARTS[-1] + SLICES[-1] * (INSIDE[-1] + BETWEEN[-1]) + 1
    start, inside, half, between = (
        _law(values, longest) for values in (STARTS, INSIDE, [gap // 2 for gap in INSIDE], BETWEEN)
    )
    chance = np.zeros(longest)
    for slices in SLICES:
        begin = start
        for number in range(slices):
            # The first frame it is in is any but the first two: each slice after the first is equally likely.
            if number > 0:
                chance += np.convolve(begin, half)[:longest] / (slices - 1) / len(SLICES)
            begin = np.convolve(np.convolve(begin, inside)[:longest], between)[:longest]
    cover = np.convolve(chance, np.ones(2 * TOLERANCE + 1), mode="same")
    best = int(np.argmax(cover))
    # The marks can be read; only which of them is meant cannot.
    nats = mean_log([slices - 1 for slices in SLICES])
    return Prior(answer=f"{best / 10:.1f} seconds", score=float(cover[best]), nats=nats)


def _law(values: range | tuple[int, ...] | list[int], length: int) -> np.ndarray:
    law = np.zeros(length)
    law[list(values)] = 1 / len(values)
    return law
