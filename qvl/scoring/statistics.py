"""Scores that are counted over numbers: mean relative accuracy, pass@k and pass^k, means with standard errors."""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TypedDict

from qvl.scoring.extract import one_number, short_answer

MRA_THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]


class PassRates(TypedDict):
    pass_at_k: float
    """The chance that one of k samples is correct."""
    pass_hat_k: float
    """The chance that all k samples are correct."""


class MeanError(TypedDict):
    mean: float
    stderr: float
    """Sample standard deviation / sqrt(n); 0 for one value."""
    clustered_stderr: float | None
    """With values of one cluster dependent on each other; 0 for one cluster, None without clusters."""


def mean_relative_accuracy(answer: str, gold: float) -> float:
    """MRA of VSI-Bench: the share of the thresholds .50, .55 ... .95 for which |answer - gold| / gold < 1 - threshold.

    The answer's one number, in digits or in words, with or without a unit; no number, or two, earn 0. A gold of 0 earns 1 for 0 alone.
    """
    said = _measured(answer)
    if said is None or not math.isfinite(said):
        return 0.0
    if gold == 0:
        return float(said == 0)
    change = abs(said - gold) / abs(gold)
    return sum(change < 1 - threshold for threshold in MRA_THRESHOLDS) / len(MRA_THRESHOLDS)


def pass_rates(samples: int, correct: int, k: int) -> PassRates:
    """Unbiased from `correct` of `samples`: pass@k = 1 - C(n-c, k) / C(n, k) (Codex), pass^k = C(c, k) / C(n, k) (tau-bench).

    Whole numbers are divided once, so that nothing overflows or cancels. ValueError unless 0 <= correct <= samples and 1 <= k <= samples.
    """
    if not 0 <= correct <= samples:
        raise ValueError(
            f"{correct} of {samples} samples are correct; 'correct' is a whole number from 0 to 'samples'."
        )
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k} for {samples} samples; 'k' is a whole number from 1 to 'samples'.")
    every = math.comb(samples, k)
    return PassRates(
        pass_at_k=(every - math.comb(samples - correct, k)) / every, pass_hat_k=math.comb(correct, k) / every
    )


def standard_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> MeanError:
    """The mean of the values, its standard error, and that error where values of one cluster (an image, a video) hang together.

    Clustered (Miller, Adding error bars to evals; with the correction for few clusters C / (C - 1) as Inspect computes it):
    sqrt(C / (C - 1) * sum over clusters of (sum of deviations from the mean)^2) / n. With a cluster for each value it is the plain error.
    """
    n = len(values)
    if n == 0 or (clusters is not None and len(clusters) != n):
        raise ValueError(f"there are {n} values; give at least one, and as many clusters as values.")
    mean = math.fsum(values) / n
    deviations = [value - mean for value in values]
    stderr = math.sqrt(math.fsum(d * d for d in deviations) / (n - 1) / n) if n > 1 else 0.0
    if clusters is None:
        return MeanError(mean=mean, stderr=stderr, clustered_stderr=None)
    members: dict[Hashable, list[float]] = defaultdict(list)
    for cluster, deviation in zip(clusters, deviations, strict=True):
        members[cluster].append(deviation)
    count = len(members)
    squares = math.fsum(math.fsum(each) ** 2 for each in members.values())
    return MeanError(
        mean=mean,
        stderr=stderr,
        clustered_stderr=math.sqrt(squares * count / (count - 1)) / n if count > 1 else 0.0,
    )


_UNITS = (
    r"(?:square|cubic)?\s?(?:[cmk]?m|meters?|metres?|ft|feet|in|inch(?:es)?|sq\s?m|s|secs?|seconds?|kg|deg|degrees?)"
)
_MEASURE = re.compile(rf"(?<=\d)\s{{0,2}}{_UNITS}(?:\s?\^\s?\{{?[23]\}}?|[23])?(?![\w^])", re.IGNORECASE)


def _measured(answer: str) -> float | None:
    """The one number of an answer that may write its unit right behind it: 2.5m, 20 m^2, .5."""
    short = short_answer(answer)
    if short is None:
        return None
    short = re.sub(r"(?<![\w.])\.(?=\d)", "0.", unicodedata.normalize("NFKC", short))
    return one_number(_MEASURE.sub(" ", short))
