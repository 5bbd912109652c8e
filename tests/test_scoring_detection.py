"""Average precision equals pycocotools' on random detections, and has a figure that no order changes."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from qvl.scoring.detection import Found, Truth, average_precision, tie_free_precision
from qvl.scoring.rows_places import ROWS

IMAGES, CLASSES = 5, 4


def random_row(rng: np.random.Generator, *, step: int = 1) -> dict[str, Any]:
    """Truths of classes 0 to 2 only; detections near truths and anywhere, duplicates, many equal confidences, empty and inverted boxes."""

    def box() -> list[float]:
        x, y = rng.integers(0, 80, 2) * step
        width, height = rng.integers(1, 60, 2) * step
        return [float(x), float(y), float(x + width), float(y + height)]

    truth = [[int(rng.integers(IMAGES)), int(rng.integers(3)), *box()] for _ in range(rng.integers(1, 25))]
    found = []
    for image, kind, *corners in truth:
        for _ in range(rng.integers(0, 3)):
            near = [float(value + rng.integers(-6, 7)) for value in corners]
            found.append([image, kind, *near, float(rng.integers(0, 6)) / 5])
    found += [
        [int(rng.integers(IMAGES)), int(rng.integers(CLASSES)), *box(), float(rng.integers(0, 6)) / 5]
        for _ in range(rng.integers(0, 20))
    ]
    found += [[int(rng.integers(IMAGES)), int(rng.integers(3)), 5.0, 5.0, 5.0, 30.0, 0.9]]
    found += [[int(rng.integers(IMAGES)), int(rng.integers(3)), 9.0, 5.0, 5.0, 30.0, 0.9]]
    found += [[int(rng.integers(IMAGES)), int(rng.integers(3)), 9.0, 9.0, 5.0, 5.0, 0.9]]
    return {
        "images": IMAGES,
        "classes": CLASSES,
        "truth": truth,
        "found": [found[i] for i in rng.permutation(len(found))],
    }


def by_pycocotools(row: dict[str, Any], *, max_detections: int, listed: bool) -> dict[str, Any]:
    def annotation(number: int, item: list[Any]) -> dict[str, Any]:
        image, kind, x1, y1, x2, y2 = item[:6]
        box = [x1, y1, x2 - x1, y2 - y1]
        shape = {"id": number, "image_id": image, "category_id": kind, "bbox": box, "area": box[2] * box[3]}
        return shape | {"iscrowd": 0}

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(row["images"])],
            "categories": [{"id": i} for i in range(row["classes"])],
            "annotations": [annotation(i + 1, item) for i, item in enumerate(row["truth"])],
        }
        coco.createIndex()
        found = [annotation(i + 1, item) | {"score": 1.0 if listed else item[6]} for i, item in enumerate(row["found"])]
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.params.maxDets = [max_detections]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]

    def mean(part: np.ndarray) -> float:
        return float(part[part > -1].mean()) if (part > -1).any() else -1.0

    return {
        "map": mean(precision),
        "ap50": mean(precision[0]),
        "ap75": mean(precision[5]),
        "per_class": [mean(precision[:, :, k]) for k in range(row["classes"])],
    }


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("max_detections", [1, 3, 100])
def test_map_equals_pycocotools(max_detections: int, listed: bool) -> None:
    rng = np.random.default_rng(max_detections)
    for number in range(20):
        row = random_row(rng, step=1 + number % 3)
        order = {"order": "listed" if listed else "score", "max_detections": max_detections}
        ours, theirs = (
            ROWS["map"](row | order),
            by_pycocotools(row, max_detections=max_detections, listed=listed),
        )
        assert ours["per_class"] == pytest.approx(theirs["per_class"], abs=1e-9)
        assert [ours[key] for key in ("map", "ap50", "ap75")] == pytest.approx(
            [theirs[key] for key in ("map", "ap50", "ap75")], abs=1e-9
        )
        assert ours["per_class"][3] == -1


def test_no_detection_is_0_and_no_truth_is_minus_1() -> None:
    right = [[0, 0, 1, 1, 9, 9]]
    none = {"images": 1, "classes": 2, "truth": right, "found": [], "order": "listed", "max_detections": 100}
    assert ROWS["map"](none) == {"map": 0.0, "ap50": 0.0, "ap75": 0.0, "per_class": [0.0, -1.0]}
    assert ROWS["map"](none | {"truth": []}) == {"map": -1.0, "ap50": -1.0, "ap75": -1.0, "per_class": [-1.0, -1.0]}
    assert ROWS["map"](none | {"found": [*right, [0, 7, 1, 1, 9, 9]]})["map"] == pytest.approx(1.0)  # 7: unknown class


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"order": "random"}, "order"),
        ({"truth": None}, "truth"),
        ({"truth": [[0, 0, 1, 1, 9]]}, "truth"),
        ({"truth": [[0, 0, 9, 1, 1, 9]]}, "truth"),
        ({"truth": [[3, 0, 1, 1, 9, 9]]}, "truth"),
        ({"found": [[0, 0, 1, 1, 9, 9, "high"]]}, "found"),
        ({"found": [[0, 0, 1, 1, 9, float("nan"), 1]]}, "found"),
        ({"classes": "two"}, "classes"),
        ({"max_detections": 0}, "max_detections"),
    ],
)
def test_a_wrong_row_is_one_sentence_that_names_the_key(change: dict[str, Any], sentence: str) -> None:
    row = {"images": 1, "classes": 1, "truth": [[0, 0, 1, 1, 9, 9]], "found": [], "order": "score"}
    with pytest.raises(ValueError, match=sentence):
        ROWS["map"](row | change)


def test_the_order_of_equal_detections_changes_ap_and_not_the_tie_free_figure() -> None:
    rng = np.random.default_rng(0)
    row = random_row(rng)
    truth = [Truth(item[0], item[1], tuple(item[2:6])) for item in row["truth"]]
    ordered, free = set(), set()
    for _ in range(20):
        images = rng.permutation(IMAGES)
        right = [Truth(int(images[t.image]), t.kind, t.box) for t in truth]
        found = [Found(int(images[i[0]]), i[1], tuple(i[2:6])) for i in row["found"]]
        found = [found[i] for i in rng.permutation(len(found))]
        ordered.add(round(average_precision(right, found, num_classes=CLASSES, order="listed").map, 12))
        free.add(round(tie_free_precision(right, found, num_classes=CLASSES).map, 12))
    assert len(ordered) > 1
    assert len(free) == 1


def test_the_tie_free_figure_is_precision_times_the_recalls_reached() -> None:
    truth = [Truth(0, 0, (0, 0, 10, 10)), Truth(1, 0, (0, 0, 10, 10))]
    found = [Found(0, 0, (0, 0, 10, 10)), Found(0, 0, (50, 50, 60, 60))]
    # precision 1/2 at recall 1/2: 51 of 101 recalls
    assert tie_free_precision(truth, found, num_classes=1).map == pytest.approx(0.5 * 51 / 101)
    assert tie_free_precision(truth, [], num_classes=1).map == 0.0
    assert tie_free_precision([], found, num_classes=1).map == -1.0
    both = [Found(0, 0, (0, 0, 10, 10)), Found(1, 0, (0, 0, 10, 10))]
    assert tie_free_precision(truth, both, num_classes=1).per_class == [1.0]
