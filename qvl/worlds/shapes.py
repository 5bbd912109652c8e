"""Shapes: one to five coloured shapes on noise; name it, box it, count them, describe the picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from qvl.prompt.coordinates import Box, Boxes, to_json
from qvl.prompt.message import ContentPart, Image
from qvl.worlds.paint import COLOURS, SHAPES, TEXTURES, background, check_size, ink_of, paint_shape, picture
from qvl.worlds.world import Plan, Prior, Split, World, combinations

NAMES = tuple(COLOURS)
SIDES = (100, 500)
"""The least and the longest side of an object, in thousandths of the picture. All places are whole thousandths, as the answers are."""

NAME_QUESTION = "What shape and colour is the object?"
SHAPE_QUESTION = "What shape is the object?"
COUNT_QUESTION = "How many objects are there?"
CAPTION_QUESTION = "Describe the picture from left to right."


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object; its place in thousandths of the picture."""

    colour: str
    shape: str
    texture: str
    x: int
    y: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def phrase(self) -> str:
        return f"a striped {self.name}" if self.texture == "striped" else f"a {self.name}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        return (self.x, self.y, self.x + self.side, self.y + self.side)

    def facts(self) -> dict[str, object]:
        return {"colour": self.colour, "shape": self.shape, "texture": self.texture, "box": list(self.box)}


def name(size: int = 128) -> World:
    """One object; the answer is its shape and colour, `circle, red`.

    The shape, which is harder to see, stands first: behind a colour it is soon guessed from the shapes that colour has come with, and pairs
    that were never named are then never said (dev/LOG.md).
    """

    def plan(random: Generator, split: Split) -> Plan:
        thing = draw_thing(random, split)
        truth = {"answer": pair(thing.shape, thing.colour), "objects": [thing.facts()]}
        return Plan(
            question=NAME_QUESTION,
            answer=pair(thing.shape, thing.colour),
            truth=truth,
            scorer="exact",
            facts=(thing,),
            splits_by=repr(thing),
        )

    def prior(split: Split) -> Prior:
        pairs = combinations(len(NAMES), len(SHAPES), split)
        colour, shape = pairs[0]
        return Prior(answer=pair(SHAPES[shape], NAMES[colour]), score=1 / len(pairs), nats=math.log(len(pairs)))

    return _world("shapes.name", "alignment", size, plan, prior)


def pair(shape: str, colour: str) -> str:
    return f"{shape}, {colour}"


def shape(size: int = 128) -> World:
    """One object; the answer is its shape alone, so that shapes are not learned as companions of colours."""

    def plan(random: Generator, split: Split) -> Plan:
        thing = draw_thing(random, split)
        truth = {"answer": thing.shape, "objects": [thing.facts()]}
        return Plan(
            question=SHAPE_QUESTION,
            answer=thing.shape,
            truth=truth,
            scorer="exact",
            facts=(thing,),
            splits_by=repr(thing),
        )

    def prior(split: Split) -> Prior:
        pairs = combinations(len(NAMES), len(SHAPES), split)
        shares = [sum(column == number for _, column in pairs) / len(pairs) for number in range(len(SHAPES))]
        best = max(range(len(SHAPES)), key=shares.__getitem__)
        return Prior(answer=SHAPES[best], score=shares[best], nats=-sum(p * math.log(p) for p in shares))

    return _world("shapes.shape", "alignment", size, plan, prior)


def box(size: int = 128, *, distractors: int = 0) -> World:
    """Where an object is, as `[{"bbox_2d": [x1, y1, x2, y2], "label": "red circle"}]` in thousandths.

    With distractors, up to so many other objects of other names are in the picture; the question says which one is meant.
    """
    if not 0 <= distractors <= 3:
        raise ValueError(f"distractors is {distractors}; from 0 to 3 find room beside an object of half the picture.")

    def plan(random: Generator, split: Split) -> Plan:
        thing = draw_thing(random, split)
        others = int(random.integers(0, distractors + 1)) if distractors else 0
        things = (thing, *_others(random, split, thing, others))
        truth = {"box": list(thing.box), "label": thing.name, "objects": [t.facts() for t in things]}
        return Plan(
            question=box_question(thing.name),
            answer=box_answer(thing.box, thing.name),
            truth=truth,
            scorer="iou",
            facts=things,
            splits_by=repr(things),
        )

    return _world(f"shapes.box{distractors or ''}", "grounding", size, plan, _box_prior)


def box_question(label: str) -> str:
    return f"Locate the {label}. Report bbox coordinates in JSON format."


def box_answer(corners: tuple[int, int, int, int], label: str) -> str:
    return to_json(Boxes(items=(Box(*corners, label),), space="relative1000"))


def count(size: int = 128) -> World:
    """One to five objects that do not touch. Sizes are drawn alike for every count, so that none can be told by size."""

    def plan(random: Generator, split: Split) -> Plan:
        number = int(random.integers(1, 6))
        things = scatter(random, split, number, (100, 260))
        truth = {"number": number, "objects": [thing.facts() for thing in things]}
        return Plan(
            question=COUNT_QUESTION,
            answer=str(number),
            truth=truth,
            scorer="count",
            facts=things,
            splits_by=repr(things),
        )

    return _world("shapes.count", "counting", size, plan, lambda _: Prior(answer="1", score=1 / 5, nats=math.log(5)))


def caption(size: int = 128) -> World:
    """One to three objects from left to right: `a striped red circle, a blue square and a green cross`."""

    def plan(random: Generator, split: Split) -> Plan:
        number = int(random.integers(1, 4))
        while True:
            things = sorted(scatter(random, split, number, (150, 400)), key=_middle)
            if all(_middle(b) - _middle(a) >= 60 for a, b in pairwise(things)):
                break
        answer = listing([thing.phrase for thing in things])
        truth = {"answer": answer, "objects": [thing.facts() for thing in things]}
        return Plan(
            question=CAPTION_QUESTION,
            answer=answer,
            truth=truth,
            scorer="exact",
            facts=tuple(things),
            splits_by=repr(things),
        )

    def prior(split: Split) -> Prior:
        pairs = combinations(len(NAMES), len(SHAPES), split)
        looks = len(pairs) * len(TEXTURES)
        colour, shape = pairs[0]
        # One object in a third of the pictures, two on average, each look equally likely.
        return Prior(
            answer=f"a {NAMES[colour]} {SHAPES[shape]}", score=1 / (3 * looks), nats=math.log(3) + 2 * math.log(looks)
        )

    return _world("shapes.caption", "alignment", size, plan, prior)


def draw_thing(random: Generator, split: Split, sides: tuple[int, int] = SIDES) -> Thing:
    """Any colour and shape the split may show, any texture, any side, anywhere inside the picture; all equally likely."""
    pairs = combinations(len(NAMES), len(SHAPES), split)
    colour, shape = pairs[random.integers(len(pairs))]
    side = int(random.integers(sides[0], sides[1] + 1))
    x, y = _place(random, side)
    texture = TEXTURES[random.integers(len(TEXTURES))]
    return Thing(colour=NAMES[colour], shape=SHAPES[shape], texture=texture, x=x, y=y, side=side)


def scatter(random: Generator, split: Split, number: int, sides: tuple[int, int]) -> tuple[Thing, ...]:
    """So many objects with air between them. Their looks and sides are drawn first and stay; only places are drawn again when one finds
    no room, so that crowds are not smaller than loners."""
    drawn = [draw_thing(random, split, sides) for _ in range(number)]
    while True:
        placed: list[Thing] = []
        for thing in drawn:
            for _ in range(20):
                if all(apart(thing, other) for other in placed):
                    placed.append(thing)
                    break
                x, y = _place(random, thing.side)
                thing = replace(thing, x=x, y=y)
            else:
                break
        if len(placed) == number:
            return tuple(placed)
        drawn = [replace(thing, x=x, y=y) for thing in drawn for x, y in [_place(random, thing.side)]]


def _place(random: Generator, side: int) -> tuple[int, int]:
    """Anywhere inside the picture."""
    x, y = random.integers(0, 1001 - side, size=2).tolist()
    return x, y


def apart(one: Thing, two: Thing, air: int = 25) -> bool:
    return (
        one.x + one.side + air <= two.x
        or two.x + two.side + air <= one.x
        or one.y + one.side + air <= two.y
        or two.y + two.side + air <= one.y
    )


def listing(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def show(things: Sequence[Thing], random: Generator, size: int) -> tuple[ContentPart, ...]:
    raster = background(random, size)
    for thing in things:
        paint_thing(raster, thing, ink_of(thing.colour, random))
    return (Image(picture(raster)),)


def paint_thing(raster: np.ndarray, thing: Thing, ink: np.ndarray) -> None:
    paint_shape(
        raster,
        shape=thing.shape,
        ink=ink,
        texture=thing.texture,
        x=thing.x / 1000,
        y=thing.y / 1000,
        side=thing.side / 1000,
    )


def _world(world_name: str, category: str, size: int, plan, prior) -> World:
    check_size(size)
    return World(
        name=world_name,
        category=category,
        plan=plan,
        show=lambda things, random: show(things, random, size),
        find_prior=prior,
    )


def _others(random: Generator, split: Split, thing: Thing, number: int) -> tuple[Thing, ...]:
    """Objects small enough for the room beside any first one, of other names; drawn anew when one finds no room."""
    while True:
        found: list[Thing] = []
        for _ in range(40):
            if len(found) == number:
                return tuple(found)
            other = draw_thing(random, split, (100, 220))
            if other.name != thing.name and all(apart(other, t) for t in (thing, *found)):
                found.append(other)


def _middle(thing: Thing) -> float:
    return thing.x + thing.side / 2


@cache
def _box_prior(_: Split) -> Prior:
    """The best constant box lies in the middle; its side is found by summing IoU over every side and a grid of places."""
    least, longest = SIDES
    sides = range(least, longest + 1)
    means = {guess: _mean_overlap(guess, sides[::20]) for guess in range(200, 701, 20)}
    guess = max(means, key=means.__getitem__)
    corners = (500 - guess // 2, 500 - guess // 2, 500 + guess // 2, 500 + guess // 2)
    # A side, then a place along each axis, all equally likely; the label is in the question.
    nats = sum(math.log(len(sides)) + 2 * math.log(1001 - side) for side in sides) / len(sides)
    return Prior(answer=box_answer(corners, "object"), score=means[guess], nats=nats)


def _mean_overlap(guess: int, sides: Sequence[int]) -> float:
    start, end = 500 - guess / 2, 500 + guess / 2
    means = []
    for side in sides:
        places = np.linspace(0, 1000 - side, 48)
        shared = np.clip(np.minimum(places + side, end) - np.maximum(places, start), 0, None)
        both = shared[:, None] * shared[None, :]
        means.append(float(np.mean(both / (side**2 + guess**2 - both))))
    return sum(means) / len(means)
