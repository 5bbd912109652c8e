"""Average precision of detection as COCO defines it, with a pinned order for equal confidences, and a figure that needs no order."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

Order = Literal["score", "listed"]
"""score: the most confident detection first, equal ones by image and then as listed. listed: all are equally confident, which is how a
model that gives no confidence is measured."""

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_AREA = 1e10
"""COCO's range of "all areas" is 0 to this; a wrong detection beyond it, or with one pair of edges inverted, does not count."""

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Truth:
    """An object that is there: image and class from 0, edges x1, y1, x2, y2."""

    image: int
    kind: int
    box: Corners


@dataclass(frozen=True)
class Found:
    """A detection: as a Truth, and how sure the model is."""

    image: int
    kind: int
    box: Corners
    score: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Average precisions from 0 to 1; -1 where there is no truth to find."""

    map: float
    """Mean over classes with a truth and over overlaps .50, .55, ... .95."""
    ap50: float
    ap75: float
    per_class: list[float]


def average_precision(
    truth: Sequence[Truth],
    found: Sequence[Found],
    *,
    num_classes: int,
    order: Order = "score",
    max_detections: int = 100,
) -> Precision:
    """COCO's AP, equal to pycocotools' COCOeval for areas "all": 10 overlaps, 101 recalls, the first `max_detections` of each image and
    class. Detections of a class outside 0 .. num_classes - 1 are rejected.

    With equal confidences the value depends on the order of images (by number) and inside an image (as listed); `tie_free_precision`
    does not.
    """
    if order not in get_args(Order):
        raise ValueError(f"the order is {order!r}; choose one of {', '.join(get_args(Order))}.")
    if order == "listed":
        found = [Found(f.image, f.kind, f.box) for f in found]
    cells = _cells(truth, found, max_detections)
    by_class = [_ranked(cells[kind]) for kind in range(num_classes)]
    return _summary(by_class)


def tie_free_precision(
    truth: Sequence[Truth], found: Sequence[Found], *, num_classes: int, max_detections: int = 100
) -> Precision:
    """AP where all detections enter at once, whatever their confidence: one precision and one recall for a class and an overlap, and the
    area under that step. Matches inside an image are as many as can be, so that no order of images or boxes changes the value (only
    `max_detections` cuts lists as they come).
    """
    cells = _cells(truth, found, max_detections)
    return _summary([_at_once(cells[kind]) for kind in range(num_classes)])


@dataclass(frozen=True)
class _Cell:
    """One image and class: detections in order of confidence and the overlap of each with each truth."""

    scores: np.ndarray
    overlaps: np.ndarray
    """(detections, truths)"""
    in_range: np.ndarray
    """Whether a detection's area counts."""


def _cells(truth: Sequence[Truth], found: Sequence[Found], max_detections: int) -> dict[int, list[_Cell]]:
    """The cells of each class, images in order."""
    rights: dict[tuple[int, int], list[Corners]] = defaultdict(list)
    detections: dict[tuple[int, int], list[Found]] = defaultdict(list)
    for item in truth:
        rights[item.kind, item.image].append(item.box)
    for item in found:
        detections[item.kind, item.image].append(item)
    cells: dict[int, list[_Cell]] = defaultdict(list)
    for key in sorted(rights.keys() | detections.keys()):
        those = sorted(detections[key], key=lambda item: -item.score)[:max_detections]  # sorted is stable
        boxes = np.array([item.box for item in those], dtype=float).reshape(-1, 4)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        cells[key[0]].append(
            _Cell(
                np.array([item.score for item in those], dtype=float),
                overlaps(boxes, np.array(rights[key], dtype=float).reshape(-1, 4)),
                (areas >= 0) & (areas <= MAX_AREA),
            )
        )
    return cells


def overlaps(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Intersection over union of each of `one` (n, 4) with each of `two` (m, 4); 0 where they do not touch, and for empty boxes."""
    size_one, size_two = one[:, 2:] - one[:, :2], two[:, 2:] - two[:, :2]
    # pycocotools keeps corner and size; the same rounding decides at an overlap of exactly a threshold.
    end_one, end_two = one[:, :2] + size_one, two[:, :2] + size_two
    shared = np.minimum(end_one[:, None], end_two[None]) - np.maximum(one[:, None, :2], two[None, :, :2])
    touches = (shared > 0).all(axis=-1)
    shared = np.where(touches, shared[..., 0] * shared[..., 1], 0.0)
    union = size_one.prod(axis=1)[:, None] + size_two.prod(axis=1)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=touches & (union > 0))


def _ranked(cells: Sequence[_Cell]) -> np.ndarray | None:
    """Precision at each overlap and recall (10, 101) of one class; None without a truth."""
    num_truths = sum(cell.overlaps.shape[1] for cell in cells)
    if not num_truths:
        return None
    by_confidence = np.argsort(-np.concatenate([cell.scores for cell in cells]), kind="stable")
    matched = np.concatenate([_greedy(cell) for cell in cells], axis=1)[:, by_confidence]
    counts = matched | np.concatenate([cell.in_range for cell in cells])[by_confidence]
    right, wrong = np.cumsum(matched, axis=1), np.cumsum(counts & ~matched, axis=1)
    curve = np.zeros((len(THRESHOLDS), len(RECALLS)))
    for t in range(len(THRESHOLDS)):
        precision = right[t] / (right[t] + wrong[t] + np.spacing(1))
        best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(right[t] / num_truths, RECALLS, side="left")
        reached = at < len(precision)
        curve[t, reached] = best_from_here[at[reached]]
    return curve


def _greedy(cell: _Cell) -> np.ndarray:
    """Whether each detection finds a truth of its own (10, detections): the most confident chooses first, the one it overlaps most."""
    num_found, num_truths = cell.overlaps.shape
    matched = np.zeros((len(THRESHOLDS), num_found), dtype=bool)
    for t, threshold in enumerate(THRESHOLDS):
        is_free = [True] * num_truths
        for i, row in enumerate(cell.overlaps.tolist()):
            most, chosen = min(threshold, 1 - 1e-10), -1
            for j, value in enumerate(row):
                if is_free[j] and value >= most:  # of equal overlaps the last, as COCOeval
                    most, chosen = value, j
            if chosen >= 0:
                is_free[chosen] = False
                matched[t, i] = True
    return matched


def _at_once(cells: Sequence[_Cell]) -> np.ndarray | None:
    num_truths = sum(cell.overlaps.shape[1] for cell in cells)
    if not num_truths:
        return None
    curve = np.zeros((len(THRESHOLDS), len(RECALLS)))
    num_found = sum(int(cell.in_range.sum()) for cell in cells)
    for t, threshold in enumerate(THRESHOLDS):
        matches = 0
        for cell in cells:
            pairs = csr_matrix(cell.overlaps >= min(threshold, 1 - 1e-10))
            matches += int((maximum_bipartite_matching(pairs, perm_type="column") >= 0).sum())
        if matches:
            curve[t, matches / num_truths >= RECALLS] = matches / num_found
    return curve


def _summary(by_class: Sequence[np.ndarray | None]) -> Precision:
    curves = [curve for curve in by_class if curve is not None]
    per_class = [-1.0 if curve is None else float(np.mean(curve)) for curve in by_class]
    if not curves:
        return Precision(map=-1.0, ap50=-1.0, ap75=-1.0, per_class=per_class)
    all_curves = np.stack(curves)
    mean, ap50, ap75 = (float(np.mean(all_curves[:, which])) for which in (slice(None), 0, 5))
    return Precision(map=mean, ap50=ap50, ap75=ap75, per_class=per_class)
