"""Scorers: what is right, what is wrong, and that no trick of writing earns anything."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.prompt.example import Example
from qvl.prompt.message import user
from qvl.scoring.choices import choice_letter
from qvl.scoring.extract import final_text, normalised, one_number, short_answer
from qvl.scoring.numerals import numbers_in
from qvl.scoring.places import overlap
from qvl.scoring.registry import SCORERS, score, score_answers
from qvl.scoring.score import Resources, Score, Scorer
from qvl.scoring.times import one_span, times_in

TRUTHS = {
    "exact": {"answer": "red circle"},
    "contains": {"answer": "red", "others": ["green", "blue"]},
    "text": {"text": "KAB"},
    "choice": {"letters": ["A", "B", "C", "D"], "choice": "B"},
    "number": {"number": 2.5},
    "count": {"number": 3},
    "iou": {"box": [100, 200, 300, 400]},
    "boxes_f1": {"boxes": [[100, 200, 300, 400], [500, 500, 700, 700]]},
    "point_in_box": {"box": [100, 200, 300, 400]},
    "temporal": {"seconds": 3.4},
    "temporal_iou": {"span": [10.0, 15.0]},
}
RIGHT = {
    "exact": "red circle",
    "contains": "The tag is red.",
    "text": "KAB",
    "choice": "B",
    "number": "2.5",
    "count": "3",
    "iou": '[{"bbox_2d": [100, 200, 300, 400], "label": "x"}]',
    "boxes_f1": '[{"bbox_2d": [100, 200, 300, 400]}, {"bbox_2d": [500, 500, 700, 700]}]',
    "point_in_box": '[{"point_2d": [200, 300]}]',
    "temporal": "3.4 seconds",
    "temporal_iou": "10 to 15 seconds",
}
LISTINGS = {
    "exact": "red circle, red square, blue circle, blue square",
    "contains": "red green blue",
    "choice": "A B C D",
    "number": "0.5 1.5 2.5 3.5",
    "count": "1, 2, 3, 4, 5",
    "iou": json.dumps([{"bbox_2d": [x, y, x + 200, y + 200]} for x in range(0, 801, 100) for y in range(0, 801, 100)]),
    "point_in_box": json.dumps([{"point_2d": [x, y]} for x in range(0, 1001, 50) for y in range(0, 1001, 50)]),
    "temporal": " ".join(f"{t / 2} seconds" for t in range(40)),
    "temporal_iou": "1 to 2, 3 to 9, 10 to 15, 20 to 30",
}
BOX = '[{"bbox_2d": [100, 200, 300, 400], "label": "red circle"}]'


def test_every_scorer_has_a_case_here() -> None:
    assert set(SCORERS) == set(TRUTHS) == set(RIGHT)


@pytest.mark.parametrize("name", SCORERS)
def test_the_right_answer_scores_one_also_after_a_thought(name: str) -> None:
    assert score(name, RIGHT[name], TRUTHS[name]) == 1.0
    assert score(name, f"<think>Could be 7, or A, or blue.</think>\n\n{RIGHT[name]}", TRUTHS[name]) == 1.0
    assert score(name, f"a thought the template opened</think>\n{RIGHT[name]}", TRUTHS[name]) == 1.0


@pytest.mark.parametrize("name", SCORERS)
def test_an_answer_inside_a_thought_that_never_closes_scores_nothing(name: str) -> None:
    assert score(name, f"<think>It must be {RIGHT[name]}", TRUTHS[name]) == 0.0


@pytest.mark.parametrize("name", LISTINGS)
def test_listing_all_answers_scores_nothing(name: str) -> None:
    assert score(name, LISTINGS[name], TRUTHS[name]) == 0.0


@pytest.mark.parametrize("name", ["exact", "choice", "number", "count", "temporal"])
def test_two_different_boxed_answers_score_nothing_and_one_twice_scores(name: str) -> None:
    boxed = rf"\boxed{{{RIGHT[name]}}}"
    assert score(name, f"{boxed} so {boxed}", TRUTHS[name]) == 1.0
    assert score(name, rf"{boxed} or \boxed{{9}}", TRUTHS[name]) == 0.0


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize(
    "answer",
    ["", " \n", "</think>", "<think></think>", "I cannot tell.", "[", "{" * 5000, "nan", "NaN", "inf", "1e999"],
)
def test_empty_and_broken_answers_score_nothing(name: str, answer: str) -> None:
    assert score(name, answer, TRUTHS[name]) < 0.1


@pytest.mark.parametrize("name", SCORERS)
@given(answer=st.text(max_size=60))
def test_any_answer_scores_between_zero_and_one(name: str, answer: str) -> None:
    assert 0.0 <= score(name, answer, TRUTHS[name]) <= 1.0


@pytest.mark.parametrize("name", SCORERS)
def test_a_truth_that_lacks_what_the_scorer_needs_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"the truth has 'unrelated'; this scorer needs '\w+'"):
        score(name, RIGHT[name], {"unrelated": 1})


def test_an_unknown_scorer_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="there is no scorer 'anls'; choose one of exact"):
        score("anls", "", {})


@pytest.mark.parametrize("name", SCORERS)
def test_long_answers_are_read_in_linear_time(name: str) -> None:
    """Each of these took minutes with an unbounded repetition in a pattern; the test's own time limit would end it."""
    for piece in (
        "answer ",
        " ",
        "\n",
        "1,111",
        "1 ",
        "1:",
        "(A",
        "\\boxed{",
        "{",
        '{"bbox_2d": [',
        "<think>x</think>",
    ):
        assert score(name, piece * (60_000 // len(piece)), TRUTHS[name]) < 0.5


# ---- scores with their way ----------------------------------------------------------------------------------------


def example_for(name: str) -> Example:
    return Example(id="x", category="", messages=(user("?"),), answer=RIGHT[name], truth=TRUTHS[name], scorer=name)


@pytest.mark.parametrize("name", SCORERS)
def test_each_answer_gets_the_rules_value_what_was_read_and_the_path(name: str) -> None:
    unfinished = f"<think>It must be {RIGHT[name]}"
    right, failed = score_answers(example_for(name), [RIGHT[name], unfinished])
    assert (right.value, right.path, right.reason) == (1.0, "rule", "")
    assert right.extracted is not None
    assert (failed.value, failed.extracted, failed.path) == (0.0, None, "failed")
    assert failed.reason.startswith("The answer does not give ")


@pytest.mark.parametrize(
    ("name", "answer", "extracted"),
    [
        ("exact", "The answer is: a red circle", "a red circle"),
        ("choice", "I choose (C).", "C"),
        ("number", "about 2.60", "2.6"),
        ("count", "three cats", "3"),
        ("temporal", "0:04.0", "4 seconds"),
        ("temporal_iou", "10 to 12", "10 to 12 seconds"),
        ("boxes_f1", "[]", "[]"),
    ],
)
def test_a_score_shows_what_was_read_in_the_answer(name: str, answer: str, extracted: str) -> None:
    (got,) = score_answers(example_for(name), [answer])
    assert got == Score(value=score(name, answer, TRUTHS[name]), extracted=extracted, path="rule")


@pytest.mark.parametrize("name", SCORERS)
@given(answers=st.lists(st.text(max_size=60), max_size=3))
def test_no_answer_raises_and_what_is_not_read_earns_nothing(name: str, answers: list[str]) -> None:
    scores = score_answers(example_for(name), answers)
    assert [s.value for s in scores] == [score(name, answer, TRUTHS[name]) for answer in answers]
    assert all(s.extracted is not None if s.path == "rule" else s.value == 0 and s.reason for s in scores)


def test_a_scorer_is_asked_with_its_example_all_answers_and_the_resources() -> None:
    seen = []

    def judge(example: Example, answers: Sequence[str], resources: Resources) -> list[Score]:
        seen.append((example.id, list(answers), resources.judge))
        return [Score(value=0.5, extracted=answer, path="judge", reason="Half of it is there.") for answer in answers]

    scorer: Scorer = judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCORERS, "judge", scorer)
        example = replace(example_for("exact"), scorer="judge")
        scores = score_answers(example, ["one", "two"], Resources(judge="a client"))
    assert seen == [("x", ["one", "two"], "a client")]
    assert [s.extracted for s in scores] == ["one", "two"]


def test_a_faulty_truth_is_an_error_of_the_example() -> None:
    with pytest.raises(ValueError, match=r"this scorer needs 'number'"):
        score_answers(replace(example_for("count"), truth={}), ["3"])


# ---- extraction ---------------------------------------------------------------------------------------------------


def test_the_final_text_is_what_stands_after_the_last_thought() -> None:
    assert final_text("no thought") == "no thought"
    assert final_text("<think>a</think> b") == "b"
    assert final_text("<think>a</think> b <think>c</think> d") == "d"
    assert final_text("<think>a</think> b <think>c") is None


def test_a_short_answer_is_boxed_or_said_or_all_there_is() -> None:
    assert short_answer(r"So it is \boxed{\text{red circle}}.") == "red circle"
    assert short_answer(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert short_answer("Some reasons.\nThe answer is: red circle.\nGood day.") == "red circle."
    assert short_answer("The answer is 3. No, the answer is 4") is None
    assert short_answer("red circle") == "red circle"
    assert short_answer(r"\boxed{cut off") is None
    assert short_answer(r"\boxed{3} or rather \boxed{4") is None
    assert short_answer(r"\boxed{3}" * 101) is None


def test_answers_are_compared_without_case_articles_and_marks() -> None:
    assert normalised(" The  Red\tCircle. ") == "red circle"
    assert normalised("**red circle**") == "red circle"
    assert normalised("\uff32\uff45\uff44") == "red"
    assert score("exact", "A red circle!", {"answer": "red circle"}) == 1.0
    assert score("exact", "red circles", {"answer": "red circle"}) == 0.0
    assert score("exact", "not a red circle", {"answer": "red circle"}) == 0.0
    assert score("exact", "scarlet disc", {"answer": ["red circle", "Scarlet disc"]}) == 1.0


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("3", 3.0),
        ("There are three objects.", 3.0),
        ("I count 3; yes, three.", 3.0),
        ("1,000", 1000.0),
        ("-2.50", -2.5),
        ("1e3", 1000.0),
        ("It is 3 or 4.", None),
        ("2 red and 3 blue ones, so the answer is 5", 5.0),
        ("1,2,3", None),
        ("B12", None),
        ("1.2.3", None),
        ("9" * 400, None),
    ],
)
def test_one_number_is_read_or_none(answer: str, value: float | None) -> None:
    assert one_number(answer) == value


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("forty-five", [45]),
        ("thirty-one apples, twenty two pears", [31, 22]),
        ("a hundred and six, a dozen, two dozen", [106, 12, 24]),
        ("5 million; 1.5 thousand", [5e6, 1500]),
        ("two thousand three hundred and forty-five", [2345]),
        ("one two three", [1, 2, 3]),
        ("twenty and five", [20, 5]),
        ("forty twelve", [40, 12]),
        ("hundreds of them", []),
        ("-3 and five", [-3, 5]),
    ],
)
def test_numbers_are_read_in_digits_and_in_words(text: str, numbers: list[float]) -> None:
    assert numbers_in(text) == numbers


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Answer: A\n\nExplanation: the cat is left.", "A"),
        ("A\n\nThe cat is on the mat.", "A"),
        ("The correct answer is A\n\nReasoning: it fits.", "A"),
        ("Answer: A\nThe ray hits wall B first.", "A"),
        ("The answer is A. It is the cat.", "A"),
        ("A cat sits there, so B", "B"),
        ("I think B", "B"),
        ("The answer is a cat", None),
    ],
)
def test_a_letter_at_the_end_of_its_line_is_no_article(answer: str, letter: str | None) -> None:
    assert choice_letter(answer, "ABCD") == letter


def test_a_long_thought_hides_no_answer() -> None:
    assert one_number("thinking " * 50_000 + "</think>\n7") == 7.0
    assert one_number("<think>" + "thinking " * 50_000 + "</think>\n7") == 7.0


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("about 1.5 minutes", [90]),
        ("1 hour", [3600]),
        ("1 hour 30 seconds", [3630]),
        ("500 ms", [0.5]),
        ("from 1.5 to 2.5 minutes", [90, 150]),
        ("3 to 5 seconds", [3, 5]),
        ("2 min 70 seconds", []),
    ],
)
def test_times_in_other_units_are_seconds(text: str, times: list[float]) -> None:
    assert times_in(text) == pytest.approx(times)


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [("\u7403\u662f\u7ea2\u8272\u7684", "\u7ea2\u8272", 1.0), ("\u662fred\u7684", "red", 1.0), ("colored", "red", 0.0)],
)
def test_a_word_is_found_where_words_have_no_spaces_between(said: str, wanted: str, value: float) -> None:
    assert score("contains", said, {"answer": wanted}) == value


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        "(b)",
        "(B)",
        "B.",
        "B) two cats",
        "**B**",
        r"\boxed{B}",
        r"\boxed{\text{B}}",
        "The answer is B.",
        "answer: b",
        "\uff22",
        "Option B is correct because A cat is not there",
        "选B",
        "答案是B",
        "two cats",
        "I think it is B",
        "B. two cats",
        "<think>A or C</think>B",
        "The correct option is (B), since a cat sits there.",
    ],
)
def test_a_choice_is_read_in_every_usual_spelling(answer: str) -> None:
    assert choice_letter(answer, "ABCD", ["cat", "two cats", "dog", "none"]) == "B"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A… wait, C",
        "A, B",
        "A cat is on the mat",
        "I do not know",
        "E",
        "The answer is E",
        r"\boxed{A} \boxed{B}",
        "B. cat",
        "cats",
        "<think>B",
        "The answer is B. No, the answer is C.",
        "(A) (B) (C) (D)",
        "none of these, a dog maybe",
    ],
)
def test_what_chooses_nothing_or_two_things_is_no_choice(answer: str) -> None:
    assert choice_letter(answer, "ABCD", ["cat", "two cats", "dog", "fish"]) is None


def test_ten_options_are_told_apart() -> None:
    assert choice_letter("The answer is J", "ABCDEFGHIJ") == "J"
    assert choice_letter("I believe it is J", "ABCDEFGHIJ") == "J"


# ---- words --------------------------------------------------------------------------------------------------------


def test_contained_words_are_whole_and_stand_without_the_wrong_ones() -> None:
    truth = {"answer": "red", "others": ["green"]}
    assert score("contains", "The anchor tag is Red, as I said.", truth) == 1.0
    assert score("contains", "a redder one", truth) == 0.0
    assert score("contains", "red, not green", truth) == 0.0
    with pytest.raises(ValueError, match="an empty text is contained in everything"):
        score("contains", "x", {"answer": ""})


def test_text_is_one_less_the_edits_by_the_longer_length() -> None:
    assert score("text", "KAX", {"text": "KAB"}) == pytest.approx(2 / 3)
    assert score("text", "KAB and the whole alphabet", {"text": "KAB"}) == pytest.approx(3 / 26)
    assert score("text", "kab", {"text": "KAB"}) == 0.0
    assert score("text", "a \n b", {"text": ["x", "a b"]}) == 1.0
    assert score("text", "stra\u00dfe", {"text": "STRASSE"}) == 0.0


@given(one=st.text(max_size=20), two=st.text(max_size=20))
def test_text_is_symmetric(one: str, two: str) -> None:
    if "<think>" not in one + two and "</think>" not in one + two:
        assert score("text", one, {"text": two}) == pytest.approx(score("text", two, {"text": one}))


def test_numbers_have_a_tolerance_only_where_the_truth_says_so() -> None:
    assert score("number", "2.6", {"number": 2.5}) == 0.0
    assert score("number", "2.6", {"number": 2.5, "tolerance": 0.2}) == 1.0
    assert score("count", "3.0 cats", {"number": 3}) == 1.0
    assert score("count", "3.2", {"number": 3}) == 0.0


# ---- places -------------------------------------------------------------------------------------------------------


def box(*corners: float) -> str:
    return json.dumps([{"bbox_2d": corners, "label": "x"}])


def test_overlap_is_shared_by_joint_area() -> None:
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(2 / 6)
    assert overlap((0, 0, 4, 4), (1, 1, 3, 3)) == pytest.approx(4 / 16)
    assert overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0
    assert overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0


@given(st.lists(st.integers(0, 1000), min_size=8, max_size=8))
def test_overlap_is_symmetric_and_one_only_for_equal_boxes(numbers: list[int]) -> None:
    one = (*sorted(numbers[0:2]), *sorted(numbers[2:4]))
    two = (*sorted(numbers[4:6]), *sorted(numbers[6:8]))
    a, b = (one[0], one[2], one[1], one[3]), (two[0], two[2], two[1], two[3])
    assert overlap(a, b) == overlap(b, a)
    if overlap(a, b) == 1.0:
        assert a == b


@pytest.mark.parametrize(
    "answer",
    [
        box(300, 400, 100, 200),  # corners swapped
        box(300, 200, 100, 400),
        box(100, 200, 300, 1001),  # out of range
        box(-1, 200, 300, 400),
        box(0.1, 0.2, 0.3, 0.4).replace("0.3", "0.05"),
        box(100, 200, 100, 400),  # empty
        '[{"bbox_2d": [NaN, 200, 300, 400]}]',
        '[{"bbox_2d": [100, 200, Infinity, 400]}]',
        '[{"bbox_2d": [100, 200, 300]}]',
        '[{"bbox_2d": ["100", "200", "300", "400"]}]',
        '[{"bbox_2d": [100, 200, 300, 400',  # cut off
        '[{"bbox": [100, 200, 300, 400]}]',
        "[100, 200, 300, 400]",
        '[{"point_2d": [200, 300]}]',
        BOX + box(1, 2, 3, 4),  # two answers
        BOX + '[{"bbox_2d": [1, 2, 3]}]',
        "[]",
    ],
)
def test_a_malformed_or_a_second_box_scores_nothing(answer: str) -> None:
    assert score("iou", answer, TRUTHS["iou"]) == 0.0


def test_the_same_box_twice_or_fenced_or_after_its_list_was_cut_off_is_one_box() -> None:
    assert score("iou", BOX + BOX, TRUTHS["iou"]) == 1.0
    assert score("iou", f"Here:\n```json\n{BOX}\n```", TRUTHS["iou"]) == 1.0
    assert score("iou", BOX[:-1], TRUTHS["iou"]) == 1.0
    assert score("iou", box(200, 200, 400, 400), TRUTHS["iou"]) == pytest.approx(1 / 3)


def test_a_truth_whose_box_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="the truth's 'box' is"):
        score("iou", BOX, {"box": [300, 400, 100, 200]})
    with pytest.raises(ValueError, match="give 4 finite numbers"):
        score("iou", BOX, {"box": [0, 0, math.nan, 1]})


def test_boxes_are_matched_one_to_one_and_f1_counts_the_rest() -> None:
    truth = TRUTHS["boxes_f1"]
    both = RIGHT["boxes_f1"]
    one = '{"bbox_2d": [100, 200, 300, 400]}'
    assert score("boxes_f1", f"[{one}]", truth) == pytest.approx(2 / 3)
    assert score("boxes_f1", f"[{one}, {one}]", truth) == pytest.approx(2 / 4)
    assert score("boxes_f1", both[:-1] + ', {"bbox_2d": [0, 0, 9, 9]}]', truth) == pytest.approx(4 / 5)
    assert score("boxes_f1", both[:-1] + ', {"bbox_2d": [0, 0, 9]}]', truth) == pytest.approx(4 / 5)
    assert score("boxes_f1", both[: both.index("700")], truth) == pytest.approx(2 / 3)
    assert score("boxes_f1", '[{"bbox_2d": [700, 700, 500, 500]}, ' + one + "]", truth) == pytest.approx(2 / 4)
    everywhere = [{"bbox_2d": [x, y, x + 200, y + 200]} for x in range(0, 801, 20) for y in range(0, 801, 20)]
    assert score("boxes_f1", json.dumps(everywhere), truth) < 0.01


def test_matching_finds_the_most_pairs_where_greed_finds_fewer() -> None:
    truth = {"boxes": [[0, 0, 100, 100], [0, 0, 100, 150]]}
    # The first fits both and best the second; the second fits only the second at 0.5.
    answer = '[{"bbox_2d": [0, 0, 100, 130]}, {"bbox_2d": [0, 0, 100, 220]}]'
    assert score("boxes_f1", answer, truth) == 1.0


def test_labels_count_where_the_truth_has_them() -> None:
    truth = {"boxes": [[100, 200, 300, 400]], "labels": ["red circle"]}
    assert score("boxes_f1", BOX.replace("red circle", "Red circle"), truth) == 1.0
    assert score("boxes_f1", BOX.replace("red", "blue"), truth) == 0.0


def test_finding_nothing_is_right_only_where_nothing_is_and_only_when_said() -> None:
    assert score("boxes_f1", "```json\n[]\n```", {"boxes": []}) == 1.0
    assert score("boxes_f1", "", {"boxes": []}) == 0.0
    assert score("boxes_f1", BOX, {"boxes": []}) == 0.0
    assert score("boxes_f1", "[]", TRUTHS["boxes_f1"]) == 0.0


def test_a_point_lies_in_the_box_with_its_edges() -> None:
    truth = TRUTHS["point_in_box"]
    assert score("point_in_box", '{"point_2d": [100, 400]}', truth) == 1.0
    assert score("point_in_box", '{"point_2d": [99, 400]}', truth) == 0.0
    assert score("point_in_box", BOX, truth) == 0.0


# ---- times --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "times"),
    [
        ("3.4 seconds", [3.4]),
        ("<3.4 seconds>", [3.4]),
        ("At 3.4s.", [3.4]),
        ("3.4", [3.4]),
        ("0:03.4", [3.4]),
        ("00:00:03.4", [3.4]),
        ("1:02:03", [3723.0]),
        ("1 minute 3 seconds", [63.0]),
        ("2 min", [120.0]),
        ("-3.4 seconds", []),
        ("0:61", []),
        ("1:60:00", []),
        ("nan seconds", []),
        ("3.4.5", []),
    ],
)
def test_times_are_read_in_seconds_and_in_hours_minutes_seconds(answer: str, times: list[float]) -> None:
    assert times_in(answer) == pytest.approx(times)


@pytest.mark.parametrize(("said", "right"), [(3.4, 1.0), (3.9, 1.0), (2.9, 1.0), (4.0, 0.0), (2.8, 0.0)])
def test_a_time_within_half_a_second_is_right_on_either_side(said: float, right: float) -> None:
    assert score("temporal", f"{said:.1f} seconds", {"seconds": 3.4}) == right
    assert score("temporal", "3.4 seconds", {"seconds": said}) == right


@pytest.mark.parametrize(
    "answer",
    [
        "<10.2 seconds> to <15.0 seconds>",
        '{"start": 10.2, "end": 15.0}',
        '{"end": "0:15", "start": "0:10.2"}',
        "[10.2, 15.0]",
        "It starts at 10.2 and ends at 15.0.",
        "between 10.2 and 15",
        "10.2—15",
        "10.2 - 15",
        "10.2-15 s",
        "0:10.2 - 0:15.0",
        "00:00:10.2 to 00:00:15",
        "10.2 to 15 seconds, that is 0:10.2 to 0:15",
    ],
)
def test_spans_are_read_in_every_usual_spelling(answer: str) -> None:
    assert one_span(answer) == (10.2, 15.0)


@pytest.mark.parametrize("answer", ["10", "10 to 15, or 20 to 30", "10, 15, 20", "", "from start to end"])
def test_what_is_no_single_span_is_none(answer: str) -> None:
    assert one_span(answer) is None


def test_spans_are_scored_by_overlap_and_reversed_ones_not_at_all() -> None:
    truth = {"span": [10.0, 15.0]}
    assert score("temporal_iou", "12 to 17", truth) == pytest.approx(3 / 7)
    assert score("temporal_iou", "15 to 20", truth) == 0.0
    assert score("temporal_iou", "15 to 10", truth) == 0.0
    assert score("temporal_iou", "12 to 12", truth) == 0.0
    assert score("temporal_iou", "12 to 17", truth) == score("temporal_iou", "10 to 15", {"span": [12, 17]})
