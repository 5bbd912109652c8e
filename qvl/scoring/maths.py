"""Scores mathematical answers: numbers, fractions, intervals, sets, equations and units, compared as mathematics."""

import math
import re

from qvl.outside.maths import MathPool, math_pool
from qvl.scoring.extract import final_text
from qvl.scoring.score import Score

MAX_CHARACTERS = 4_000
"""Of an answer, around its last box or at its end: what is read. math-verify needs minutes for 20,000 numbers."""
MAX_DEPTH = 40
MAX_EXPONENT = 100_000
MAX_DIGITS = 1_000
"""Of one number."""


def maths(answer: str, gold: str, *, pool: MathPool | None = None) -> Score:
    r"""1 where the answer equals the gold as math-verify sees it, else 0, within two seconds whatever stands in either.

    Both are read as math-verify reads them: a `\boxed{}`, `$...$`, or the last plain number. A short expression without these marks is
    also read as if it had them, so `2\sqrt{3}` is not its 2. Reasoning up to `</think>` does not count.
    """
    final = final_text(answer)
    if final is None:
        return _failed("The answer's reasoning was never closed.")
    final, gold = _window(final), _window(gold.strip())
    if not final:
        return _failed("The answer is empty.")
    # A gold that is too much to compute can still be said letter by letter.
    same = Score(value=1.0, extracted=final, path="rule") if _squeezed(final) == _squeezed(gold) else None
    for name, text in (("gold", gold), ("answer", final)):
        if why := _hostile(text):
            return same or _failed(f"The {name} {why}.")
    bare = _as_formula(gold)
    golds = [bare, gold] if bare else [gold]
    spellings = [final, *filter(None, (_as_formula(final), _last_box(final)))]
    verdict = (pool or math_pool()).verify(golds, spellings)
    if verdict.equal is None or verdict.read is None:
        return same or _failed(verdict.reason)
    return Score(value=float(verdict.equal), extracted=verdict.read, path="rule")


def _failed(reason: str) -> Score:
    return Score(value=0.0, extracted=None, path="failed", reason=reason)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _window(text: str) -> str:
    r"""The last characters, or those from the last `\boxed` where that stands before them."""
    if len(text) <= MAX_CHARACTERS:
        return text
    box, start = text.rfind("\\boxed"), len(text) - MAX_CHARACTERS
    start = min(box, start) if box >= 0 else start
    return text[start : start + MAX_CHARACTERS]


_BOX = re.compile(r"\\boxed\s{0,3}\{[^{}]{0,500}(?:\{[^{}]{0,500}\}[^{}]{0,500}){0,20}\}")
_LIST = re.compile(r"\b(?:and|or)\b|[\s,;$、和或]")


def _last_box(text: str) -> str | None:
    r"""The last of several boxes, where words stand before it: `\boxed{3}. Wait, it is \boxed{4}` says 4; math-verify reads both."""
    boxes = list(_BOX.finditer(text))[-2:]
    if len(boxes) < 2 or not _LIST.sub("", text[boxes[0].end() : boxes[1].start()]):
        return None
    return boxes[1].group()


# ---- what is no answer but an attack -----------------------------------------------------------------------------

_POWER = r"\s{0,3}(?:\^|\*\*)[\s{(]{0,6}"
_EXPONENT = re.compile(rf"{_POWER}(?P<first>\d{{1,400}})(?:{_POWER}(?P<second>\d{{1,400}}))?")
_FACTORIAL = re.compile(r"\d{4,}[\s)}\]]{0,6}!|![\s)}\]]{0,6}!")
_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")


def _hostile(text: str) -> str | None:
    """Why a text is not handed on, as the end of a sentence; None where it may be. Linear in its length.

    What slips through ends by the clock; this spares the second and a half.
    """
    depth = 0
    for letter in text:
        depth = depth + 1 if letter in "{[(" else max(0, depth - (letter in "}])"))
        if depth > MAX_DEPTH:
            return f"is nested deeper than {MAX_DEPTH} brackets"
    for match in _EXPONENT.finditer(text):
        first, second = int(match["first"]), int(match["second"] or 1)
        if first > MAX_EXPONENT or second * math.log(max(first, 1)) > math.log(MAX_EXPONENT):
            return f"has an exponent above {MAX_EXPONENT:,}"
    if _FACTORIAL.search(text):
        return "has a factorial of a factorial or of a number above 999"
    if _LONG_NUMBER.search(text):
        return f"has a number of more than {MAX_DIGITS:,} digits"
    return None


# ---- expressions without marks -----------------------------------------------------------------------------------

_MARKS = re.compile(r"\$|\\\(|\\\[|\\boxed|\\fbox|\\begin\{(?:equation|align|math)")
_NUMBER = re.compile(r"[+-]?[\d.,]+%?")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")


def _as_formula(text: str) -> str | None:
    """A short expression with the marks that math-verify looks for; None where it has some, is a plain number, or is prose."""
    text = text.strip().rstrip(".。").strip()
    if not text or len(text) > 300 or "\n" in text or _MARKS.search(text) or _NUMBER.fullmatch(text):
        return None
    if _WORD.search(re.sub(r"\\(?:text|mathrm|operatorname|begin|end)\s?\{[^{}]*\}", "", text)):
        return None
    return f"${text}$"
