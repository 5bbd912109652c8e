"""Boxes and points: declared spaces, the report's JSON, and what can be saved from an answer that broke off."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.prompt.coordinates import Box, Box3D, Boxes, Point, read_boxes, to_json


def relative(*items) -> Boxes:
    return Boxes(items=items, space="relative1000")


def test_a_fenced_list_is_read():
    text = 'Here:\n```json\n[\n\t{"bbox_2d": [10, 20, 30, 40], "label": "cat"},\n\t{"point_2d": [5, 6]}\n]\n```\nDone.'
    assert read_boxes(text) == relative(Box(10, 20, 30, 40, "cat"), Point(5, 6))


def test_a_bare_list_and_a_bare_object_are_read():
    assert read_boxes('[{"point_2d": [500, 250], "label": "a"}]') == relative(Point(500, 250, "a"))
    text = 'It is {"bbox_3d": [1, 2, 3, 4, 5, 6, 0.1, 0.2, 0.3], "label": "car"}.'
    assert read_boxes(text) == relative(Box3D((1, 2, 3), (4, 5, 6), (0.1, 0.2, 0.3), "car"))


def test_a_list_that_broke_off_gives_its_complete_objects():
    text = '```json\n[\n{"bbox_2d": [1, 2, 3, 4], "label": "cat"},\n{"bbox_2d": [5, 6, 7, 8], "label": "do'
    boxes = read_boxes(text)
    assert boxes.items == (Box(1, 2, 3, 4, "cat"),) and boxes.is_truncated
    assert read_boxes('{"objects": [{"point_2d": [1, 2]}').items == (Point(1, 2),)
    assert not read_boxes("There is none.").is_truncated


def test_single_quotes_and_trailing_commas_are_read_where_they_are_clear():
    text = "[{'bbox_2d': [1, 2, 3, 4,], 'label': 'a cat',}, {'point_2d': [3, 4]},]"
    assert read_boxes(text) == relative(Box(1, 2, 3, 4, "a cat"), Point(3, 4))
    assert read_boxes("""[{'point_2d': [3, 4], 'label': "dog's"}]""") == relative(Point(3, 4, "dog's"))
    unclear = read_boxes("[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog's'}]")
    assert unclear.items == () and unclear.problems[0].startswith("This is no JSON object")


@pytest.mark.parametrize(
    "wrong", ["[1, 2, 3]", '[1, 2, "3", 4]', "[1, 2, NaN, 4]", "[1, 2, 1e999, 4]", "[1, 2, true, 4]", "7"]
)
def test_what_is_no_box_is_left_out_and_named(wrong):
    boxes = read_boxes(f'[{{"bbox_2d": {wrong}}}, {{"point_2d": [1, 2]}}]')
    assert boxes.items == (Point(1, 2),) and boxes.problems[0].startswith("bbox_2d must be 4 numbers")


def test_braces_and_quotes_in_labels_and_prose_do_no_harm():
    assert read_boxes('{"point_2d": [1, 2], "label": "a}b{c]"}') == relative(Point(1, 2, "a}b{c]"))
    assert read_boxes('I\'d say "here {so}: [{"point_2d": [1, 2]}]') == relative(Point(1, 2))


def test_thousandths_become_pixels_of_the_pictures_own_size():
    boxes = relative(Box(0, 250, 500, 1000, "a"), Point(1000, 500))
    pixels = boxes.to_pixels(width=1920, height=1080)
    assert pixels == Boxes(items=(Box(0, 270, 960, 1080, "a"), Point(1920, 540)), space="pixels")
    assert pixels.to_relative(1920, 1080) == boxes and pixels.to_pixels(1920, 1080) is pixels
    with pytest.raises(ValueError, match="both must be positive"):
        boxes.to_pixels(0, 10)
    with pytest.raises(ValueError, match="must be one of relative1000, pixels"):
        Boxes(items=(), space="cm")  # type: ignore[arg-type]


def test_the_reports_json_is_written():
    boxes = relative(Box(1.4, 2.5, 3, 4, "cät"), Point(7, 8), Box3D((1.234, 0, 2), (1, 1, 1), (0, 0.5, 0), "car"))
    assert to_json(boxes) == (
        '[{"bbox_2d": [1, 3, 3, 4], "label": "cät"}, {"point_2d": [7, 8]}, '
        '{"bbox_3d": [1.23, 0, 2, 1, 1, 1, 0, 0.5, 0], "label": "car"}]'
    )
    assert to_json(relative(Point(7, 8)), fenced=True) == '```json\n[\n\t{"point_2d": [7, 8]}\n]\n```'


def test_an_inverted_box_can_be_put_in_order():
    assert Box(9, 8, 1, 2, "a").ordered() == Box(1, 2, 9, 8, "a")


NUMBERS = st.integers(0, 1000).map(float)
LABELS = st.none() | st.text(st.characters(codec="utf-8"), max_size=12)
METRES = st.floats(-50, 50).map(lambda value: round(value, 2))
TRIPLE = st.tuples(METRES, METRES, METRES)
PLACES = st.one_of(
    st.builds(Box, NUMBERS, NUMBERS, NUMBERS, NUMBERS, LABELS),
    st.builds(Point, NUMBERS, NUMBERS, LABELS),
    st.builds(Box3D, TRIPLE, TRIPLE, TRIPLE, LABELS),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(PLACES, max_size=6), st.booleans())
def test_what_is_written_is_read_back(places, fenced):
    text = to_json(relative(*places), fenced=fenced)
    assert read_boxes(text) == relative(*places)


@settings(max_examples=200, deadline=None)
@given(st.lists(PLACES, min_size=1, max_size=6), st.data())
def test_a_cut_anywhere_loses_only_what_is_behind_it(places, data):
    text = to_json(relative(*places))
    cut = data.draw(st.integers(1, len(text) - 1))
    found = read_boxes(text[:cut]).items
    assert found == tuple(places)[: len(found)]
    assert read_boxes(text[:cut]).is_truncated or not found


@settings(max_examples=200, deadline=None)
@given(st.lists(PLACES, max_size=4), st.integers(1, 20_000), st.integers(1, 20_000))
def test_pixels_and_back_is_the_same_place(places, width, height):
    back = relative(*places).to_pixels(width, height).to_relative(width, height)
    for before, after in zip(places, back, strict=True):
        assert after.numbers == pytest.approx(before.numbers, abs=1e-9)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("{}[]\"',: 123bbox_2dpoint\\\n`"), max_size=200))
def test_no_text_breaks_the_reader(text):
    read_boxes(text)


def test_numbers_that_are_no_place_are_left_out() -> None:
    text = '[{"bbox_2d": [1e308, 0, 1, 1]}, {"bbox_2d": [10, 10, 100, 99999999999]}, {"point_2d": [1, 2]}]'
    assert read_boxes(text) == relative(Point(1, 2))
