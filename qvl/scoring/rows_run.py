"""Rows of `qvl score` whose scorers run something: mathematics, code by tests, a program in the sandbox."""

from collections.abc import Callable, Mapping
from typing import Any

from qvl.outside.sandbox import SandboxLimits, run_program
from qvl.scoring.maths import maths
from qvl.scoring.programs import programs

_NAMES = {str: "a string", int: "a whole number", float: "a number above zero", list: "a list"}


def _math(row: Mapping[str, Any]) -> int:
    return int(maths(_value(row, "answer", str), _value(row, "gold", str)).value)


def _code(row: Mapping[str, Any]) -> float:
    tests = _value(row, "tests", list)
    for test in tests:
        if not isinstance(test, dict):
            raise ValueError(f"a test is {type(test).__name__}; expected an object with stdin and stdout.")
        _value(test, "stdin", str)
        _value(test, "stdout", str)
    return programs(_value(row, "program", str), tests, seconds=_limit(row, "seconds"), mebibytes=_mebibytes(row)).value


def _sandbox(row: Mapping[str, Any]) -> dict[str, Any]:
    limits = SandboxLimits(seconds=_limit(row, "seconds"), mebibytes=_mebibytes(row))
    ran = run_program(_value(row, "program", str), limits=limits)
    return {"exit": ran.exit, "stdout": ran.stdout, "killed_by": ran.killed_by}


def _value(row: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in row:
        raise ValueError(f"the input has no {key!r}; expected {_NAMES[kind]}.")
    if not isinstance(row[key], kind):
        raise ValueError(f"{key} is {type(row[key]).__name__}; expected {_NAMES[kind]}.")
    return row[key]


def _limit(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{key} is {value!r}; expected {_NAMES[float]}.")
    return float(value)


def _mebibytes(row: Mapping[str, Any]) -> int:
    return max(1, int(_limit(row, "mebibytes")))


ROWS: dict[str, Callable[[Mapping[str, Any]], Any]] = {"math": _math, "code": _code, "sandbox": _sandbox}
