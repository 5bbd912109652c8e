"""Scores answers about documents, charts and scene text: ANLS, relaxed accuracy, edit distance, OCRBench's containment."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import TypedDict

from rapidfuzz.distance import Levenshtein

from qvl.scoring.extract import LONGEST, final_text, normalised, short_answer

ANLS_THRESHOLD = 0.5
MAX_RELATIVE_CHANGE = 0.05


class EditDistance(TypedDict):
    distance: int
    """Characters inserted, deleted or replaced."""
    normalised: float
    """By the longer length; 0 for two empty texts."""


def anls(answer: str, golds: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of DocVQA for one answer: the best over `golds` of 1 - edits / longer length.

    A similarity below 0.5 is 0; 0.5 itself counts, as in the challenge's own script ("equal or bigger than 0.5"). Case does not count.
    Texts are stripped and runs of spaces inside are one space, before lengths are measured. Two empty texts are equal.
    """
    final = final_text(answer)
    if final is None:
        return 0.0
    said = _plain(final)
    best = max((_similarity(said, _plain(gold)) for gold in golds), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def edit_distance(answer: str, gold: str) -> EditDistance:
    """Levenshtein distance in characters, nothing normalised; an answer with a thought is what stands after it.

    An unclosed thought is an empty answer.
    """
    has_thought = "<think>" in answer or "</think>" in answer
    said = (final_text(answer) or "") if has_thought else answer[:LONGEST]
    distance = Levenshtein.distance(said, gold)
    return EditDistance(distance=distance, normalised=distance / max(len(said), len(gold), 1))


def ocrbench(answer: str, golds: Sequence[str], dataset: str = "") -> float:
    """1 if the answer contains one of the golds, by OCRBench's rule: lower case, stripped, line ends are spaces.

    For HME100k (handwritten formulas) case counts and spaces do not. An empty gold, contained in everything, never counts.
    """
    final = final_text(answer)
    if final is None:
        return 0.0
    is_formula = normalised(dataset) in ("hme100k", "handwritten mathematical expression recognition")

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if is_formula else text.lower()

    said = plain(final)
    return float(any(gold and gold in said for gold in map(plain, golds)))


# ---- relaxed accuracy ----------------------------------------------------------------------------------------------


def relaxed_pix2struct(answer: str, gold: str) -> float:
    """1 for a number within 5 % of the gold's, or else for the same text in any case: the rule Pix2Struct published for ChartQA.

    Kept as published: "5%" is 0.05, a gold of 0 is compared as text, "1,000" and "$5" are no numbers, years get their 5 % too.
    """
    final = final_text(answer)
    if final is None:
        return 0.0
    gold = gold.strip()
    said, right = _published_float(final), _published_float(gold)
    if said is not None and right:
        return float(abs(said - right) / abs(right) <= MAX_RELATIVE_CHANGE)
    return float(final.lower() == gold.lower())


def relaxed_strict(answer: str, gold: str) -> float:
    """1 for a number within 5 % of the gold's, read as a person reads: units and thousands' commas, exact years, lists.

    A year (a whole number from 1500 to 2100, without unit) must be equal. A unit may be missing on either side, not differ; "%" may be
    missing, and 5% is 0.05 too. A gold of 0 asks for 0. A list, "[a, b]", is compared item by item, in order. What is no number must be
    the same words. NaN and infinity are no numbers.
    """
    said = short_answer(answer)
    if said is None:
        return 0.0
    golds, items = _items(gold), _items(said)
    if golds is None:
        return float(_is_near(said, gold))
    items = items if items is not None else re.split(r"\s*[,;]\s+|\s+and\s+", said.strip(" ."))
    return float(len(items) == len(golds) and all(map(_is_near, items, golds)))


# ---- helpers -------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, two: str) -> float:
    longer = max(len(one), len(two))
    return 1 - Levenshtein.distance(one, two) / longer if longer else 1.0


def _published_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


_AMOUNT = re.compile(
    r"(?P<currency>[$€£¥₹])?\s{0,3}(?P<number>[-+]?(?:\d{1,3}(?:,\d{3}){1,9}|\d{1,300})?(?:\.\d{1,300})?(?:e[-+]?\d{1,3})?)"
    r"\s{0,3}(?P<scale>thousand|million|billion|trillion)?\s{0,3}(?P<unit>%|percent|[^\W\d_]{1,20}(?:/[^\W\d_]{1,20})?[23]?)?"
)
_SCALES = {None: 1.0, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}


def _amount(text: str) -> tuple[float, str] | None:
    """The number and its unit ("" where there is none); None for anything else."""
    text = unicodedata.normalize("NFKC", text[:1000]).replace("\u2212", "-").casefold().strip(" \t\n.:;!*`'\"")
    text = re.sub(r"^([-+])\s{0,3}([$€£¥₹])", r"\2\1", text)
    match = _AMOUNT.fullmatch(text)
    if match is None or not any(map(str.isdigit, match["number"])) or match["number"].startswith("e"):
        return None
    value = float(match["number"].replace(",", "")) * _SCALES[match["scale"]]
    unit = match["unit"] or match["currency"] or ""
    return (value, "%" if unit == "percent" else unit) if math.isfinite(value) else None


def _is_near(said: str, gold: str) -> bool:
    one, two = _amount(said), _amount(gold)
    if one is None or two is None:
        return normalised(said) == normalised(gold)
    (value, unit), (right, gold_unit) = one, two
    if unit and gold_unit and unit.rstrip("s") != gold_unit.rstrip("s"):
        return False
    if not gold_unit and right.is_integer() and 1500 <= right <= 2100 and "." not in gold and "," not in gold:
        return value == right
    factors = (1.0,) if (unit == "%") == (gold_unit == "%") else (1.0, 100.0 if gold_unit == "%" else 0.01)
    # 1e-9: exactly 5 % is within, however the floats round.
    return any(abs(value * f - right) <= abs(right) * MAX_RELATIVE_CHANGE * (1 + 1e-9) for f in factors)


def _items(text: str) -> list[str] | None:
    """The items of "[a, b]"; None for what is no list."""
    text = text.strip(" .")
    if not (text.startswith("[") and text.endswith("]")):
        return None
    return [item.strip(" '\"") for item in re.split(r"[,;](?!\d{3}(?!\d))", text[1:-1])]
