"""The rows of `qvl score` for places and times: a row's input in, the scorer's value out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from qvl.scoring.boxes3d import OrientedBox, box3d_iou
from qvl.scoring.detection import Found, Order, Truth, average_precision
from qvl.scoring.places import labelled_boxes, overlap, spoken_point
from qvl.scoring.tables import teds
from qvl.scoring.times import span_iou

Input = Mapping[str, Any]


def _map(row: Input) -> dict[str, Any]:
    num_images, num_classes = _count(row, "images", least=0), _count(row, "classes", least=0)
    truth = [
        Truth(image, kind, _corners(box))
        for image, kind, *box in _detections(row, "truth", (6,), num_images)
        if 0 <= kind < num_classes or _wrong(row, "truth", f"classes from 0 to {num_classes - 1}")
    ]
    if any(t.box[0] > t.box[2] or t.box[1] > t.box[3] for t in truth):
        _wrong(row, "truth", "boxes with x1 <= x2 and y1 <= y2")
    order: Order = row.get("order", "score")
    lengths = (6, 7) if order == "listed" else (7,)
    found = [
        Found(image, kind, _corners(box), box[4] if len(box) > 4 else 1.0)
        for image, kind, *box in _detections(row, "found", lengths, num_images)
    ]
    limit = _count(row, "max_detections", least=1) if "max_detections" in row else 100
    return asdict(average_precision(truth, found, num_classes=num_classes, order=order, max_detections=limit))


def _box3d_iou(row: Input) -> float:
    return box3d_iou(_oriented(row, "a"), _oriented(row, "b"))


def _teds(row: Input) -> dict[str, float]:
    value = teds(_text(row, "answer"), _text(row, "gold"))
    return {"teds": value.teds, "structure": value.structure}


def _temporal_iou(row: Input) -> float:
    start, end = _numbers(row, "span", 2)
    if not start < end:
        _wrong(row, "span", "[start, end] in seconds with start < end")
    return span_iou(_text(row, "answer"), (start, end))


def _read_boxes(row: Input) -> list[list[str | float]]:
    return labelled_boxes(_text(row, "answer"))


def _box_iou(row: Input) -> float:
    return overlap(_numbers(row, "a", 4), _numbers(row, "b", 4))


def _point_in_box(row: Input) -> float:
    """1 if the one point of the answer lies in the box, edges included."""
    x1, y1, x2, y2 = _numbers(row, "box", 4)
    point = spoken_point(_text(row, "answer"))
    return float(point is not None and x1 <= point[0] <= x2 and y1 <= point[1] <= y2)


# ---- reading rows -------------------------------------------------------------------------------------------------


def _needed(row: Input, key: str, expected: str) -> Any:
    if key not in row:
        raise ValueError(f"the input has no {key!r}; expected {expected}.")
    return row[key]


def _wrong(row: Input, key: str, expected: str) -> NoReturn:
    said = repr(row[key])
    raise ValueError(f"the input's {key!r} is {said if len(said) <= 80 else said[:77] + '...'}; expected {expected}.")


def _text(row: Input, key: str) -> str:
    value = _needed(row, key, "a text")
    return value if isinstance(value, str) else _wrong(row, key, "a text")


def _numbers(row: Input, key: str, length: int) -> tuple[float, ...]:
    expected = f"{length} finite numbers"
    value = _needed(row, key, expected)
    return tuple(map(float, value)) if _is_numbers(value, length) else _wrong(row, key, expected)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_numbers(value: Any, *lengths: int) -> bool:
    return isinstance(value, Sequence) and len(value) in lengths and all(map(_is_number, value))


def _count(row: Input, key: str, *, least: int) -> int:
    expected = f"a whole number from {least}"
    value = _needed(row, key, expected)
    if not _is_number(value) or value != int(value) or value < least:
        _wrong(row, key, expected)
    return int(value)


def _corners(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = map(float, numbers[:4])
    return x1, y1, x2, y2


def _detections(row: Input, key: str, lengths: tuple[int, ...], num_images: int) -> list[Any]:
    """[image, class, x1, y1, x2, y2(, score)] each, image and class as whole numbers."""
    form = "[image, class, x1, y1, x2, y2" + (", score]" if 7 in lengths else "]")
    expected = f"a list of {form} with finite numbers and images from 0 to {num_images - 1}"
    items = _needed(row, key, expected)
    if not isinstance(items, Sequence) or isinstance(items, str):
        _wrong(row, key, expected)
    for item in items:
        if not _is_numbers(item, *lengths) or item[0] != int(item[0]) or item[1] != int(item[1]):
            _wrong(row, key, expected)
        if not 0 <= item[0] < num_images:
            _wrong(row, key, expected)
    return [[int(item[0]), int(item[1]), *item[2:]] for item in items]


def _oriented(row: Input, key: str) -> OrientedBox:
    """Nine numbers, three times three, or an object with centre, size and radians."""
    expected = "centre, size and radians about x, y, z: nine finite numbers, or an object with three of each"
    value = _needed(row, key, expected)
    if isinstance(value, Mapping):
        names = (("centre", "center"), ("size",), ("radians", "angles", "rotation"))
        value = [next((value[name] for name in these if name in value), ()) for these in names]
    if isinstance(value, Sequence) and len(value) == 3 and all(_is_numbers(part, 3) for part in value):
        value = [number for part in value for number in part]
    if not _is_numbers(value, 9):
        _wrong(row, key, expected)
    a, b, c, d, e, f, g, h, i = map(float, value)
    return OrientedBox((a, b, c), (d, e, f), (g, h, i))


ROWS: dict[str, Callable[[Input], Any]] = {
    "map": _map,
    "box3d_iou": _box3d_iou,
    "teds": _teds,
    "temporal_iou": _temporal_iou,
    "read_boxes": _read_boxes,
    "box_iou": _box_iou,
    "point_in_box": _point_in_box,
}
"""Scorer -> function of a row's input. An answer never raises; an input without what the scorer needs is a ValueError of one sentence."""
