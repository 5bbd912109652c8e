"""Reads the rows of `qvl score` for the scorers of text, choices and statistics: a row's input -> the value to print."""

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from qvl.scoring import documents, ngrams, quality, statistics
from qvl.scoring.choices import choice_letter
from qvl.scoring.numerals import numbers_in

Input = Mapping[str, Any]


def _choice(row: Input) -> str | None:
    letters = list(_text(row, "letters")) if isinstance(row.get("letters"), str) else _texts(row, "letters")
    options = row.get("options") or []
    if isinstance(options, Mapping):  # of letter to text
        options = [_text(options, letter) for letter in letters]
    elif options:
        options = _texts(row, "options")
    if options and len(options) != len(letters):
        raise ValueError(f"'options' has {len(options)} texts for {len(letters)} letters; give one for each letter.")
    return choice_letter(_text(row, "answer"), letters, options)


def _edit_distance(row: Input) -> dict[str, Any]:
    return {**documents.edit_distance(_text(row, "answer"), _text(row, "gold"))}


def _ocrbench(row: Input) -> float:
    dataset = _text(row, "dataset") if row.get("dataset") is not None else ""
    return documents.ocrbench(_text(row, "answer"), _texts(row, "golds"), dataset)


def _mra(row: Input) -> float:
    gold = row.get("gold")
    if isinstance(gold, str):
        found = numbers_in(gold)
        gold = found[0] if len(found) == 1 else None
    if not _is_number(gold):
        raise ValueError(_wrong(row, "gold", "one finite number"))
    return statistics.mean_relative_accuracy(_text(row, "answer"), float(gold))


def _cider(row: Input) -> dict[str, Any]:
    answers, golds = (_object(row, key) for key in ("answers", "golds"))
    return {
        **ngrams.cider({id: _text(answers, id) for id in answers}, {id: _texts(golds, id) for id in golds}),
    }


def _pass_at_k(row: Input) -> dict[str, Any]:
    return {**statistics.pass_rates(*(_whole(row, key) for key in ("samples", "correct", "k")))}


def _standard_error(row: Input) -> dict[str, Any]:
    values, clusters = row.get("values"), row.get("clusters")
    if not isinstance(values, list) or not all(isinstance(value, bool) or _is_number(value) for value in values):
        raise ValueError(_wrong(row, "values", "a list of finite numbers"))
    if clusters is not None and not (
        isinstance(clusters, list) and all(isinstance(c, str | int | float) for c in clusters)
    ):
        raise ValueError(_wrong(row, "clusters", "a list of texts or numbers, one for each value"))
    return {**statistics.standard_error([float(value) for value in values], clusters)}


ROWS: dict[str, Callable[[Input], Any]] = {
    "choice": _choice,
    "anls": lambda row: documents.anls(_text(row, "answer"), _texts(row, "golds")),
    "relaxed_pix2struct": lambda row: documents.relaxed_pix2struct(_text(row, "answer"), _amount(row, "gold")),
    "relaxed_strict": lambda row: documents.relaxed_strict(_text(row, "answer"), _amount(row, "gold")),
    "edit_distance": _edit_distance,
    "ocrbench": _ocrbench,
    "mra": _mra,
    "rouge_l": lambda row: ngrams.rouge_l(_text(row, "answer"), _text(row, "gold")),
    "cider": _cider,
    "repetition": lambda row: quality.repetition(_text(row, "answer")),
    "language_mix": lambda row: quality.language_mix(_text(row, "answer"), _text(row, "prompt_language")),
    "pass_at_k": _pass_at_k,
    "standard_error": _standard_error,
}
"""By the scorer's name. ValueError, in one sentence, for an input that lacks a key or has another type there; never for an answer."""


# ---- reading an input ----------------------------------------------------------------------------------------------


def _wrong(row: Input, key: str, expected: str) -> str:
    there = f"is {str(row[key])[:80]!r}" if key in row else "is missing"
    return f"the input's {key!r} {there}; give {expected}."


def _text(row: Input, key: str) -> str:
    if not isinstance(row.get(key), str):
        raise ValueError(_wrong(row, key, "a text"))
    return row[key]


def _texts(row: Input, key: str) -> list[str]:
    """A list of texts, or one text alone."""
    value = row.get(key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(_wrong(row, key, "a list of texts"))
    return list(texts)


def _amount(row: Input, key: str) -> str:
    """A text, or a number as JSON writes it."""
    value = row.get(key)
    return str(value) if _is_number(value) else _text(row, key)


def _whole(row: Input, key: str) -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(_wrong(row, key, "a whole number"))
    return value


def _object(row: Input, key: str) -> Input:
    value = row.get(key)
    if not isinstance(value, Mapping):
        raise ValueError(_wrong(row, key, "an object of id to text"))
    return value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
