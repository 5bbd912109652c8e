"""What every scorer is: (example, answers, resources) -> one Score for each answer; rewards and benchmarks call the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from qvl.prompt.example import Example
from qvl.scoring.truth import Truth

ScorePath = Literal["rule", "judge", "failed"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one answer earns, and how that was found."""

    value: float
    """From 0 to 1."""
    extracted: str | None
    """What was read out of the answer; None when nothing was."""
    path: ScorePath
    """Who gave the value: a rule, a judge, or nobody (`failed`: the answer could not be read; the value is 0)."""
    reason: str = ""
    """One sentence where the path is `failed` or `judge`; a rule's value needs none."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What scorers that are more than a rule may use. Rules need none of it."""

    judge: object | None = None
    """A client of a model that judges answers; no scorer takes one yet."""
    sandbox: object | None = None
    """A place to run an answer's code; no scorer takes one yet."""


class Scorer(Protocol):
    def __call__(self, example: Example, answers: Sequence[str], resources: Resources) -> list[Score]:
        """One Score for each answer, in order. ValueError where the example's truth lacks what the scorer needs; never for an answer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A pure function of an answer and a truth, as a Scorer."""

    value: Callable[[str, Truth], float]
    """From 0 to 1; 0 for an answer that cannot be read."""
    extract: Callable[[str, Truth], str | None]
    """What `value` reads in the answer, for people; None when it reads nothing."""
    reads: str
    """What that is, in words."""

    def __call__(self, example: Example, answers: Sequence[str], resources: Resources) -> list[Score]:
        return [self._score(answer, example.truth) for answer in answers]

    def _score(self, answer: str, truth: Truth) -> Score:
        value, extracted = self.value(answer, truth), self.extract(answer, truth)
        if extracted is not None:
            return Score(value=value, extracted=extracted, path="rule")
        return Score(value=value, extracted=None, path="failed", reason=f"The answer does not give {self.reads}.")
