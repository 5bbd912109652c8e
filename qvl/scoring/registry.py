"""Every scorer by its name: `score("iou", answer, truth)` is between 0 and 1, whatever the answer."""

from collections.abc import Callable, Mapping
from typing import Any

from qvl.scoring import places, times, words

Scorer = Callable[[str, Mapping[str, Any]], float]

SCORERS: dict[str, Scorer] = {
    "exact": words.exact,
    "contains": words.contains,
    "text": words.text,
    "choice": words.choice,
    "number": words.number,
    "count": words.count,
    "iou": places.iou,
    "boxes_f1": places.boxes_f1,
    "point_in_box": places.point_in_box,
    "temporal": times.temporal,
    "temporal_iou": times.temporal_iou,
}
"""Each takes the model's answer, thought included, and the truth. An answer that cannot be read scores 0; a truth that lacks what the
scorer needs is a ValueError."""


def score(scorer: str, answer: str, truth: Mapping[str, Any]) -> float:
    if scorer not in SCORERS:
        raise ValueError(f"there is no scorer {scorer!r}; choose one of {', '.join(SCORERS)}.")
    return SCORERS[scorer](answer, truth)
