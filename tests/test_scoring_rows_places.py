"""Rows of boxes, points and spans: every form in which an answer may say them."""

import random
import time
from typing import Any

import pytest

from qvl.scoring.rows_places import ROWS


@pytest.mark.parametrize(
    "answer",
    [
        "<10.2 seconds> to <15.0 seconds>",
        '{"start": 10.2, "end": 15.0}',
        '```json\n[{"start_time": "10.2", "end_time": "15.0"}]\n```',
        'In clip 3: {"start": "0:10.2", "end": "0:15", "label": "2 dogs"}',
        "[10.2, 15.0]",
        "[[10.2, 15.0]]",
        "It starts at 10.2 seconds and ends at 15 seconds.",
        "between 10.2 and 15",
        "10.2—15",
        "10.2 – 15.0 seconds",  # noqa: RUF001 - the dash is meant
        "0:10.2 - 0:15.0",
        "00:10.2 to 00:15.0",
        "00:00:10.2 - 00:00:15.0",
        "15.0 to 10.2",
        "from 15 s to 10.2 s",
        "The two men open door 4 from 10.2 to 15.0 seconds.",
        "Query 1: 0:10.2 - 0:15.0. I am 90% sure.",
        "<think>1 to 2</think>The event happens in the 10.2 - 15.0.",
        "10.2 to 15, in other words 10.2 seconds - 15 seconds",
    ],
)
def test_a_span_is_read_in_every_style(answer: str) -> None:
    assert ROWS["temporal_iou"]({"answer": answer, "span": [10.2, 15.0]}) == pytest.approx(1.0)


def test_spans_score_their_overlap() -> None:
    def value(answer: str, span: list[float]) -> float:
        return ROWS["temporal_iou"]({"answer": answer, "span": span})

    assert value("12 to 17", [10, 15]) == pytest.approx(3 / 7)
    assert value("1:02:03 to 1:02:13", [3723, 3743]) == pytest.approx(0.5)
    assert value("0:10.5 - 0:15.0", [10.5, 15]) == pytest.approx(1)
    assert value("15 to 20", [10, 15]) == value("12 to 12", [10, 15]) == value("", [10, 15]) == 0
    assert value("1 to 2, or 10 to 15", [10, 15]) == 0  # two different spans are no answer
    assert value("<think>10 to 15", [10, 15]) == 0
    assert value("10 to 1000", [10, 20]) == pytest.approx(10 / 990)


@pytest.mark.parametrize(
    "answer",
    [
        '```json\n[\n\t{"bbox_2d": [1, 2, 30, 40], "label": "cat"},\n\t{"bbox_2d": [5, 6, 70, 80]}\n]\n```',
        '[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, {"bbox_2d": [5, 6, 70, 80], "label": null}, {"bbox_2d": [7, 8',
        "[{'bbox_2d': [1, 2, 30, 40], 'label': 'cat'}, {'bbox_2d': [5, 6, 70, 80], 'label': None}]",
        "[{'bbox_2d': [1, 2, 30, 40], 'label': 'cat'}, {'bbox_2d': (5, 6, 70, 80), 'label': null}]",
        '[{"bbox": [1, 2, 30, 40], "label": "cat"}, {"bbox": [5.0, 6, 70, 80], "label": ""}]',
        '{"objects": [{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, {"bbox_2d": [5, 6, 70, 80]}]}',
        '<think>{"bbox_2d": [0, 0, 1, 1]}</think>Two: {"label": "cat", "bbox_2d": [1, 2, 30, 40]} and {"bbox_2d": [5, 6, 70, 80]}.',
        '{"bbox_2d": [1, 2, 30, 40], "bbox": [9, 9, 9, 9], "label": "cat"}, {"bbox": [5, 6, 70, 80]}',
    ],
)
def test_boxes_are_read_in_every_style(answer: str) -> None:
    assert ROWS["read_boxes"]({"answer": answer}) == [["cat", 1, 2, 30, 40], ["", 5, 6, 70, 80]]


def test_a_list_of_fifty_that_was_cut_keeps_forty_nine() -> None:
    items = [f'{{"bbox_2d": [{i}, {i}, {i + 9}, {i + 9}], "label": "bird"}}' for i in range(50)]
    whole = "```json\n[\n" + ",\n".join(items) + "\n]\n```"
    assert len(ROWS["read_boxes"]({"answer": whole})) == 50
    assert len(ROWS["read_boxes"]({"answer": whole[:-30]})) == 49


def test_boxes_are_given_as_they_are_written() -> None:
    said = '[{"bbox_2d": [30, 40, 1, -2]}, {"bbox_2d": [0, 0, 1001, 1000.5]}, {"point_2d": [1, 2]}, {"bbox_2d": [1, 2, 3]}]'
    assert ROWS["read_boxes"]({"answer": said}) == [["", 30, 40, 1, -2], ["", 0, 0, 1001, 1000.5]]
    assert ROWS["read_boxes"]({"answer": "There is none."}) == []


def test_box_iou() -> None:
    def value(a: list[float], b: list[float]) -> float:
        return ROWS["box_iou"]({"a": a, "b": b})

    assert value([0, 0, 10, 10], [0, 0, 10, 10]) == 1
    assert value([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert value([0, 0, 10, 10], [10, 0, 20, 10]) == value([0, 0, 0, 10], [0, 0, 0, 10]) == 0
    assert value([0, 0, 2000, 2000], [0, 0, 1000, 1000]) == 0.25


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"point_2d": [100, 200], "label": "button"}', 1),
        ('[{"point_2d": [99, 200]}]', 0),
        ('{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [150, 250]}}', 1),
        ("The button is at (150, 250).", 1),
        ("[300, 400]", 1),
        ("[300.5, 400]", 0),
        ('{"point_2d": [150, 250]}, {"point_2d": [160, 250]}', 0),
        ("(150, 250) or (1, 1)", 0),
        ("<think>(150, 250)", 0),
        ("nowhere", 0),
    ],
)
def test_a_point_is_in_a_box_edges_included(answer: str, value: float) -> None:
    assert ROWS["point_in_box"]({"answer": answer, "box": [100, 200, 300, 400]}) == value


@pytest.mark.parametrize(
    ("scorer", "row", "key"),
    [
        ("temporal_iou", {"answer": "1 to 2"}, "span"),
        ("temporal_iou", {"answer": "1 to 2", "span": [2, 1]}, "span"),
        ("temporal_iou", {"span": [1, 2]}, "answer"),
        ("read_boxes", {"answer": 3}, "answer"),
        ("box_iou", {"a": [1, 2, 3, 4], "b": "1234"}, "b"),
        ("point_in_box", {"answer": "(1, 2)", "box": [1, 2, 3, float("inf")]}, "box"),
    ],
)
def test_a_wrong_row_names_its_key(scorer: str, row: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}'.*expected"):
        ROWS[scorer](row)


PIECES = [
    "1",
    "10.2",
    ":",
    "0:",
    " to ",
    "-",
    "—",
    "[",
    "]",
    "{",
    "}",
    '"',
    "'",
    ",",
    "<",
    ">",
    "seconds",
    "start",
    "end",
    '"start": ',
]
PIECES += [
    '"bbox_2d": ',
    "'bbox': ",
    "[1, 2, 3, 4]",
    "null",
    "None",
    '"label"',
    "```json\n",
    "```",
    "(",
    ")",
    '"coordinate": [',
]
PIECES += [
    "\\boxed{",
    "\\frac{1}{2}",
    "答案是",
    "🙂",
    "\0",
    "<think>",
    "</think>",
    "999999999",
    "1e999",
    "NaN",
    "\n",
    " and ",
    "-1",
]


def test_no_answer_raises_and_none_takes_long() -> None:
    random.seed(0)
    more = {"temporal_iou": {"span": [1, 2]}, "read_boxes": {}, "point_in_box": {"box": [0, 0, 9, 9]}}
    answers = ["".join(random.choices(PIECES, k=random.randint(0, 40))) for _ in range(2000)]
    answers += [piece * (100_000 // len(piece)) for piece in PIECES]
    for scorer, rest in more.items():
        for answer in answers:
            start = time.monotonic()
            ROWS[scorer]({"answer": answer, **rest})
            assert time.monotonic() - start < 20, (scorer, answer[:20])
