"""Scorers of text: the public definitions to the last digit, each trap by name, and that no string raises or hangs."""

import json
import math
import random
import statistics as stdlib_statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.scoring.documents import anls, edit_distance, ocrbench, relaxed_pix2struct, relaxed_strict
from qvl.scoring.ngrams import cider, rouge_l
from qvl.scoring.rows_text import ROWS
from qvl.scoring.statistics import mean_relative_accuracy, pass_rates, standard_error

# ---- documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "golds", "value"),
    [
        ("Paris", ["paris"], 1.0),
        ("  PARIS \n", ["Paris"], 1.0),
        ("new  york", ["New York"], 1.0),  # a run of spaces is one
        ("newyork", ["New York"], 1 - 1 / 8),  # a missing space is an edit
        ("parsi", ["Paris"], 1 - 2 / 5),
        ("ab", ["ax"], 0.5),  # 0.5 exactly scores
        ("abcde", ["abxyz"], 0.0),  # 0.4 does not
        ("stra\u00dfe", ["STRASSE"], 1 - 2 / 7),
        ("\uff21\uff22", ["AB"], 0.0),  # full-width letters are others, as in the script
        ("", [""], 1.0),
        ("", ["a"], 0.0),
        ("a", [""], 0.0),
        ("42", ["forty-two", "42", "x"], 1.0),  # the best gold counts
        ("<think>Rome</think>Paris", ["Paris"], 1.0),
        ("<think>Paris", ["Paris"], 0.0),
    ],
)
def test_anls_is_one_less_the_edits_by_the_longer_and_nothing_below_a_half(
    answer: str, golds: list[str], value: float
) -> None:
    assert anls(answer, golds) == pytest.approx(value, abs=1e-15)


WORDS = st.text(alphabet="ab \u00df\u00e9\u4e2d", max_size=12)


@given(one=WORDS, two=WORDS, more=st.lists(WORDS, max_size=3))
def test_anls_is_bounded_symmetric_one_for_itself_and_a_gold_more_never_lowers_it(
    one: str, two: str, more: list[str]
) -> None:
    value = anls(one, [two])
    assert 0.0 <= value <= 1.0
    assert anls(one, [one]) == 1.0
    assert anls(two, [one]) == pytest.approx(value)
    assert anls(one, [two, *more]) >= value


@pytest.mark.parametrize(
    ("answer", "gold", "distance", "normalised"),
    [
        ("kitten", "sitting", 3, 3 / 7),
        ("", "", 0, 0.0),
        ("", "abc", 3, 1.0),
        ("abc", "", 3, 1.0),
        ("abc", "ABC", 3, 1.0),  # case counts
        (" abc\n", "abc", 2, 2 / 5),
        ("a b", "ab", 1, 1 / 3),  # spaces count
        ("\u4e2d\u6587", "\u4e2d\u56fd", 1, 0.5),
        ("<think>x</think>\n\nabc", "abc", 0, 0.0),
        ("<think>abc", "abc", 3, 1.0),
    ],
)
def test_edit_distance_counts_characters_and_is_normalised_by_the_longer_length(
    answer: str, gold: str, distance: int, normalised: float
) -> None:
    assert edit_distance(answer, gold) == {"distance": distance, "normalised": normalised}


@pytest.mark.parametrize(
    ("answer", "golds", "dataset", "value"),
    [
        ("The sign says STOP.", ["stop"], "", 1.0),
        ("s top", ["stop"], "", 0.0),
        ("the\nsign", ["the sign"], "", 1.0),  # line ends are spaces
        ("no", ["yes", "no"], "", 1.0),
        ("anything", [""], "", 0.0),  # an empty gold never counts
        ("anything", [" \n"], "", 0.0),
        ("anything", ["", "any"], "", 1.0),
        ("", ["a"], "", 0.0),
        (r"\frac { a } { b }", [r"\frac{a}{b}"], "HME100k", 1.0),
        (r"\frac { a } { b }", [r"\frac{a}{b}"], "TextVQA", 0.0),
        ("x = A", ["x=a"], "HME100k", 0.0),  # case counts in formulas
        ("<think>stop</think>go", ["stop"], "", 0.0),
        ("<think>stop", ["stop"], "", 0.0),
    ],
)
def test_ocrbench_asks_for_one_gold_inside_the_answer(
    answer: str, golds: list[str], dataset: str, value: float
) -> None:
    assert ocrbench(answer, golds, dataset) == value


@pytest.mark.parametrize(
    ("answer", "gold", "published", "strict"),
    [
        ("5", "5", 1, 1),
        ("105", "100", 1, 1),  # exactly 5 % is within
        ("95", "100", 1, 1),
        ("105.1", "100", 0, 0),
        ("94.9", "100", 0, 0),
        ("-3", "-3.1", 1, 1),
        ("3", "-3", 0, 0),
        ("1e2", "100", 1, 1),
        ("0.0", "0", 0, 1),  # the published rule compares a gold of 0 as text
        ("0", "0", 1, 1),
        ("0.1", "0", 0, 0),
        ("1,000", "1000", 0, 1),
        ("5%", "5", 0, 1),
        ("5", "5%", 0, 1),
        ("5%", "5%", 1, 1),
        ("5%", "0.05", 1, 1),
        ("$5", "5", 0, 1),
        ("5 km", "5", 0, 1),
        ("5 km", "5 miles", 0, 0),
        ("5 million", "5,000,000", 0, 1),
        ("1950", "2019", 1, 0),  # years get 5 % in the published rule
        ("2019", "2019", 1, 1),
        ("2019.0", "2,019", 0, 1),
        ("Yes", "yes", 1, 1),
        ("yes.", "Yes", 0, 1),
        ("no", "yes", 0, 0),
        ("nan", "nan", 0, 1),  # published: a number near nothing; strict: the same word
        ("nan", "5", 0, 0),
        ("inf", "5", 0, 0),
        ("inf", "inf", 0, 1),
        ("", "5", 0, 0),
        ("[3, 4]", "[3, 4]", 1, 1),
        ("3.1, 4", "[3, 4]", 0, 1),
        ("[4, 3]", "[3, 4]", 0, 0),
        ("[3]", "[3, 4]", 0, 0),
        ("The answer is 5", "5", 0, 1),
        ("<think>7</think>5", "5", 1, 1),
        ("<think>5", "5", 0, 0),
    ],
)
def test_relaxed_accuracy_as_published_and_strict(answer: str, gold: str, published: int, strict: int) -> None:
    assert (relaxed_pix2struct(answer, gold), relaxed_strict(answer, gold)) == (published, strict)


# ---- captions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        # rouge_score 0.1.2, RougeScorer(["rougeL"], use_stemmer=False), fmeasure
        ("the cat sat on the mat", "the cat is on the mat", 0.8333333333333334),
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("A Dog", "a dog runs in the park", 0.5),
        ("same words here", "same words here", 1.0),
        ("nothing shared", "at all", 0.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("<think>a b</think>c d", "c d", 1.0),
        ("<think>c d", "c d", 0.0),
        ("mat.", "mat", 0.0),  # words are split at spaces alone
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_words(answer: str, gold: str, value: float) -> None:
    assert rouge_l(answer, gold) == pytest.approx(value, abs=1e-15)


CORPUS_ANSWERS = {"1": "A cat sits on the mat", "2": "two dogs run in the park", "3": "a red car", "4": "", "5": "dog"}
CORPUS_GOLDS = {
    "1": ["a cat sits on a mat", "the cat is on the mat"],
    "2": ["dogs run in a park", "two dogs are running in the park", "two big dogs run"],
    "3": ["a red car", "a car that is red"],
    "4": ["nothing to see"],
    "5": ["a dog", "dog dog dog"],
}
CIDER_EACH = {
    "1": 4.821758649466018,
    "2": 3.2777663757489095,
    "3": 4.668932515586784,
    "4": 0.0,
    "5": 2.4035277287464822,
}
"""By pycocoevalcap's CiderScorer (n = 4, sigma = 6), words split at spaces."""


def test_cider_equals_the_published_computation() -> None:
    got = cider(CORPUS_ANSWERS, CORPUS_GOLDS)
    assert got["each"] == pytest.approx(CIDER_EACH, abs=1e-12)
    assert got["mean"] == pytest.approx(sum(CIDER_EACH.values()) / 5, abs=1e-12)
    shuffled = dict(reversed(CORPUS_GOLDS.items()))
    assert cider(CORPUS_ANSWERS, shuffled) == got


def test_cider_by_hand() -> None:
    """Two ids, no word shared between them: every n-gram weighs log 2, "a b" against itself has n-grams of 1 and 2 words alone."""
    got = cider({"x": "a b", "y": "c c c"}, {"x": ["a b"], "y": ["c d"]})
    # y: 1-grams: c three times, clipped to one: 1 / (3 sqrt 2). Length in pairs: 2 against 1.
    expected = 10 / 4 * (1 / (3 * math.sqrt(2))) * math.exp(-1 / 72)
    assert got["each"] == pytest.approx({"x": 5.0, "y": expected})


def test_cider_of_one_id_is_nothing_and_of_different_ids_an_error() -> None:
    assert cider({"x": "a b"}, {"x": ["a b"]}) == {"mean": 0.0, "each": {"x": 0.0}}
    with pytest.raises(ValueError, match="different ids or none"):
        cider({"x": "a"}, {"y": ["a"]})
    with pytest.raises(ValueError, match="no text for the ids"):
        cider({"x": "a"}, {"x": []})


# ---- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        ("10", 10, 1.0),
        ("9.9", 10, 1.0),
        ("9.4", 10, 0.9),
        ("11.2", 10, 0.8),
        ("8.8", 10, 0.8),
        ("5.1", 10, 0.1),
        ("15", 10, 0.0),  # 0.5 is not below 1 - 0.5
        ("20", 10, 0.0),
        ("ten", 10, 1.0),
        ("There are twelve.", 12, 1.0),
        ("about 2.5 meters", 2.5, 1.0),
        ("2.5m", 2.5, 1.0),
        (".5", 0.5, 1.0),
        ("20 m^2", 20, 1.0),
        ("20 m\u00b2", 20, 1.0),
        ("The room is 20 square meters.", 20, 1.0),
        (r"\boxed{20}", 20, 1.0),
        ("0", 0, 1.0),
        ("zero", 0, 1.0),
        ("0.1", 0, 0.0),
        ("-10", 10, 0.0),
        ("3 or 10", 10, 0.0),
        ("", 10, 0.0),
        ("nan", 10, 0.0),
        ("1e999", 10, 0.0),
        ("<think>7</think>10", 10, 1.0),
        ("<think>10", 10, 0.0),
    ],
)
def test_mean_relative_accuracy_over_ten_thresholds(answer: str, gold: float, value: float) -> None:
    assert mean_relative_accuracy(answer, gold) == value


def test_the_thresholds_are_those_of_the_official_script() -> None:
    official = 1 - np.linspace(0.5, 0.95, int((0.95 - 0.5) / 0.05 + 2))
    for said in np.arange(0.5, 20, 0.013):
        assert mean_relative_accuracy(f"{said:.3f}", 10.0) == (abs(float(f"{said:.3f}") - 10) / 10 < official).mean()


@pytest.mark.parametrize(
    ("samples", "correct", "k", "at", "hat"),
    [
        (10, 3, 1, 0.3, 0.3),
        (10, 3, 2, 1 - 21 / 45, 3 / 45),
        (10, 0, 5, 0.0, 0.0),
        (10, 10, 5, 1.0, 1.0),
        (5, 4, 2, 1.0, 6 / 10),
        (200, 1, 100, 0.5, 0.0),
        (1, 1, 1, 1.0, 1.0),
        (10_000, 1, 5_000, 0.5, 0.0),
    ],
)
def test_pass_at_k_and_pass_hat_k(samples: int, correct: int, k: int, at: float, hat: float) -> None:
    assert pass_rates(samples, correct, k) == {"pass_at_k": pytest.approx(at), "pass_hat_k": pytest.approx(hat)}


def test_pass_at_k_equals_the_published_product() -> None:
    for n in range(1, 30):
        for c in range(n + 1):
            for k in range(1, n + 1):
                published = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
                assert pass_rates(n, c, k)["pass_at_k"] == pytest.approx(published, abs=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0), (0, 0, 1)])
def test_impossible_counts_are_errors(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="is a whole number from"):
        pass_rates(samples, correct, k)


def test_standard_errors_equal_the_published_ones() -> None:
    """The two figures are Inspect's own test of its clustered error, and its plain one."""
    values = [float(i) for i in range(20)]
    assert standard_error(values, [i % 4 for i in range(20)])["clustered_stderr"] == pytest.approx(0.645, abs=5e-4)
    assert standard_error(values[:10])["stderr"] == pytest.approx(0.957, abs=5e-4)
    assert standard_error(values)["stderr"] == pytest.approx(stdlib_statistics.stdev(values) / math.sqrt(20))
    assert standard_error(values)["clustered_stderr"] is None


def test_clusters_of_one_are_the_plain_error_and_equal_members_count_as_one() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    got = standard_error(values, "abcde")
    assert got["clustered_stderr"] == pytest.approx(got["stderr"])
    doubled = standard_error(values * 2, "abcde" * 2)
    assert doubled["clustered_stderr"] == pytest.approx(got["stderr"])
    assert doubled["stderr"] < got["stderr"]


def test_one_value_or_one_cluster_has_no_spread_and_none_is_an_error() -> None:
    assert standard_error([0.5], ["a"]) == {"mean": 0.5, "stderr": 0.0, "clustered_stderr": 0.0}
    assert standard_error([0.0, 1.0], ["a", "a"])["clustered_stderr"] == 0.0
    with pytest.raises(ValueError, match="at least one"):
        standard_error([])
    with pytest.raises(ValueError, match="as many clusters as values"):
        standard_error([1.0, 2.0], ["a"])


# ---- rows ---------------------------------------------------------------------------------------------------------

INPUTS: dict[str, dict[str, Any]] = {
    "choice": {"answer": "The answer is (B).", "letters": ["A", "B"], "options": ["cat", "dog"]},
    "anls": {"answer": "Paris", "golds": ["paris"]},
    "relaxed_pix2struct": {"answer": "10.2", "gold": "10"},
    "relaxed_strict": {"answer": "$10.2", "gold": "10"},
    "edit_distance": {"answer": "kitten", "gold": "sitting"},
    "ocrbench": {"answer": "a + b", "golds": ["a+b"], "dataset": "HME100k"},
    "mra": {"answer": "nine", "gold": 10},
    "rouge_l": {"answer": "a b", "gold": "a c"},
    "cider": {"answers": {"x": "a b", "y": "c"}, "golds": {"x": ["a b"], "y": ["d"]}},
    "repetition": {"answer": "the cat " * 20},
    "language_mix": {"answer": "First we \u8ba1\u7b97 the area, \u7136\u540e add.", "prompt_language": "en"},
    "pass_at_k": {"samples": 10, "correct": 3, "k": 1},
    "standard_error": {"values": [0, 1, 1, 0], "clusters": ["a", "a", "b", "b"]},
}
VALUES: dict[str, Any] = {
    "choice": "B",
    "anls": 1.0,
    "relaxed_pix2struct": 1.0,
    "relaxed_strict": 1.0,
    "edit_distance": {"distance": 3, "normalised": 3 / 7},
    "ocrbench": 1.0,
    "mra": 0.8,
    "rouge_l": 0.5,
    "cider": {"mean": 2.5, "each": {"x": 5.0, "y": 0.0}},
    "repetition": True,
    "language_mix": True,
    "pass_at_k": {"pass_at_k": 0.3, "pass_hat_k": 0.3},
    "standard_error": {"mean": 0.5, "stderr": math.sqrt(1 / 3) / 2, "clustered_stderr": 0.0},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_scorer(name: str) -> None:
    value = ROWS[name](INPUTS[name])
    assert json.loads(json.dumps(value)) == VALUES[name]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_lacks_a_key_or_has_another_type_is_an_error_that_names_it(name: str) -> None:
    for key in INPUTS[name]:
        if key not in ("options", "dataset", "clusters"):
            with pytest.raises(ValueError, match=f"'{key}' is missing; give "):
                ROWS[name]({k: v for k, v in INPUTS[name].items() if k != key})
        with pytest.raises(ValueError, match=f"'{key}' is 'True'; give "):
            ROWS[name]({**INPUTS[name], key: True})


def test_options_may_be_given_by_letter_and_must_fit_the_letters() -> None:
    row = {"answer": "dog", "letters": ["A", "B"], "options": {"B": "dog", "A": "cat"}}
    assert ROWS["choice"](row) == "B"
    assert ROWS["choice"]({**row, "options": None, "letters": "AB"}) is None
    with pytest.raises(ValueError, match="'options' has 1 texts for 2 letters"):
        ROWS["choice"]({**row, "options": ["dog"]})
    with pytest.raises(ValueError, match="'A' is missing; give a text"):
        ROWS["choice"]({**row, "options": {"B": "dog"}})


def test_a_gold_number_may_be_a_number_or_its_text() -> None:
    assert ROWS["mra"]({"answer": "12", "gold": "twelve"}) == ROWS["mra"]({"answer": "12", "gold": 12}) == 1.0
    assert ROWS["relaxed_pix2struct"]({"answer": "5.1", "gold": 5}) == 1.0
    with pytest.raises(ValueError, match="'gold' is 'many'; give one finite number"):
        ROWS["mra"]({"answer": "12", "gold": "many"})


PIECES = [
    *"ab AB 019.,:;()[]{}<>$%\\/'\"\n\t-+*#|",
    "<think>",
    "</think>",
    '{"bbox_2d": [1, 2',
    '"}]',
    "\\boxed{",
    "\\frac{1}{2}",
    "answer is ",
    "Answer: A",
    "(B)",
    "the ",
    "million",
    "forty-",
    "1e999",
    "nan",
    "\u7b54\u6848\u662f",
    "\u4e2d\u6587",
    "\u3053\u3093",
    "\ud55c\uad6d",
    "\u0440\u0443\u0441",
    "\u0639\u0631",
    "\U0001f600",
    "\u00df",
    "\uff22",
    "\u0000",
]


def random_text(source: random.Random) -> str:
    if source.random() < 0.02:
        piece = source.choice(PIECES)
        return source.choice(PIECES) + piece * (source.choice([1_000, 20_000, 100_000]) // len(piece))
    return "".join(source.choice(PIECES) for _ in range(source.randrange(40)))


@pytest.mark.parametrize("name", [name for name in ROWS if "answer" in INPUTS[name] or name == "cider"])
def test_no_string_raises_or_takes_long(name: str) -> None:
    source = random.Random(7)
    row: Mapping[str, Any] = INPUTS[name]
    for _ in range(2_000):
        text = random_text(source)
        started = time.process_time()
        filled = {"answers": {"x": text, "y": "c"}} if name == "cider" else {"answer": text}
        json.dumps(ROWS[name]({**row, **filled}), allow_nan=False)
        assert time.process_time() - started < 2, (len(text), text[:50])
