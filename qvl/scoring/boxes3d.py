"""Oriented 3D boxes with nine degrees of freedom: read from an answer, and their exact overlap by clipping."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qvl.prompt.coordinates import Box3D, read_boxes
from qvl.scoring.extract import final_text


@dataclass(frozen=True)
class OrientedBox:
    """A box in the camera's frame.

    It is turned about the camera's x axis, then its y axis, then its z axis, none of which turn along: R = Rz Ry Rx, as the official
    drawing code does.
    """

    centre: tuple[float, float, float]
    """Metres."""
    size: tuple[float, float, float]
    """Metres along the box's own x, y and z."""
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Radians about x, y and z."""

    def rotation(self) -> np.ndarray:
        """(3, 3), from the box's own axes to the camera's."""
        (sx, sy, sz), (cx, cy, cz) = ([f(angle) for angle in self.angles] for f in (math.sin, math.cos))
        about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        return about_z @ about_y @ about_x

    @property
    def volume(self) -> float:
        return self.size[0] * self.size[1] * self.size[2]


def box3d_iou(one: OrientedBox, two: OrientedBox) -> float:
    """Intersection over union of the two volumes, from 0 to 1. A size that is not above 0, or a number that is not finite, gives 0."""
    numbers = (*one.centre, *one.size, *one.angles, *two.centre, *two.size, *two.angles)
    if not all(map(math.isfinite, numbers)) or min(*one.size, *two.size) <= 0:
        return 0.0
    volumes = one.volume, two.volume
    if math.dist(one.centre, two.centre) * 2 >= math.hypot(*one.size) + math.hypot(*two.size):
        return 0.0
    if not all(math.isfinite(volume) and volume > 0 for volume in volumes):
        return 0.0
    if volumes[0] > volumes[1]:  # the smaller is the measure, and the value is the same whoever comes first
        one, two, volumes = two, one, volumes[::-1]
    shared = min(_shared_with_unit_cube(one, two) * volumes[0], *volumes)
    return max(0.0, min(1.0, shared / (volumes[0] + volumes[1] - shared)))


def read_boxes3d(answer: str) -> list[tuple[str, OrientedBox]]:
    """Label ("" where there is none) and box of every `bbox_3d` in an answer, its thought not counted.

    The format's last three numbers are angles about x, y and z in units of pi: 1.0 is half a turn.
    """
    final = final_text(answer)
    items = [item for item in read_boxes(final or "") if isinstance(item, Box3D)]
    return [(item.label or "", from_report(item)) for item in items]


def from_report(box: Box3D) -> OrientedBox:
    a, b, c = (angle * math.pi for angle in box.angles)
    return OrientedBox(box.center, box.size, (a, b, c))


# ---- clipping -----------------------------------------------------------------------------------------------------

_CORNERS = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
_FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))

Polygon = list[Sequence[float]]


def _shared_with_unit_cube(one: OrientedBox, two: OrientedBox) -> float:
    """The share of `one` that lies in `two`. In `one`'s own frame and units it is the cube from -0.5 to 0.5, and `two` a slanted box."""
    turn = one.rotation().T
    corners = (_CORNERS * two.size) @ (turn @ two.rotation()).T + turn @ np.subtract(two.centre, one.centre)
    corners = (corners / one.size).tolist()
    if not all(math.isfinite(value) for corner in corners for value in corner):
        return 0.0
    slack = 1e-13 * max(1.0, *(abs(value) for corner in corners for value in corner))
    faces: list[Polygon] = [[corners[i] for i in face] for face in _FACES]
    for axis in range(3):
        for sign in (1.0, -1.0):
            faces = _clipped(faces, axis, sign, slack)
    return _volume(faces)


def _clipped(faces: list[Polygon], axis: int, sign: float, slack: float) -> list[Polygon]:
    """What lies at sign * x[axis] <= 0.5 of a convex solid, given and returned as its faces; none when nothing is left."""

    def height(point: Sequence[float]) -> float:
        value = sign * point[axis] - 0.5
        return 0.0 if abs(value) <= slack else value

    heights = [[height(point) for point in face] for face in faces]
    if not any(value > 0 for those in heights for value in those):
        return faces
    if not any(value < 0 for those in heights for value in those):
        return []
    kept: list[Polygon] = []
    rim: Polygon = []
    for face, those in zip(faces, heights, strict=True):
        points: Polygon = []
        for i, (point, value) in enumerate(zip(face, those, strict=True)):
            if value <= 0:
                points.append(point)
            if value == 0:
                rim.append(point)
            following, after = face[(i + 1) % len(face)], those[(i + 1) % len(face)]
            if value * after < 0:
                part = value / (value - after)
                cut = [a + part * (b - a) for a, b in zip(point, following, strict=True)]
                cut[axis] = sign * 0.5
                points.append(cut)
                rim.append(cut)
        if len(points) >= 3 and any(value < 0 for value in those):
            kept.append(points)
    if len(rim) >= 3:
        kept.append(_around(rim, axis))
    return kept


def _around(points: Polygon, axis: int) -> Polygon:
    """Points of a plane across `axis` in order around their middle."""
    u, v = (other for other in range(3) if other != axis)
    middle_u, middle_v = (sum(point[k] for point in points) / len(points) for k in (u, v))
    return sorted(points, key=lambda point: math.atan2(point[v] - middle_v, point[u] - middle_u))


def _volume(faces: list[Polygon]) -> float:
    """The sum of the pyramids from a point within to each face; no face needs an orientation."""
    if len(faces) < 4:
        return 0.0
    middle = np.mean([point for face in faces for point in face], axis=0)
    total = 0.0
    for face in faces:
        points = np.array(face) - middle
        area = np.cross(points[1:-1] - points[0], points[2:] - points[0]).sum(axis=0)
        total += abs(float(area @ points[0])) / 6
    return total
