"""Needles: a tagged fact in a long text, among untagged ones that look like it; the answer is what its tag says."""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache

from numpy.random import Generator

from qvl.prompt.message import ContentPart, Text
from qvl.worlds.paint import COLOURS
from qvl.worlds.prose import sentence
from qvl.worlds.world import Plan, Prior, Split, World, belongs, combinations

KEYS = ("anchor", "basket", "candle", "drum")
"""Few, because recall over many keys comes late and all at once; over four it comes soon."""
VALUES = (*COLOURS, "orange", "pink", "white", "black")
"""A text uses the first so many of them."""


def count_words(text: str) -> int:
    return len(text.split())


def tagged(
    length: int = 2048,
    *,
    depth: float | None = None,
    hay: "Hay | None" = None,
    measure: Callable[[str], int] = count_words,
    distractors: int = 8,
    ask_all: bool = False,
    answers: int = len(COLOURS),
) -> World:
    """The colour behind one of four tags, each of which is set once; `distractors` sentences name colours without a tag.

    The text is at least `length` long by `measure`: words, of which any tokenizer makes at least as many tokens, or the tokens of your
    own tokenizer. `depth` says where the needle stands, 0 at the start and 1 at the end; without it, anywhere. `hay` is real prose to
    hide it in, measured in its own way; without it, sentences are made up. `ask_all` goes on to ask for the other tags in later turns.
    `answers` says how many colours there are.
    """
    if length < 32:
        raise ValueError(f"length is {length}; give at least 32, which holds the four tags.")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; it goes from 0, the start, to 1, the end.")
    if not 2 <= answers <= len(VALUES):
        raise ValueError(f"answers is {answers}; give 2 to {len(VALUES)}.")
    if hay is not None:
        measure = hay.measure
    size_of = cache(measure)

    def plan(random: Generator, split: Split) -> Plan:
        pairs = combinations(len(KEYS), answers, split)
        asked, value = pairs[random.integers(len(pairs))]
        known = combinations(len(KEYS), answers, "train")
        said = {asked: value}
        for other in range(len(KEYS)):
            if other != asked:
                values = [v for k, v in known if k == other]
                said[other] = values[random.integers(len(values))]
        facts = [fact(key, value) for key, value in said.items()]
        facts += [_untagged(random, answers) for _ in range(distractors)]
        sentences: list[str] = []
        size = sum(map(size_of, facts))
        while size < length:
            sentences.append(hay.draw(random, split) if hay else _made_up(random, split))
            size += size_of(sentences[-1])
        # Depth counts sentences of hay; the other facts fall anywhere.
        where = float(random.random()) if depth is None else depth
        at = round(where * len(sentences))
        places = [at, *random.integers(0, len(sentences) + 1, size=len(facts) - 1).tolist()]
        text = " ".join(_inserted(sentences, facts, places, random))
        answer = VALUES[value]
        truth = {
            "answer": answer,
            "others": [v for v in VALUES[:answers] if v != answer],
            "key": KEYS[asked],
            "depth": text.index(facts[0]) / (len(text) - len(facts[0])),
            "length": size,
        }
        rest = random.permutation(list(said)[1:]).tolist() if ask_all else []
        return Plan(
            question=question(KEYS[asked]),
            answer=pair(asked, value),
            truth=truth,
            scorer="contains",
            facts=text,
            splits_by=None,
            follow_ups=tuple((question(KEYS[key]), pair(key, said[key])) for key in rest),
        )

    return World(
        name=f"needle{length}",
        category="long_text",
        plan=plan,
        show=_show,
        find_prior=lambda split: prior(answers, split),
    )


def question(key: str) -> str:
    return f"Which colour is tagged {key}?"


def pair(key: int, value: int) -> str:
    """Key and colour side by side, in the text and in the answer: who has said the key finds what stood behind it."""
    return f"{KEYS[key]} {VALUES[value]}"


def fact(key: int, value: int) -> str:
    return f"Tag {pair(key, value)}."


def prior(answers: int, split: Split) -> Prior:
    """Who sees the key knows which colours it may have, each equally likely."""
    pairs = combinations(len(KEYS), answers, split)
    shares = [sum(column == value for _, column in pairs) / len(pairs) for value in range(answers)]
    best = max(range(answers), key=shares.__getitem__)
    nats = [math.log(sum(row == key for row, _ in pairs)) for key in range(len(KEYS))]
    return Prior(answer=VALUES[best], score=shares[best], nats=sum(nats) / len(nats))


class Hay:
    """Sentences of given prose. Each is shown in one split only."""

    def __init__(self, prose: Sequence[str], measure: Callable[[str], int] = count_words) -> None:
        self.measure = measure
        taken = re.compile(rf"\b(?:{'|'.join(KEYS)})\b", re.IGNORECASE)
        cut = {" ".join(s.split()) for text in prose for s in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)}
        sentences = sorted(s for s in cut if s and not taken.search(s) and measure(s) <= 100)
        self.by_split: dict[Split, list[str]] = {
            split: [s for s in sentences if belongs(s.encode(), split)]
            for split in ("train", "calibration", "heldout", "novel")
        }
        fewest = min(map(len, self.by_split.values()))
        if fewest < 20:
            raise ValueError(
                f"the prose gives a split only {fewest} sentences (of at most 100 words or tokens, without {', '.join(KEYS)}); "
                "give more prose, or none and sentences are made up."
            )

    def draw(self, random: Generator, split: Split) -> str:
        sentences = self.by_split[split]
        return sentences[random.integers(len(sentences))]


def _made_up(random: Generator, split: Split) -> str:
    while True:
        made = sentence(random)
        if belongs(made.encode(), split):
            return made


def _untagged(random: Generator, answers: int) -> str:
    """A colour in the same kind of sentence, but of a thing that is no tag."""
    thing = ("door", "coat", "boat", "kettle")[random.integers(4)]
    return f"The {thing} {('is', 'was')[random.integers(2)]} {VALUES[random.integers(answers)]}."


def _inserted(hay: Sequence[str], facts: Sequence[str], places: Sequence[int], random: Generator) -> list[str]:
    """Fact i before sentence places[i]; facts at one place in any order."""
    order: list[int] = random.permutation(len(facts)).tolist()
    at: dict[int, list[str]] = {}
    for i in order:
        at.setdefault(places[i], []).append(facts[i])
    return [s for i in range(len(hay) + 1) for s in (*at.get(i, ()), *hay[i : i + 1])]


def _show(text: str, random: Generator) -> tuple[ContentPart, ...]:
    return (Text(text + "\n\n"),)
