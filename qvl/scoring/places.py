"""Scorers of boxes and points, in thousandths of the picture; a malformed box earns nothing."""

import re
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from qvl.prompt.coordinates import SCALE, Box, Boxes, Place, Point, read_boxes, to_json
from qvl.scoring.extract import final_text, normalised
from qvl.scoring.truth import Truth, needed, numbers

MOST = 300
"""Boxes of one answer that are matched; what goes beyond counts as wrong."""

Corners = Sequence[float]


def overlap(one: Corners, two: Corners) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2; 0 when either is empty."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(one) + _area(two) - shared)


def iou(answer: str, truth: Truth) -> float:
    """Overlap of the one box in the answer with truth["box"]. Two different boxes, or any malformed one, score 0."""
    right = _right_box(truth)
    found = _places(answer)
    if found is None or found.problems or not all(isinstance(item, Box) and is_sound(item) for item in found):
        return 0.0
    distinct = {item.numbers for item in found}
    return overlap(distinct.pop(), right) if len(distinct) == 1 else 0.0


def boxes_f1(answer: str, truth: Truth) -> float:
    """F1 of the answer's boxes against truth["boxes"], matched one to one at an overlap of truth["overlap"] (0.5 without).

    With truth["labels"], one for each box, labels must be equal too. Malformed and repeated boxes are false ones. A list that was cut
    off keeps its complete boxes. Where there is nothing to find, only a list that says so, `[]`, is right.
    """
    rights = [numbers(box, 4, "boxes") for box in needed(truth, "boxes")]
    labels = truth.get("labels")
    if labels is not None and len(labels) != len(rights):
        raise ValueError(f"the truth has {len(rights)} boxes and {len(labels)} labels; give one label for each box.")
    found = _places(answer)
    if found is None:
        return 0.0
    if not rights:
        return float(_says_none(answer, found))
    sound = [item for item in found if isinstance(item, Box) and is_sound(item)][:MOST]
    if not sound:
        return 0.0
    least = truth.get("overlap", 0.5)
    worth = np.zeros((len(sound), len(rights)))
    for i, box in enumerate(sound):
        for j, right in enumerate(rights):
            is_same = labels is None or normalised(box.label or "") == normalised(labels[j])
            value = overlap(box.numbers, right)
            # A match counts one; overlap only breaks ties, so that as many boxes are matched as can be.
            worth[i, j] = 1 + value / 1e6 if is_same and value >= least and value > 0 else 0
    chosen = linear_sum_assignment(worth, maximize=True)
    matches = int((worth[chosen] > 0).sum())
    return 2 * matches / (len(found) + len(found.problems) + len(rights))


def point_in_box(answer: str, truth: Truth) -> float:
    """1 if the one point of the answer lies in truth["box"], edges included."""
    x1, y1, x2, y2 = _right_box(truth)
    found = _places(answer)
    if found is None or found.problems or not all(isinstance(item, Point) for item in found):
        return 0.0
    distinct = {item.numbers for item in found}
    if len(distinct) != 1:
        return 0.0
    x, y = distinct.pop()
    return float(max(x1, 0) <= x <= min(x2, SCALE) and max(y1, 0) <= y <= min(y2, SCALE))


def labelled_boxes(answer: str) -> list[list[str | float]]:
    """[label, x1, y1, x2, y2] of every box in the answer in order, edges as they are written; the label is "" where there is none."""
    found = read_boxes(final_text(answer) or "", lenient=True)
    return [[item.label or "", *item.numbers] for item in found if isinstance(item, Box)]


def spoken_point(answer: str) -> tuple[float, float] | None:
    """The one point of the answer: its `point_2d`, else a "coordinate" as the tool for screens takes it, else a lone pair in brackets.

    None when there is none, or two that differ.
    """
    final = final_text(answer) or ""
    found = {(item.x, item.y) for item in read_boxes(final) if isinstance(item, Point)}
    for pattern in (_COORDINATE, _PAIR):
        found = found or {(float(match[1]), float(match[2])) for match in pattern.finditer(final)}
    return found.pop() if len(found) == 1 else None


_SPOKEN = r"(-?\d{1,6}(?:\.\d{1,10})?)"
_COORDINATE = re.compile(
    rf"[\"'](?:coordinate|point|click|position)[\"']\s{{0,3}}:\s{{0,3}}[\[(]\s{{0,3}}{_SPOKEN}\s{{0,3}},\s{{0,3}}{_SPOKEN}\s{{0,3}}[\])]"
)
_PAIR = re.compile(rf"[\[(]\s{{0,3}}{_SPOKEN}\s{{0,3}},\s{{0,3}}{_SPOKEN}\s{{0,3}}[\])]")


# ---- what these read, for people -----------------------------------------------------------------------------------


def read_box(answer: str, truth: Truth) -> str | None:
    found = _places(answer)
    if found is None or found.problems or not all(isinstance(item, Box) and is_sound(item) for item in found):
        return None
    return _only(found)


def read_point(answer: str, truth: Truth) -> str | None:
    found = _places(answer)
    if found is None or found.problems or not all(isinstance(item, Point) for item in found):
        return None
    return _only(found)


def read_list(answer: str, truth: Truth) -> str | None:
    """The sound boxes, at most MOST of them; `[]` where the answer says that there are none."""
    found = _places(answer)
    sound = [] if found is None else [item for item in found if isinstance(item, Box) and is_sound(item)][:MOST]
    return _written(sound) if sound or _says_none(answer, found) else None


def _only(found: Boxes) -> str | None:
    distinct = {item.numbers for item in found}
    return _written(list(found)[:1]) if len(distinct) == 1 else None


def _written(items: Sequence[Place]) -> str:
    return to_json(Boxes(items=tuple(items), space="relative1000"))


# ---- helpers ------------------------------------------------------------------------------------------------------


def is_sound(box: Box) -> bool:
    """Left before right, top before bottom, all within the picture."""
    return 0 <= box.x1 < box.x2 <= SCALE and 0 <= box.y1 < box.y2 <= SCALE


def _places(answer: str) -> Boxes | None:
    final = final_text(answer)
    return None if final is None else read_boxes(final)


def _says_none(answer: str, found: Boxes | None) -> bool:
    is_empty = found is not None and not len(found) and not found.problems
    return is_empty and (final_text(answer) or "").strip("`json\n ") == "[]"


def _right_box(truth: Truth) -> tuple[float, ...]:
    corners = numbers(needed(truth, "box"), 4, "box")
    if not (0 <= corners[0] < corners[2] <= SCALE and 0 <= corners[1] < corners[3] <= SCALE):
        raise ValueError(f"the truth's 'box' is {list(corners)}; expected 0 <= x1 < x2 <= 1000 and the same of y.")
    return corners


def _area(box: Corners) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
