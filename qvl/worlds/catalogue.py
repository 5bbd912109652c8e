"""The catalogue: every world by its name."""

from collections.abc import Callable
from functools import partial

from qvl.worlds import clips, digits, glyphs, needle, shapes, text
from qvl.worlds.world import World

WORLDS: dict[str, Callable[..., World]] = {
    "shapes.name": shapes.name,
    "shapes.shape": shapes.shape,
    "shapes.box": shapes.box,
    "shapes.count": shapes.count,
    "shapes.caption": shapes.caption,
    "digits": digits.digit,
    "clips.appear": clips.appear,
    "clips.at_second": clips.at_second,
    "needle": needle.tagged,
    "glyphs": glyphs.letters,
    **{f"text.{kind}": partial(text.told, kind) for kind in text.KINDS},
}
"""Each takes its own options; all have defaults."""


def world(name: str, **options: object) -> World:
    """`world("shapes.box", size=96)`."""
    if name not in WORLDS:
        raise ValueError(f"there is no world {name!r}; choose one of {', '.join(WORLDS)}.")
    return WORLDS[name](**options)
