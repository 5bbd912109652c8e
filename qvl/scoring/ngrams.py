"""Scores captions by the words they share with golds: ROUGE-L of one, CIDEr-D over a corpus."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TypedDict

from rapidfuzz.distance import LCSseq

from qvl.scoring.extract import final_text

MAX_N = 4
SIGMA = 6.0
"""Of the Gaussian penalty on the difference in length, in words."""

Ngram = tuple[str, ...]


class Cider(TypedDict):
    mean: float
    each: dict[str, float]
    """By id; from 0 to 10."""


def rouge_l(answer: str, gold: str) -> float:
    """F1 of the longest common subsequence of words, as rouge_score computes it without stemming; words are split at spaces, lower case."""
    said, wanted = _words(answer), gold.lower().split()
    if not said or not wanted:
        return 0.0
    number = {word: i for i, word in enumerate({*said, *wanted})}
    common = LCSseq.similarity([number[word] for word in said], [number[word] for word in wanted])
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def cider(answers: Mapping[str, str], golds: Mapping[str, Sequence[str]]) -> Cider:
    """CIDEr-D over a corpus: of each id one answer and its golds, and the mean. Words are split at spaces, lower case.

    As pycocoevalcap: n-grams of 1 to 4 words, each weighted by its count * log(ids / ids whose golds hold it); the cosine with each gold,
    counts clipped to the gold's, times exp(-(difference in length)^2 / 2 sigma^2); the mean over n and golds, times 10. So the frequencies
    are those of the golds given, and a corpus of one id scores 0. ValueError unless both have the same ids and each id has a gold.
    """
    if answers.keys() != golds.keys() or not answers:
        odd = sorted(answers.keys() ^ golds.keys())
        raise ValueError(
            f"'answers' and 'golds' have different ids or none: {odd[:5]}; give each id an answer and golds."
        )
    if empty := [id for id, texts in golds.items() if not texts]:
        raise ValueError(f"'golds' has no text for the ids {empty[:5]}; give each at least one.")
    counts = {id: [_ngrams(gold.lower().split()) for gold in texts] for id, texts in golds.items()}
    frequency = Counter(ngram for of_id in counts.values() for ngram in set().union(*of_id))
    log_ids = math.log(len(golds))

    def vector(ngrams: Counter[Ngram]) -> "_Vector":
        return _Vector(
            {ngram: n * (log_ids - math.log(max(1, frequency[ngram]))) for ngram, n in ngrams.items()}, ngrams
        )

    each: dict[str, float] = {}
    for id, answer in answers.items():
        said = vector(_ngrams(_words(answer)))
        each[id] = 10 * sum(said.likeness(vector(gold)) for gold in counts[id]) / len(counts[id])
    return Cider(mean=math.fsum(each.values()) / len(each), each=each)


class _Vector:
    """The weighted n-grams of one text."""

    def __init__(self, weights: dict[Ngram, float], counts: Counter[Ngram]) -> None:
        self.weights = weights
        squares: dict[int, float] = defaultdict(float)
        for ngram, weight in weights.items():
            squares[len(ngram)] += weight**2
        self.norms = {n: math.sqrt(square) for n, square in squares.items()}
        self.length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        """In pairs of words, as pycocoevalcap counts it."""

    def likeness(self, gold: "_Vector") -> float:
        dots: dict[int, float] = defaultdict(float)
        for ngram, weight in self.weights.items():
            there = gold.weights.get(ngram, 0.0)
            dots[len(ngram)] += min(weight, there) * there
        cosines = [dot / (self.norms[n] * gold.norms[n]) for n, dot in dots.items() if dot > 0]
        penalty = math.exp(-((self.length - gold.length) ** 2) / (2 * SIGMA**2))
        return penalty * sum(cosines) / MAX_N


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _words(answer: str) -> list[str]:
    """Of what is said after the thought; none where the thought never ends."""
    return (final_text(answer) or "").lower().split()
