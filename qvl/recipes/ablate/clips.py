"""Clips of plain colours for the ablations of time: short frames of one or two tokens, so that hundreds fit in a toy's prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from numpy.random import Generator

from qvl.prompt.message import ContentPart, Text, Video
from qvl.scoring.registry import score
from qvl.worlds.paint import COLOURS
from qvl.worlds.world import Plan, Prior, Split, World, best_constant, mean_log

NAMES = tuple(COLOURS)
SIDES = ("left", "right")
FLASH = -1
"""Stands for white where a clip lists colours by number."""


@dataclass(frozen=True, kw_only=True)
class ColourClip:
    """What each slice (two frames) shows from left to right, in 32-pixel squares, and the tenth of a second of each frame."""

    squares: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]


def after_flash(least: int, most: int) -> World:
    """Every slice shows two colours, one slice is white: which colour is on that side in the next slice?

    To answer is to know which slice comes next and which square is meant: time and width, and nothing else.
    """

    def plan(random: Generator, split: Split) -> Plan:
        slices = int(random.integers(least, most + 1))
        flash = int(random.integers(slices - 1))
        side = int(random.integers(2))
        drawn = random.integers(len(NAMES), size=(slices, 2)).tolist()
        drawn[flash] = [FLASH, FLASH]
        clip = ColourClip(
            squares=tuple(tuple(row) for row in drawn), seconds=tuple(float(i) for i in range(2 * slices))
        )
        answer = NAMES[drawn[flash + 1][side]]
        return Plan(
            question=f"What colour is on the {SIDES[side]} after white?",
            answer=answer,
            truth={"answer": answer, "others": [name for name in NAMES if name != answer], "slices": slices},
            scorer="exact",
            facts=clip,
            splits_by=repr(clip),
        )

    return World(
        name=f"after_flash{least}-{most}", category="video", plan=plan, show=show, find_prior=lambda _: _one_of(NAMES)
    )


def change(rates: Sequence[float], *, longest: float = 16.0, is_told: bool = False) -> World:
    """One colour gives way to another; when? Frames come at one of these rates (a second), or unevenly for rate 0.

    The answer is the time mark of the first slice of the new colour. `is_told`: in words, with uneven times: what a language model can
    read before it sees.
    """

    def plan(random: Generator, split: Split) -> Plan:
        rate = rates[int(random.integers(len(rates)))]
        length = float(random.uniform(longest / 2, longest))
        seconds = _even(rate, length) if rate else _uneven(random, length)
        slices = len(seconds) // 2
        at = int(random.integers(1, slices))
        old, new = random.permutation(len(NAMES))[:2].tolist()
        clip = ColourClip(squares=tuple((old if i < at else new,) for i in range(slices)), seconds=seconds)
        mark = (seconds[2 * at] + seconds[2 * at + 1]) / 2
        return Plan(
            question=f"At what second does {NAMES[new]} appear?",
            answer=f"{mark:.1f} seconds",
            # A slice is named by its middle; at the coarsest rate its start lies a second before.
            truth={"seconds": mark, "tolerance": 1.0},
            scorer="temporal",
            facts=clip,
            splits_by=repr(clip),
        )

    told = "told_" if is_told else ""
    world = World(
        name=f"{told}change" + "-".join(f"{rate:g}" for rate in rates),
        category="text" if is_told else "video",
        plan=plan,
        show=tell if is_told else show,
        find_prior=cache(lambda _: _moment(world)),
    )
    return world


def show(clip: ColourClip, random: Generator) -> tuple[ContentPart, ...]:
    """Plain squares, each frame a little brighter or darker: rasters are uint8 (3, 32, width)."""
    width = 32 * len(clip.squares[0])
    frames = []
    for number in range(len(clip.seconds)):
        raster = torch.empty(3, 32, width, dtype=torch.uint8)
        shade = int(random.integers(-15, 16))
        for place, colour in enumerate(clip.squares[number // 2]):
            ink = (235, 235, 235) if colour == FLASH else COLOURS[NAMES[colour]]
            for channel, level in enumerate(ink):
                raster[channel, :, 32 * place : 32 * place + 32] = min(255, max(0, level + shade))
        frames.append(raster)
    return (Video(tuple(frames), frame_seconds=clip.seconds),)


def tell(clip: ColourClip, random: Generator) -> tuple[ContentPart, ...]:
    middles = [(a + b) / 2 for a, b in zip(clip.seconds[::2], clip.seconds[1::2], strict=True)]
    lines = [f"<{m:.1f} seconds>{NAMES[row[0]]}" for m, row in zip(middles, clip.squares, strict=True)]
    return (Text("".join(lines) + "\n"),)


def _even(rate: float, length: float) -> tuple[float, ...]:
    frames = 2 * max(2, round(length * rate / 2))
    return tuple(i / rate for i in range(frames))


def _uneven(random: Generator, length: float) -> tuple[float, ...]:
    """Slices half a second to four seconds apart, from 0; the two frames of a slice are .2 s apart so that its mark is exact."""
    starts = [0.0]
    while starts[-1] < length or len(starts) < 2:
        starts.append(starts[-1] + int(random.integers(5, 41)) / 10)
    return tuple(round(start + more, 1) for start in starts for more in (0.0, 0.2))


def _moment(world: World) -> Prior:
    """By trial. The marks can be read; only which of them is meant cannot."""
    best, mean = best_constant(world, score, [f"{second}.0 seconds" for second in range(17)], draws=400)
    marks = [len(world.planned(0, index).facts.squares) - 1 for index in range(400)]
    return Prior(answer=best, score=mean, nats=mean_log(marks))


def _one_of(answers: Sequence[str]) -> Prior:
    return Prior(answer=answers[0], score=1 / len(answers), nats=math.log(len(answers)))
