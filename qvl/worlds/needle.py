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
VALUES = tuple(COLOURS)


def count_words(text: str) -> int:
    return len(text.split())


def tagged(
    length: int = 2048,
    *,
    depth: float | None = None,
    prose: Sequence[str] | None = None,
    measure: Callable[[str], int] = count_words,
    distractors: int = 8,
) -> World:
    """The colour behind one of four tags, each of which is set once; `distractors` sentences name colours without a tag.

    The text is at least `length` long by `measure`: words, of which any tokenizer makes at least as many tokens, or the tokens of your
    own tokenizer. `depth` says where the needle stands, 0 at the start and 1 at the end; without it, anywhere. `prose` is real text to
    hide it in, cut into sentences; without it, sentences are made up. A sentence of the prose is shown in one split only.
    """
    if length < 32:
        raise ValueError(f"length is {length}; give at least 32, which holds the four tags.")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; it goes from 0, the start, to 1, the end.")
    hay = _Hay(prose, measure) if prose is not None else None
    size_of = cache(measure)

    def plan(random: Generator, split: Split) -> Plan:
        pairs = combinations(len(KEYS), len(VALUES), split)
        asked, value = pairs[random.integers(len(pairs))]
        facts = [f"The {KEYS[asked]} tag is {VALUES[value]}."]
        known = combinations(len(KEYS), len(VALUES), "train")
        for other in range(len(KEYS)):
            if other != asked:
                values = [v for k, v in known if k == other]
                facts.append(f"The {KEYS[other]} tag is {VALUES[values[random.integers(len(values))]]}.")
        facts += [_untagged(random) for _ in range(distractors)]
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
            "others": [v for v in VALUES if v != answer],
            "key": KEYS[asked],
            "depth": text.index(facts[0]) / (len(text) - len(facts[0])),
            "length": size,
        }
        return Plan(
            question=question(KEYS[asked]), answer=answer, truth=truth, scorer="exact", facts=text, splits_by=None
        )

    return World(name=f"needle{length}", category="long_text", plan=plan, show=_show, find_prior=prior)


def question(key: str) -> str:
    return f"What colour is the {key} tag?"


def prior() -> Prior:
    """Who sees the key knows which colours it may have, each equally likely."""
    pairs = combinations(len(KEYS), len(VALUES), "train")
    shares = [sum(column == value for _, column in pairs) / len(pairs) for value in range(len(VALUES))]
    best = max(range(len(VALUES)), key=shares.__getitem__)
    nats = [math.log(sum(row == key for row, _ in pairs)) for key in range(len(KEYS))]
    return Prior(answer=VALUES[best], score=shares[best], nats=sum(nats) / len(nats))


class _Hay:
    """Sentences of given prose, by split."""

    def __init__(self, prose: Sequence[str], measure: Callable[[str], int]) -> None:
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


def _untagged(random: Generator) -> str:
    """A colour in the same kind of sentence, but of a thing that is no tag."""
    thing = ("door", "coat", "boat", "kettle")[random.integers(4)]
    return f"The {thing} {('is', 'was')[random.integers(2)]} {VALUES[random.integers(len(VALUES))]}."


def _inserted(hay: Sequence[str], facts: Sequence[str], places: Sequence[int], random: Generator) -> list[str]:
    """Fact i before sentence places[i]; facts at one place in any order."""
    order: list[int] = random.permutation(len(facts)).tolist()
    at: dict[int, list[str]] = {}
    for i in order:
        at.setdefault(places[i], []).append(facts[i])
    return [s for i in range(len(hay) + 1) for s in (*at.get(i, ()), *hay[i : i + 1])]


def _show(text: str, random: Generator) -> tuple[ContentPart, ...]:
    return (Text(text + "\n\n"),)
