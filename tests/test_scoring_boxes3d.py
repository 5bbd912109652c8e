"""The overlap of oriented 3D boxes against sampled volumes, a polygon library and the symmetries of a box."""

import math
from typing import Any

import numpy as np
import pytest
import shapely
from shapely.affinity import rotate

from qvl.scoring.boxes3d import OrientedBox, box3d_iou, read_boxes3d
from qvl.scoring.rows_places import ROWS

UNIT = OrientedBox((0, 0, 0), (1, 1, 1))


def random_box(rng: np.random.Generator) -> OrientedBox:
    centre, size, angles = rng.uniform(-0.4, 0.4, 3), rng.uniform(0.3, 2, 3), rng.uniform(-4, 4, 3)
    return OrientedBox(tuple(centre.tolist()), tuple(size.tolist()), tuple(angles.tolist()))


def holds(box: OrientedBox, points: np.ndarray) -> np.ndarray:
    """Whether each of the points (n, 3) is in the box."""
    own = (points - np.array(box.centre)) @ box.rotation()
    return (np.abs(own) <= np.array(box.size) / 2).all(axis=1)


def angles_of(rotation: np.ndarray) -> tuple[float, float, float]:
    """About x, y, z of R = Rz Ry Rx."""
    y = math.asin(max(-1.0, min(1.0, -rotation[2, 0])))
    return math.atan2(rotation[2, 1], rotation[2, 2]), y, math.atan2(rotation[1, 0], rotation[0, 0])


def test_a_box_turns_about_the_fixed_axes_x_then_y_then_z() -> None:
    quarter = math.pi / 2
    box = OrientedBox((0, 0, 0), (1, 1, 1), (quarter, quarter, 0))
    # z goes to -y by the turn about x, and stays there about y; about the box's own axes it would end at x.
    assert box.rotation() @ [0, 0, 1] == pytest.approx([0, -1, 0], abs=1e-12)
    assert box.rotation() @ [0, 1, 0] == pytest.approx([1, 0, 0], abs=1e-12)


def test_the_value_is_the_sampled_volume() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, two = random_box(rng), random_box(rng)
        points = rng.uniform(-2.2, 2.2, (400_000, 3))
        in_one, in_two = holds(one, points), holds(two, points)
        sampled = (in_one & in_two).sum() / (in_one | in_two).sum()
        assert box3d_iou(one, two) == pytest.approx(sampled, abs=0.01)


def test_boxes_that_only_yaw_equal_polygons_times_height() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        (x1, z1, x2, z2), (a, b) = rng.uniform(-0.5, 0.5, 4).tolist(), rng.uniform(-4, 4, 2).tolist()
        one, two = OrientedBox((x1, 0, z1), (1, 2, 0.5), (0, a, 0)), OrientedBox((x2, 0.5, z2), (1.5, 1, 1), (0, b, 0))
        # a turn by +a about y takes z to x: seen as (x, z) it is clockwise
        flat = [
            rotate(
                shapely.box(c[0] - s[0] / 2, c[2] - s[2] / 2, c[0] + s[0] / 2, c[2] + s[2] / 2), -t, use_radians=True
            )
            for c, s, t in ((one.centre, one.size, a), (two.centre, two.size, b))
        ]
        shared = flat[0].intersection(flat[1]).area * 1.0  # heights -1 to 1 and 0 to 1
        assert box3d_iou(one, two) == pytest.approx(shared / (one.volume + two.volume - shared), abs=1e-9)


def test_the_same_box_is_1_however_it_is_written() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        box = random_box(rng)
        (sx, sy, sz), turn = box.size, box.rotation()
        half = turn @ np.diag([-1.0, 1.0, -1.0])  # half a turn about its own y
        quarter = turn @ np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])  # about its own z: x and y change places
        assert box3d_iou(box, box) == pytest.approx(1, abs=1e-9)
        assert box3d_iou(box, OrientedBox(box.centre, box.size, angles_of(half))) == pytest.approx(1, abs=1e-9)
        assert box3d_iou(box, OrientedBox(box.centre, (sy, sx, sz), angles_of(quarter))) == pytest.approx(1, abs=1e-9)


def test_who_comes_first_and_where_both_are_turned_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        one, two = random_box(rng), random_box(rng)
        value = box3d_iou(one, two)
        turn, shift = random_box(rng).rotation(), rng.uniform(-5, 5, 3)

        def moved(box: OrientedBox, turn: np.ndarray = turn, shift: np.ndarray = shift) -> OrientedBox:
            centre = turn @ np.array(box.centre) + shift
            return OrientedBox(tuple(centre.tolist()), box.size, angles_of(turn @ box.rotation()))

        assert box3d_iou(two, one) == pytest.approx(value, abs=1e-9)
        assert box3d_iou(moved(one), moved(two)) == pytest.approx(value, abs=1e-9)


def test_touching_is_0_contained_is_the_ratio_and_half_over_is_a_third() -> None:
    assert box3d_iou(UNIT, OrientedBox((1, 0, 0), (1, 1, 1))) == 0
    assert box3d_iou(UNIT, OrientedBox((0.5, 0, 0), (1, 1, 1))) == pytest.approx(1 / 3, abs=1e-12)
    assert box3d_iou(UNIT, OrientedBox((0.1, 0, 0), (0.2, 0.3, 0.4), (1, 2, 3))) == pytest.approx(0.024, abs=1e-12)
    eighth = OrientedBox((0, 0, 0), (1, 1, 1), (0, 0, math.pi / 4))
    octagon = 2 * math.sqrt(2) - 2  # a square with itself turned by an eighth
    assert box3d_iou(UNIT, eighth) == pytest.approx(octagon / (2 - octagon), abs=1e-12)


@pytest.mark.parametrize("size", [(0, 1, 1), (1, -1, 1), (math.inf, 1, 1), (math.nan, 1, 1), (1e-200, 1e-200, 1)])
def test_a_degenerate_size_is_0(size: tuple[float, float, float]) -> None:
    assert box3d_iou(OrientedBox((0, 0, 0), size), UNIT) == 0
    assert box3d_iou(UNIT, OrientedBox((0, 0, 0), size)) == 0


def test_thin_and_huge_boxes_stay_between_0_and_1() -> None:
    rng = np.random.default_rng(4)
    for _ in range(500):
        one, two = (
            OrientedBox(
                tuple((rng.uniform(-1, 1, 3) * 10.0 ** rng.integers(-8, 8)).tolist()),
                tuple((10.0 ** rng.uniform(-4, 4, 3)).tolist()),
                tuple((rng.integers(-4, 5, 3) * math.pi / 4).tolist()),
            )
            for _ in range(2)
        )
        assert 0 <= box3d_iou(one, two) <= 1
        assert box3d_iou(one, one) == pytest.approx(1, abs=1e-6)  # lengths 1e8 apart cost as many digits


def test_angles_of_the_format_are_in_units_of_pi() -> None:
    answer = '```json\n[{"bbox_3d": [0, 0, 4, 2, 1, 0.5, 1.0, 0.5, -0.25], "label": "sofa"}]\n```'
    [(label, box)] = read_boxes3d(answer)
    assert (label, box.centre, box.size) == ("sofa", (0, 0, 4), (2, 1, 0.5))
    assert box.angles == pytest.approx((math.pi, math.pi / 2, -math.pi / 4))
    [(_, half)] = read_boxes3d('{"bbox_3d": [0, 0, 4, 2, 1, 0.5, 0, 1.0, 0]}')
    assert box3d_iou(half, OrientedBox((0, 0, 4), (2, 1, 0.5))) == pytest.approx(1, abs=1e-9)  # as radians 0.42
    assert read_boxes3d("<think>" + answer) == []


def test_every_angle_matters() -> None:
    long = OrientedBox((0, 0, 0), (3, 2, 1))
    for i in range(3):
        angles = tuple(0.5 if i == j else 0.0 for j in range(3))
        assert box3d_iou(long, OrientedBox((0, 0, 0), (3, 2, 1), (angles[0], angles[1], angles[2]))) < 0.8


@pytest.mark.parametrize(
    "other",
    [
        [0.5, 0, 0, 1, 1, 1, 0, 0, 0],
        [[0.5, 0, 0], [1, 1, 1], [0, 0, 0]],
        {"centre": [0.5, 0, 0], "size": [1, 1, 1], "radians": [0, 0, 0]},
        {"center": [0.5, 0, 0], "size": [1, 1, 1], "angles": [0, 0, 0]},
        {"centre": [0.5, 0, 0], "size": [1, 1, 1], "rotation": [0, 0, 0]},
    ],
)
def test_a_row_may_write_a_box_flat_in_threes_or_by_name(other: Any) -> None:
    assert ROWS["box3d_iou"]({"a": [0, 0, 0, 1, 1, 1, 0, 0, 0], "b": other}) == pytest.approx(1 / 3)


@pytest.mark.parametrize("wrong", [None, [1, 2], "box", [0, 0, 0, 1, 1, 1, 0, 0, True], {"centre": [0, 0, 0]}])
def test_a_row_without_a_box_is_one_sentence(wrong: Any) -> None:
    with pytest.raises(ValueError, match="'b'"):
        ROWS["box3d_iou"]({"a": [0, 0, 0, 1, 1, 1, 0, 0, 0], "b": wrong})
    with pytest.raises(ValueError, match="'a'"):
        ROWS["box3d_iou"]({"b": [0, 0, 0, 1, 1, 1, 0, 0, 0]})
