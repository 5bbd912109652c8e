"""What a world is: a pure function of (seed, index, split), the prior of its answers, and the test of a blind reader."""

import hashlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.random import Generator
from PIL import Image as Raster

from qvl.prompt.example import Example
from qvl.prompt.message import ContentPart, Image, Message, Text, Video, assistant, user

Split = Literal["train", "calibration", "heldout", "novel"]
"""calibration and heldout hold other scenes (other scans, other prose) of the same combinations as train; novel holds only
combinations, such as a colour with a shape, that no other split ever shows."""

SHARES: Mapping[str, frozenset[int]] = {
    "train": frozenset(range(6)),
    "calibration": frozenset({6}),
    "heldout": frozenset({7}),
}
"""Which remainders of a scene's checksum belong to a split: no scene can be in two."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An example before anything is painted."""

    question: str
    answer: str
    truth: Mapping[str, Any]
    scorer: str
    facts: Any
    """What is to be shown."""
    splits_by: str | None
    """The scene as text, whose checksum decides its split; None where the world keeps its splits apart itself."""
    follow_ups: tuple[tuple[str, str], ...] = ()
    """Further questions about the same evidence with their answers, asked in later turns: more to learn from one picture or text."""


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What can be had without looking."""

    answer: str
    """The constant answer with the best mean score."""
    score: float
    nats: float
    """Entropy of the answer for one who sees the question and the time marks but no pixels and no hay: a loss (summed over the answer)
    that rests here learns nothing from the evidence."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Call it: `world(seed, index, split)`. Example i is the same whatever was drawn before it."""

    name: str
    category: str
    plan: Callable[[Generator, Split], Plan]
    show: Callable[[Any, Generator], tuple[ContentPart, ...]]
    """The evidence for a plan's facts."""
    find_prior: Callable[[Split], Prior]
    """Of a split; computed from the laws its scenes are drawn by."""

    def __call__(self, seed: int, index: int, split: Split = "train") -> Example:
        random, plan = self._plan(seed, index, split)
        return Example(
            id=f"{self.name}/{split}/{seed}/{index}",
            category=self.category,
            messages=(
                user(*self.show(plan.facts, random), plan.question),
                assistant(plan.answer),
                *(turn for q, a in plan.follow_ups for turn in (user(q), assistant(a))),
            ),
            answer=plan.answer,
            truth=plan.truth,
            scorer=plan.scorer,
            facts=plan.facts,
        )

    def planned(self, seed: int, index: int, split: Split = "train") -> Plan:
        """The same example's question, answer and facts, without painting."""
        return self._plan(seed, index, split)[1]

    @property
    def prior(self) -> Prior:
        """Of the train split."""
        return self.find_prior("train")

    def _plan(self, seed: int, index: int, split: Split) -> tuple[Generator, Plan]:
        random = numbers_for(self.name, seed, index, split)
        while True:
            plan = self.plan(random, split)
            if split == "novel" or plan.splits_by is None or remainder(plan.splits_by.encode()) in SHARES[split]:
                return random, plan


def enlarged(world: World, times: int) -> World:
    """The same world with each painted pixel `times` pixels wide and high: patches of 16 then see what patches of 16 / times would see of
    the picture as it was painted."""

    def show(facts: Any, random: Generator) -> tuple[ContentPart, ...]:
        parts = world.show(facts, random)
        if not all(isinstance(part, Image | Video) for part in parts):
            raise ValueError(f"the world {world.name} shows more than pictures and clips; only these can be enlarged.")
        return tuple(_larger(part, times) for part in parts if isinstance(part, Image | Video))

    return replace(world, show=show)


def _larger(part: Image | Video, times: int) -> Image | Video:
    frames = part.source if isinstance(part, Video) else (part.source,)
    assert isinstance(frames, tuple)
    larger = []
    for frame in frames:
        assert isinstance(frame, Raster.Image)
        larger.append(frame.resize((frame.width * times, frame.height * times), Raster.Resampling.NEAREST))
    return replace(part, source=tuple(larger) if isinstance(part, Video) else larger[0])


def numbers_for(name: str, seed: int, index: int, split: Split) -> Generator:
    """A generator of its own for each example: the counter cipher Philox, keyed by what names the example."""
    if split not in get_args(Split):
        raise ValueError(f"the split is {split!r}; it must be one of {', '.join(get_args(Split))}.")
    if seed < 0 or index < 0:
        raise ValueError(f"seed is {seed} and index is {index}; both count from 0.")
    return Generator(np.random.Philox(key=np.array([_stream(name, seed, split), index], dtype=np.uint64)))


@lru_cache(maxsize=256)
def _stream(name: str, seed: int, split: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name}/{split}/{seed}".encode(), digest_size=8).digest(), "big")


def remainder(content: bytes) -> int:
    return zlib.crc32(content) % 8


def belongs(content: bytes, split: Split) -> bool:
    """Whether a source object (a scan, a sentence) is of this split; novel combinations are shown with held-out objects."""
    return remainder(content) in SHARES["heldout" if split == "novel" else split]


@lru_cache(maxsize=64)
def combinations(rows: int, columns: int, split: Split) -> tuple[tuple[int, int], ...]:
    """The (row, column) pairs a split may show. A diagonal is kept for novel, so that each row and column is known from others."""
    return tuple(
        (row, column)
        for row in range(rows)
        for column in range(columns)
        if ((row + column) % max(rows, columns) == 0) == (split == "novel")
    )


def mean_log(numbers: Sequence[float]) -> float:
    return math.fsum(map(math.log, numbers)) / len(numbers)


def best_constant(
    world: World,
    score: Callable[[str, str, Mapping[str, Any]], float],
    constants: Sequence[str],
    *,
    seed: int = 0,
    draws: int = 1000,
    split: Split = "train",
) -> tuple[str, float]:
    """The best of some constant answers and its mean score, by trial. `score` takes a scorer's name, an answer and a truth."""
    plans = [world.planned(seed, index, split) for index in range(draws)]
    means = [math.fsum(score(p.scorer, text, p.truth) for p in plans) / draws for text in constants]
    best = max(range(len(constants)), key=means.__getitem__)
    return constants[best], means[best]


def blind(examples: Sequence[Example]) -> list[Example]:
    """The same questions about the evidence of others: what a model scores here, it scores without looking.

    Evidence moves on by one among examples of one category and form (media, number of frames). The times of a clip's frames stay: they
    are text that a reader may use without seeing.
    """
    groups: dict[object, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault((example.category, _form(example)), []).append(i)
    swapped = list(examples)
    for (category, form), members in groups.items():  # type: ignore[misc]
        if len(members) == 1:
            raise ValueError(
                f"only one example is {category} with {form}; give two or more, so that evidence can be exchanged."
            )
        for i, other in zip(members, [*members[1:], members[0]], strict=True):
            swapped[i] = _with_evidence(examples[i], examples[other])
    return swapped


def _form(example: Example) -> str:
    parts = example.messages[0].parts[:-1]
    if not parts:
        raise ValueError(f"example {example.id} shows nothing before its question; blindness has no meaning there.")
    return ", ".join(f"{len(p.source)} frames" if isinstance(p, Video) else type(p).__name__.lower() for p in parts)


def _with_evidence(mine: Example, theirs: Example) -> Example:
    *own, question = mine.messages[0].parts
    moved = []
    for part, other in zip(own, theirs.messages[0].parts[:-1], strict=True):
        if isinstance(part, Image | Video) and isinstance(other, Image | Video):
            moved.append(replace(part, source=other.source))
        elif isinstance(part, Text) and isinstance(other, Text):
            moved.append(other)
        else:
            raise ValueError(
                f"evidence of {mine.id} is a {type(part).__name__}; only pictures, clips and text are exchanged."
            )
    return replace(mine, messages=(Message("user", (*moved, question)), *mine.messages[1:]))
