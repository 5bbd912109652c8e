"""Mathematical answers: what equals what, and that no string keeps its caller waiting."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from math_verify import parse, verify

from qvl.outside import maths as outside
from qvl.outside.maths import MathPool, math_pool
from qvl.scoring.maths import MAX_CHARACTERS, maths
from qvl.scoring.rows_run import ROWS

EQUAL = [
    ("1/2", r"\frac{1}{2}"),
    (r"\boxed{\frac12}", "0.5"),
    (r"50\%", "0.5"),
    (r"50\%", "50"),
    ("0.5", r"$50\%$"),
    ("(1,2)", "$(1,2)$"),
    (r"\{1, 2\}", r"$\{2,1\}$"),
    (r"$(-\infty, 3]$", r"(-\infty,3]"),
    (r"$(-\infty,3]$", r"$x \le 3$"),  # and not the other way round: verify is not symmetric
    (r"2\sqrt{3}", r"2\sqrt{3}"),
    (r"$\sqrt{12}$", r"2\sqrt{3}"),
    ("5 cm", "5"),
    ("5", r"5\text{ cm}"),
    ("x=5", "5"),
    (r"\boxed{B}", "B"),
    ("B", "B"),
    ("The answer is 42.", "42"),
    ("I thought 41, but then 42", "42"),
    (r"First \boxed{3}. Wait, no: it is \boxed{4}.", "4"),
    (r"\boxed{1}, \boxed{2}", r"$\{1,2\}$"),
    ("1,000", "1000"),
    ("x^2+1", "$1+x^2$"),
    (r"\pi", r"$\pi$"),
    ("3.0", "3"),
    (r"90^\circ", "90"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"$\begin{pmatrix}1&2\\3&4\end{pmatrix}$"),
    ("<think>It is 5.</think>6", "6"),
    ("reasoning " * 5000 + r"so \boxed{\frac{3}{4}}", "0.75"),
    (r"\boxed{7}" + " as I said" * 5000, "7"),
    ("9^{9^{9}}", "9^{9^{9}}"),  # too large to compute, but the same
]
DIFFERENT = [
    ("[1,2]", "(1,2)"),
    ("2", r"2\sqrt{3}"),
    (r"$x \le 3$", r"$(-\infty,3]$"),
    ("A", "B"),
    ("-3", "3"),
    ("0.33", "1/3"),
    ("<think>5</think>6", "5"),
    ("<think>5", "5"),
    ("", "5"),
    ("", ""),
    ("no idea", "5"),
    ("5", "6"),
]
HOSTILE = [
    *("9**9**9", "9^{9^{9}}", "$9^{9^{9}}$", "((10!)!)!", "$((10!)!)!$", "{" * 3000, "1 " * 20_000, "a" * 100_000),
    *(r"\frac{1}{2}" * 10_000, "$" + "x+" * 50_000 + "1$", r"\boxed{" * 1000, r"\boxed{5", "}" * 5000, "(" * 39 + "x" + ")" * 39),
    *("$(x+1)^{99999}$", r"$\sum_{i=1}^{10000000} i!$", r"$\int_0^1 e^{e^{e^x}} dx$", r"$\prod_{n=1}^{99999} n^n$", "1/" * 2000),
    *("$" * 4000, r"$\sqrt{" * 500, "1" * 100_000, "9" * 900 + "!", "x^2^2^2^2^2^2^2", "$((((9^9)^9)^9)^9)^9$", "\0", "\ud800", "²³" * 500),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    maths("1", "1")


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_equal_answers_score_1(answer: str, gold: str) -> None:
    assert maths(answer, gold).value == 1.0


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different_answers_score_0(answer: str, gold: str) -> None:
    score = maths(answer, gold)
    assert score.value == 0.0
    assert (score.path == "failed") == bool(score.reason)


def test_marked_strings_are_scored_as_math_verify_scores_them() -> None:
    texts = [
        "$1$",
        r"$\frac{1}{2}$",
        r"$50\%$",
        "$(1,2)$",
        "$[1,2]$",
        r"\boxed{0.5}",
        r"$\{1,2\}$",
        "$x=1$",
        r"$x \le 2$",
        "$B$",
    ]
    for gold in texts:
        for answer in texts:
            want = verify(parse(gold, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None)  # pyright: ignore
            assert maths(answer, gold).value == float(want), (answer, gold)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_a_hostile_string_ends_in_two_seconds_with_a_value(text: str) -> None:
    for answer, gold in ((text, "-7"), ("-7", text)):
        start = time.monotonic()
        assert maths(answer, gold).value == 0.0
        assert time.monotonic() - start < 2.0


def test_what_takes_too_long_says_so_and_the_next_answer_does_not_wait() -> None:
    score = maths("$(x+1)^{99999}$", "1")
    assert (score.path, score.reason) == ("failed", "The comparison took longer than 1.5 seconds.")
    start = time.monotonic()
    assert maths("1", "1").value == 1.0
    assert time.monotonic() - start < 1.5


def test_a_worker_that_dies_costs_one_answer() -> None:
    with MathPool() as pool:
        assert maths("1", "1", pool=pool).value == 1.0
        (worker,) = pool._workers._live
        threading.Timer(0.4, os.kill, (worker.process.pid, signal.SIGKILL)).start()
        score = maths("$(x+1)^{99999}$", "1", pool=pool)
        assert (score.value, score.path) == (0.0, "failed")
        assert score.reason == "The process that compares answers died; it is started again for the next one."
        assert maths("1", "1", pool=pool).value == 1.0


def test_no_child_outlives_its_alarm() -> None:
    maths("$(x+1)^{99999}$", "1")
    (worker,) = math_pool()._workers._live
    pid = worker.process.pid
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


def test_threads_share_a_pool() -> None:
    values: list[float] = []
    threads = [threading.Thread(target=lambda n=n: values.append(maths(str(n), "3").value)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(values) == [0.0] * 7 + [1.0]


def test_without_math_verify_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need math-verify, which is not installed; run: pip install 'qvl\[eval\]'"):
        MathPool()


PIECES = [*"0123456789abcxyz()[]{}^_+-*/=<>.,;:!%$\\ \n", r"\frac{1}{2}", r"\boxed{", "}", r"\sqrt{", r"\left(", "<think>", "</think>",
          r"\text{cm}", '{"a": [1', "答案", "三", "😀", "\u200b", r"\infty", r"\cup", "and", "$$", r"\(", r"\)"]  # fmt: skip


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_strings_raise_nothing(count: int) -> None:
    rng = random.Random(0)
    slow = 0
    for number in range(count):
        answer = "".join(rng.choices(PIECES, k=rng.randint(1, 12)))
        if number % 50 == 0:
            answer *= 100_000 // len(answer)
        start = time.monotonic()
        assert maths(answer, "17.25").value in (0.0, 1.0)
        slow += time.monotonic() - start > 2.5  # a busy machine may be late once
    assert slow <= 2


def test_only_the_end_of_a_long_answer_is_read() -> None:
    assert maths("17 " + "w " * MAX_CHARACTERS, "17").value == 0.0


def test_a_row_gives_1_or_0_and_says_what_is_wrong_with_it() -> None:
    assert ROWS["math"]({"answer": "$5$", "gold": "5"}) == 1
    assert ROWS["math"]({"answer": "$6$", "gold": "5"}) == 0
    with pytest.raises(ValueError, match="the input has no 'gold'; expected a string"):
        ROWS["math"]({"answer": "5"})
    with pytest.raises(ValueError, match="answer is int; expected a string"):
        ROWS["math"]({"answer": 5, "gold": "5"})
