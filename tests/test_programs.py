"""Programs scored by tests: all pass or nothing counts, and each test is a run of its own."""

import os
import random
import shutil

import pytest

from qvl.outside.sandbox import SandboxError
from qvl.scoring.programs import programs, trimmed
from qvl.scoring.rows_run import ROWS

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None and not os.environ.get("CI"), reason="bubblewrap is not installed"
)
DOUBLE = [{"stdin": "1\n", "stdout": "2\n"}, {"stdin": "21\n", "stdout": "42\n"}]


def value(program: str, tests: list[dict[str, str]] = DOUBLE, seconds: float = 20, mebibytes: int = 256) -> float:
    return programs(program, tests, seconds=seconds, mebibytes=mebibytes).value


def test_a_program_that_passes_every_test_scores_1() -> None:
    assert value("print(2 * int(input()))") == 1.0


def test_one_that_fails_a_test_scores_0_and_says_which() -> None:
    score = programs("print(2)", DOUBLE, seconds=20, mebibytes=256)
    assert (score.value, score.reason) == (0.0, "Test 2 of 2: the program printed something else.")


def test_one_that_prints_every_expected_output_fails() -> None:
    assert value("print(2)\nprint(42)") == 0.0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print(2 * int(input())); raise SystemExit(3)", "exited with 3"),
        ("while True: pass", "ended at its limit of time"),
        ("x = bytearray(10**10)", "ended at its limit of memory"),
        ("not python", "exited with 1"),
        ("", "printed something else"),
    ],
)
def test_a_run_that_does_not_end_well_fails(program: str, reason: str) -> None:
    score = programs(program, DOUBLE, seconds=1.5, mebibytes=256)
    assert (score.value, score.reason) == (0.0, f"Test 1 of 2: the program {reason}.")


def test_spaces_at_line_ends_and_line_ends_at_the_end_do_not_count() -> None:
    assert trimmed("a  \r\nb\t\n\n\n") == trimmed("a\nb") == "a\nb"
    assert trimmed("a\n\nb") != trimmed("a\nb")
    assert trimmed(" a") != trimmed("a")
    assert value("print('a  '); print('b'); print()", [{"stdin": "", "stdout": "a\nb"}]) == 1.0


def test_rows() -> None:
    row = {"program": "print(2 * int(input()))", "tests": DOUBLE, "seconds": 20, "mebibytes": 256}
    assert ROWS["code"](row) == 1.0
    assert ROWS["code"](row | {"program": "print(3)"}) == 0.0
    run = {"program": "print('hi'); raise SystemExit(4)", "seconds": 20, "mebibytes": 256}
    assert ROWS["sandbox"](run) == {"exit": 4, "stdout": "hi\n", "killed_by": None}
    assert ROWS["sandbox"](run | {"program": "while True: pass", "seconds": 0.5})["killed_by"] == "time"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"program": None}, "program is NoneType; expected a string"),
        ({"seconds": "5"}, "seconds is '5'; expected a number above zero"),
        ({"mebibytes": 0}, "mebibytes is 0; expected a number above zero"),
        ({"tests": {}}, "tests is dict; expected a list"),
        ({"tests": []}, "the program has no tests"),
        ({"tests": [["1", "2"]]}, "a test is list; expected an object with stdin and stdout"),
        ({"tests": [{"stdin": ""}]}, "the input has no 'stdout'; expected a string"),
    ],
)
def test_a_wrong_row_is_one_sentence(change: dict[str, object], message: str) -> None:
    row = {"program": "", "tests": DOUBLE, "seconds": 5, "mebibytes": 64} | change
    with pytest.raises(ValueError, match=message):
        ROWS["code"](row)


def test_where_nothing_isolates_there_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SandboxError, match="bubblewrap is not installed"):
        value("print(2)")


def test_random_programs_raise_nothing() -> None:
    rng = random.Random(0)
    pieces = [
        *"0123456789abc()[]{}+-*/=:,. \n\t\"'",
        "print",
        "def f",
        "import os",
        "\0",
        "\ud800",
        "三",
        "😀",
        "while 1:",
        "x" * 10_000,
    ]
    for _ in range(40):
        assert value("".join(rng.choices(pieces, k=rng.randint(0, 30))), seconds=1, mebibytes=64) in (0.0, 1.0)
