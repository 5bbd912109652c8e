"""Scorers of words and choices: equal, contained, near by edit distance, the right letter, the right number."""

import math
import re
import unicodedata

from rapidfuzz.distance import Levenshtein

from qvl.scoring.choices import choice_letter
from qvl.scoring.extract import final_text, normalised, one_number, short_answer
from qvl.scoring.truth import Truth, golds, needed


def exact(answer: str, truth: Truth) -> float:
    """1 if the short answer equals truth["answer"], or one of them, once normalised."""
    said = short_answer(answer)
    return float(said is not None and normalised(said) in {normalised(gold) for gold in golds(truth)})


def contains(answer: str, truth: Truth) -> float:
    """1 if the answer holds truth["answer"] as whole words and none of truth["others"], the wrong answers one might list along."""
    final = final_text(answer)
    if final is None:
        return 0.0
    others = golds(truth, "others") if truth.get("others") else []
    wanted = golds(truth)
    if not all(normalised(text) for text in (*wanted, *others)):
        raise ValueError("an empty text is contained in everything; give words as answer and others.")
    said = normalised(final)
    return float(any(_holds(said, gold) for gold in wanted) and not any(_holds(said, other) for other in others))


def text(answer: str, truth: Truth) -> float:
    """1 - edits / length of the longer, against truth["text"] or the best of several. Case counts, runs of spaces do not."""
    final = final_text(answer)
    if final is None:
        return 0.0
    said = _spaced(final)
    return max(Levenshtein.normalized_similarity(said, _spaced(gold)) for gold in golds(truth, "text"))


def choice(answer: str, truth: Truth) -> float:
    """1 if the answer chooses truth["choice"] among truth["letters"]; truth["options"] are their texts, where known."""
    letters, right = list(needed(truth, "letters")), needed(truth, "choice")
    options = list(truth.get("options", ()))
    if right not in letters or (options and len(options) != len(letters)):
        raise ValueError(
            f"the truth has letters {letters}, {len(options)} options and the choice {right!r}; make them fit."
        )
    return float(choice_letter(answer, letters, options) == right)


def number(answer: str, truth: Truth) -> float:
    """1 if the one number of the answer is truth["number"] within truth["tolerance"] (0 without)."""
    said, right = one_number(answer), float(needed(truth, "number"))
    return float(said is not None and math.isfinite(said) and abs(said - right) <= truth.get("tolerance", 0.0))


def count(answer: str, truth: Truth) -> float:
    """As `number`, for whole numbers from 0."""
    right = needed(truth, "number")
    if not isinstance(right, int) or right < 0:
        raise ValueError(f"the truth's 'number' is {right!r}; a count is a whole number from 0.")
    return float(one_number(answer) == right)


# ---- what these read, for people -----------------------------------------------------------------------------------


def read_short(answer: str, truth: Truth) -> str | None:
    return short_answer(answer)


def read_final(answer: str, truth: Truth) -> str | None:
    return final_text(answer)


def read_choice(answer: str, truth: Truth) -> str | None:
    return choice_letter(answer, list(needed(truth, "letters")), list(truth.get("options", ())))


def read_number(answer: str, truth: Truth) -> str | None:
    said = one_number(answer)
    return None if said is None or not math.isfinite(said) else f"{said:.15g}"


# ---- helpers ------------------------------------------------------------------------------------------------------

_UNSPACED = r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
_SPACED = r"[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
"""Kana and Chinese characters; letters and digits of all other scripts."""


def _holds(said: str, wanted: str) -> bool:
    """As whole words; where a script has no spaces between words, anywhere."""
    wanted = normalised(wanted)
    start, end = (
        "" if re.match(_UNSPACED, edge) else bound
        for edge, bound in ((wanted[:1], rf"(?<!{_SPACED})"), (wanted[-1:], rf"(?!{_SPACED})"))
    )
    return re.search(f"{start}{re.escape(wanted)}{end}", said) is not None


def _spaced(value: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", value).split())
