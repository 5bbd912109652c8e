"""Told worlds: the scenes of the other worlds in words, with the same questions; replay that keeps the language's skills."""

from collections.abc import Callable
from typing import Any

from numpy.random import Generator

from qvl.prompt.message import ContentPart, Text
from qvl.worlds import clips, digits, shapes
from qvl.worlds.shapes import Thing, listing
from qvl.worlds.world import Plan, Split, World

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def told(kind: str) -> World:
    """Kinds: name, box, count, digit, appear. Who cannot read what is told does no better than who cannot see the picture."""
    if kind not in KINDS:
        raise ValueError(f"nothing of kind {kind!r} can be told; choose one of {', '.join(KINDS)}.")
    world, tell = KINDS[kind]
    return World(
        name=f"text.{kind}",
        category="text",
        plan=world.plan,
        show=lambda facts, random: (Text(tell(facts) + "\n\n"),),
        find_prior=world.find_prior,
    )


def told_digit() -> World:
    """The digit is told as a word, so that no scan is needed."""

    def plan(random: Generator, split: Split) -> Plan:
        drawn, ink = digits.draw_digit(random, split)
        x, y = random.integers(0, 1001, size=2).tolist()
        text = f"Someone wrote the digit {NUMERALS[drawn]} in {ink}, at ({x}, {y})."
        return Plan(
            question=digits.QUESTION,
            answer=str(drawn),
            truth={"number": drawn, "ink": ink},
            scorer="number",
            facts=text,
            splits_by=text,
        )

    return World(name="text.digit", category="text", plan=plan, show=_as_it_is, find_prior=digits.prior)


def tell_things(things: tuple[Thing, ...]) -> str:
    """Each with the corner where its box begins; by them, scenes of two splits differ in words too."""
    return f"In the picture you see {listing([f'{t.phrase} at ({t.x}, {t.y})' for t in things])}."


def tell_box(things: tuple[Thing, ...]) -> str:
    return " ".join(
        f"The {t.name} reaches from {t.box[0]} to {t.box[2]} across and from {t.box[1]} to {t.box[3]} down."
        for t in things
    )


def tell_clip(clip: clips.Clip) -> str:
    """What each time mark shows for the first time."""
    lines = []
    for number, mark in enumerate(clip.marks):
        new = [t.phrase for t, first in zip(clip.things, clip.first, strict=True) if first // 2 == number]
        lines.append(f"<{mark / 10:.1f} seconds> {listing(new) if new else 'nothing new'}.")
    return "\n".join(lines)


def _as_it_is(text: str, random: Generator) -> tuple[ContentPart, ...]:
    return (Text(text + "\n\n"),)


KINDS: dict[str, tuple[World, Callable[[Any], str]]] = {
    "name": (shapes.name(), tell_things),
    "box": (shapes.box(), tell_box),
    "count": (shapes.count(), tell_things),
    "digit": (told_digit(), str),
    "appear": (clips.appear(), tell_clip),
}
