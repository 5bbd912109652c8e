"""Two arms over the same seeds: the mean difference, its error, and the smallest difference these seeds could have seen."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from scipy.stats import t as student

LEVEL, POWER = 0.05, 0.8
"""Two-sided level of the test, and how often the smallest difference that counts as visible would be seen."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`arm` less `against` on one probe, seed by seed."""

    probe: str
    arm: str
    against: str
    is_less_better: bool
    arm_mean: float
    against_mean: float
    seeds: int
    difference: float
    error: float | None
    """Standard error of the difference; None for one seed."""
    least_seen: float | None
    """The true difference that these seeds would have seen four times in five."""
    margin: float | None
    """Half the width of the 95% interval: a difference beyond it is seen."""
    without_looking: float | None = None
    """What can be had without any evidence; arms that do no better have not learned the task and tell nothing."""

    @property
    def is_learned(self) -> bool:
        if self.without_looking is None:
            return True
        means = (self.arm_mean, self.against_mean)
        return min(means) < self.without_looking if self.is_less_better else max(means) > self.without_looking

    @property
    def is_seen(self) -> bool:
        return self.margin is not None and abs(self.difference) > self.margin and not self.is_constant

    @property
    def is_constant(self) -> bool:
        """Equal in every seed, as coarse probes may be by chance: there is nothing to judge the difference by."""
        return self.error is not None and self.error < 1e-9

    @property
    def verdict(self) -> str:
        return self._verdict if self.is_learned else f"neither arm learned it; {self._verdict}"

    @property
    def _verdict(self) -> str:
        if self.error is None or self.least_seen is None:
            return f"one seed: {self.arm} less {self.against} is {self.difference:+.3g}, and nothing says how much of it is chance"
        if self.is_seen:
            is_arm = (self.difference < 0) == self.is_less_better
            better = self.arm if is_arm else self.against
            return f"{better} better by {abs(self.difference):.3g} +- {self.error:.2g}"
        if self.is_constant and abs(self.difference) > 1e-9:
            return f"{self.arm} less {self.against} is {self.difference:+.3g} in every seed, and nothing says how much of it is chance"
        if self.is_constant:
            return "the same in every seed"
        return f"no difference seen ({self.difference:+.3g} +- {self.error:.2g}); {self.seeds} seeds would have seen {self.least_seen:.2g}"


def compare(
    probe: str,
    arm: str,
    against: str,
    arm_values: Sequence[float],
    against_values: Sequence[float],
    *,
    is_less_better: bool,
    without_looking: float | None = None,
) -> Difference:
    """Paired over seeds: value i of both arms comes from seed i. A t test, so the differences are held for normal."""
    if len(arm_values) != len(against_values) or not arm_values:
        raise ValueError(
            f"{probe}: {len(arm_values)} values of {arm} came for {len(against_values)} of {against}; give one of each a seed."
        )
    differences = [a - b for a, b in zip(arm_values, against_values, strict=True)]
    count = len(differences)
    error = margin = least_seen = None
    if count > 1:
        error = statistics.stdev(differences) / math.sqrt(count)
        margin = _quantile(1 - LEVEL / 2, count - 1) * error
        least_seen = margin + _quantile(POWER, count - 1) * error
    return Difference(
        probe=probe,
        arm=arm,
        against=against,
        is_less_better=is_less_better,
        arm_mean=statistics.fmean(arm_values),
        against_mean=statistics.fmean(against_values),
        seeds=count,
        difference=statistics.fmean(differences),
        error=error,
        least_seen=least_seen,
        margin=margin,
        without_looking=without_looking,
    )


@cache
def _quantile(share: float, freedom: int) -> float:
    """Of Student's t."""
    return float(student.ppf(share, freedom))
