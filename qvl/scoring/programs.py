"""Scores programs by their tests: each test runs in a sandbox of its own, and all must pass."""

from collections.abc import Mapping, Sequence

from qvl.outside.sandbox import SandboxLimits, run_program
from qvl.scoring.score import Score


def programs(program: str, tests: Sequence[Mapping[str, str]], *, seconds: float, mebibytes: int) -> Score:
    """1 where the program answers each test's `stdin` with its `stdout`, else 0; stops at the first that fails.

    `seconds` and `mebibytes` bound each test alone. Spaces at the ends of lines and line ends after the last line do not count. A run
    that exits with an error fails, whatever it printed. Raises SandboxError where this machine cannot isolate programs.
    """
    if not tests:
        raise ValueError("the program has no tests; it needs at least one {stdin, stdout}.")
    limits = SandboxLimits(seconds=seconds, mebibytes=mebibytes)
    for number, test in enumerate(tests, start=1):
        ran = run_program(program, stdin=test["stdin"], limits=limits)
        if ran.killed_by:
            return _failed(number, len(tests), f"ended at its limit of {ran.killed_by}")
        if ran.exit:
            return _failed(number, len(tests), f"exited with {ran.exit}")
        if trimmed(ran.stdout) != trimmed(test["stdout"]):
            return _failed(number, len(tests), "printed something else")
    return Score(value=1.0, extracted=program, path="rule")


def trimmed(output: str) -> str:
    """What is compared of an output."""
    return "\n".join(line.rstrip() for line in output.replace("\r\n", "\n").split("\n")).rstrip("\n")


def _failed(number: int, count: int, what: str) -> Score:
    return Score(value=0.0, extracted=None, path="rule", reason=f"Test {number} of {count}: the program {what}.")
