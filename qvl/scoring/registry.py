"""Every scorer by its name: `score_answers(example, answers)` gives each answer a Score between 0 and 1, whatever it says."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from qvl.prompt.example import Example
from qvl.scoring import places, times, words
from qvl.scoring.score import Resources, Rule, Score, Scorer
from qvl.scoring.truth import Truth

Kind = TypeVar("Kind")

_WORDS = "a finished answer after its reasoning"
_SHORT = "one short answer"
_NUMBER = "one number"

RULES: dict[str, Rule] = {
    "exact": Rule(value=words.exact, extract=words.read_short, reads=_SHORT),
    "contains": Rule(value=words.contains, extract=words.read_final, reads=_WORDS),
    "text": Rule(value=words.text, extract=words.read_final, reads=_WORDS),
    "choice": Rule(value=words.choice, extract=words.read_choice, reads="one of the truth's letters"),
    "number": Rule(value=words.number, extract=words.read_number, reads=_NUMBER),
    "count": Rule(value=words.count, extract=words.read_number, reads=_NUMBER),
    "iou": Rule(value=places.iou, extract=places.read_box, reads="one well-formed box"),
    "boxes_f1": Rule(value=places.boxes_f1, extract=places.read_list, reads="a list of boxes"),
    "point_in_box": Rule(value=places.point_in_box, extract=places.read_point, reads="one well-formed point"),
    "temporal": Rule(value=times.temporal, extract=times.read_time, reads="one time"),
    "temporal_iou": Rule(
        value=times.temporal_iou, extract=times.read_span, reads="one span from a time to a later one"
    ),
}
"""`value` takes the model's answer, thought included, and the truth. An answer that cannot be read scores 0; a truth that lacks what the
scorer needs is a ValueError."""

SCORERS: dict[str, Scorer] = dict(RULES)
"""All that may stand as an example's scorer: the rules, and later what asks a judge or runs code."""


def score_answers(example: Example, answers: Sequence[str], resources: Resources | None = None) -> list[Score]:
    """A Score for each answer to the example's question, by the scorer it names."""
    return _known(example.scorer, SCORERS)(example, answers, resources or Resources())


def score(scorer: str, answer: str, truth: Truth) -> float:
    """A rule's value alone, where there is a truth and no example around it."""
    return _known(scorer, RULES).value(answer, truth)


def _known(name: str, there: Mapping[str, Kind]) -> Kind:
    if name not in there:
        raise ValueError(f"there is no scorer {name!r}; choose one of {', '.join(there)}.")
    return there[name]
