"""What each patch of a made picture shows: exact labels for teaching a vision tower densely."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image as Raster

from qvl.worlds.clips import Clip
from qvl.worlds.digits import Written
from qvl.worlds.paint import SHAPES, coverage
from qvl.worlds.scans import scans
from qvl.worlds.shapes import NAMES, Thing

CELLS = 4
"""A patch's mask has so many cells a side."""
LEAST = 2
"""Cells that an object must cover in a patch to be its label."""


@dataclass(frozen=True, kw_only=True)
class PatchLabels:
    """Of P patches, frame after frame, rows of patches from the top left (not in merge-block order)."""

    thing_P: np.ndarray
    """bool: a shape is seen here."""
    written_P: np.ndarray
    """bool: a handwritten digit is."""
    colour_P: np.ndarray
    """Number in NAMES, where `thing_P`."""
    shape_P: np.ndarray
    """Number in SHAPES, where `thing_P`."""
    digit_P: np.ndarray
    """0 to 9, where `written_P`."""
    box_P4: np.ndarray
    """x1, y1, x2, y2 of the object as parts of the picture, where `thing_P` or `written_P`."""
    edge_P4: np.ndarray
    """bool: the object's outermost patches on the left, the top, the right and the bottom. Only these see the edge itself."""
    centre_P: np.ndarray
    """bool: an object's middle lies in this patch."""
    mask_P44: np.ndarray
    """bool: the 4 x 4 cells of the patch that any object covers."""


def patch_labels(facts: object, side: int) -> PatchLabels:
    """Labels of a plan's facts (things, a digit, or a clip with a frame for each slice) on a grid of side x side patches a frame."""
    if isinstance(facts, Clip):
        spans = tuple(zip(facts.things, facts.first, facts.last, strict=True))
        frames = [[t for t, a, b in spans if a < 2 * i + 2 and b > 2 * i] for i in range(len(facts.marks))]
        return _joined([_of_things(things, side) for things in frames])
    if isinstance(facts, Written):
        return _of_digit(facts, side)
    if isinstance(facts, tuple) and all(isinstance(thing, Thing) for thing in facts):
        return _of_things(facts, side)
    raise ValueError(
        f"a {type(facts).__name__} has no patch labels; give the facts of a shapes, digits or clips world."
    )


def _of_things(things: Sequence[Thing], side: int) -> PatchLabels:
    labels = _empty(side)
    for thing in things:
        cells = side * CELLS
        centres = np.arange(cells, dtype=np.float32) + 0.5
        x, y, long = (v / 1000 * cells for v in (thing.x, thing.y, thing.side))
        cover = _by_patch(coverage(thing.shape, centres - x, centres[:, None] - y, long) > 0.5, side)
        seen_P = _mark(labels, cover, thing.box, side)
        labels.thing_P[seen_P] = True
        labels.colour_P[seen_P] = NAMES.index(thing.colour)
        labels.shape_P[seen_P] = SHAPES.index(thing.shape)
    return labels


def _of_digit(written: Written, side: int) -> PatchLabels:
    labels = _empty(side)
    cells = side * CELLS
    left, top = round(written.x * cells / 1000), round(written.y * cells / 1000)
    long = max(2, round((written.x + written.side) * cells / 1000) - left)
    scan = scans(written.split)[written.digit][written.scan]
    ink = np.asarray(Raster.fromarray(scan).resize((long, long), Raster.Resampling.BILINEAR)) > 0.4
    paper = np.zeros((cells, cells), dtype=bool)
    paper[top : top + long, left : left + long] = ink[: cells - top, : cells - left]
    box = (written.x, written.y, written.x + written.side, written.y + written.side)
    seen_P = _mark(labels, _by_patch(paper, side), box, side)
    labels.written_P[seen_P] = True
    labels.digit_P[seen_P] = written.digit
    return labels


def _empty(side: int) -> PatchLabels:
    number = side * side
    yes_no = [np.zeros(number, dtype=bool) for _ in range(3)]
    numbers = [np.zeros(number, dtype=np.int64) for _ in range(3)]
    return PatchLabels(
        thing_P=yes_no[0],
        written_P=yes_no[1],
        centre_P=yes_no[2],
        colour_P=numbers[0],
        shape_P=numbers[1],
        digit_P=numbers[2],
        box_P4=np.zeros((number, 4), dtype=np.float32),
        edge_P4=np.zeros((number, 4), dtype=bool),
        mask_P44=np.zeros((number, CELLS, CELLS), dtype=bool),
    )


def _mark(labels: PatchLabels, mask_P44: np.ndarray, box: tuple[int, int, int, int], side: int) -> np.ndarray:
    """Writes what all objects share; returns which patches show this one."""
    row, column = (min(side - 1, int((box[i] + box[i + 2]) / 2000 * side)) for i in (1, 0))
    middle = row * side + column
    labels.centre_P[middle] = True
    labels.mask_P44[:] |= mask_P44
    seen_P = mask_P44.sum((1, 2)) >= LEAST
    seen_P[middle] = True  # so that the smallest object has a patch
    labels.box_P4[seen_P] = np.array(box, dtype=np.float32) / 1000
    rows, columns = np.divmod(np.flatnonzero(seen_P), side)
    outermost = (columns.min(), rows.min(), columns.max(), rows.max())
    places = np.stack((columns, rows, columns, rows), axis=1)
    labels.edge_P4[seen_P] = places == outermost
    return seen_P


def _by_patch(cells: np.ndarray, side: int) -> np.ndarray:
    """(side*4, side*4) -> (side*side, 4, 4)."""
    return cells.reshape(side, CELLS, side, CELLS).transpose(0, 2, 1, 3).reshape(side * side, CELLS, CELLS)


def _joined(frames: Sequence[PatchLabels]) -> PatchLabels:
    names = PatchLabels.__dataclass_fields__
    return PatchLabels(**{name: np.concatenate([getattr(frame, name) for frame in frames]) for name in names})
