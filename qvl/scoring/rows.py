"""Scorers of `qvl score`: each reads a JSON object, the row's input, and gives a JSON value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qvl.core.config import near_miss
from qvl.outside.sandbox import SandboxError
from qvl.scoring import rows_places, rows_run, rows_text
from qvl.scoring.score import ScorePath

RowScorer = Callable[[Mapping[str, Any]], Any]
ROW_SCORERS: dict[str, RowScorer] = rows_text.ROWS | rows_places.ROWS | rows_run.ROWS


@dataclass(frozen=True, kw_only=True)
class RowScore:
    """What became of one row."""

    id: Any
    value: Any
    """The scorer's; None where there is none."""
    path: ScorePath
    reason: str = ""
    """One sentence where the path is `failed`."""


def score_row(row: Any) -> RowScore:
    """The score of {"id", "scorer", "input"}. A row that cannot be scored is `failed` with a reason; nothing raises."""
    if not isinstance(row, Mapping):
        return RowScore(id=None, value=None, path="failed", reason=f"the row is a {type(row).__name__}, no object.")
    id, name, given = row.get("id"), row.get("scorer"), row.get("input")
    if not isinstance(name, str) or name not in ROW_SCORERS:
        reason = f"there is no scorer {name!r}{near_miss(str(name), ROW_SCORERS)}."
        return RowScore(id=id, value=None, path="failed", reason=reason)
    if not isinstance(given, Mapping):
        reason = f"`input` is a {type(given).__name__}; an object was expected."
        return RowScore(id=id, value=None, path="failed", reason=reason)
    try:
        value = ROW_SCORERS[name](given)
    except (ValueError, SandboxError) as error:
        return RowScore(id=id, value=None, path="failed", reason=str(error))
    if value is None:
        return RowScore(id=id, value=None, path="failed", reason="nothing could be read in the answer.")
    return RowScore(id=id, value=value, path="rule")
