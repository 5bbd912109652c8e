"""Pydantic's list of mistakes becomes one sentence about one field. What the client sent is not quoted back, but for names of fields."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qvl.core.config import near_miss
from qvl.serve.protocol import NOT_TAKEN

WRONG_KIND = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_type": "text",
    "union_tag_invalid": "an object whose type is {expected_tags}",
    "union_tag_not_found": "an object whose type says what it is",
}
"""Mistakes of which a field of several kinds reports one for each: what was expected."""
WRONG_VALUE = {
    "finite_number": "must be a number that is neither infinite nor NaN",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "missing": "is missing",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have {min_length} or more characters",
    "too_long": "must have at most {max_length} items",
    "too_short": "must have {min_length} or more items",
    "string_pattern_mismatch": "must be written as {pattern} says",
}
_BRANCH = re.compile(r"[\[\]()' -]|^[A-Z]")
"""A step of pydantic's path that names one of a field's kinds and no field."""


def read_validation(mistakes: Sequence[Mapping[str, Any]], fields: Iterable[str]) -> tuple[str, str | None]:
    """One sentence, and the field it is about; `fields` are those of the route."""
    first = mistakes[0]
    if first["type"] == "json_invalid":
        return "The request is no valid JSON.", None
    about = [mistake for mistake in mistakes if mistake["loc"][:2] == first["loc"][:2]]
    # A list that is too long is not "no text" first of all.
    first = next((mistake for mistake in about if mistake["type"] not in WRONG_KIND), first)
    place = [str(step) for step in first["loc"] if step != "body" and not _BRANCH.search(str(step))]
    param = ".".join(place)[:200] or None
    if first["type"] == "extra_forbidden" and place:
        if param in NOT_TAKEN:
            return f"{param} is not taken. {NOT_TAKEN[param]}", param
        advice = near_miss(place[-1], fields) if len(place) == 1 else ""
        return f"Unknown field {param!r}{advice}{'' if advice.endswith('?') else '.'}", param
    if first["type"] in WRONG_KIND:
        kinds = dict.fromkeys(_words(WRONG_KIND, mistake) for mistake in about if mistake["type"] in WRONG_KIND)
        return f"{param or 'The request'} must be {' or '.join(kinds)}.", param
    if first["type"] in WRONG_VALUE:
        return f"{param or 'The request'} {_words(WRONG_VALUE, first)}.", param
    words = str(first["msg"]).removeprefix("Value error, ")
    return f"{param}: {words}" if param else words, param


def _words(table: Mapping[str, str], mistake: Mapping[str, Any]) -> str:
    return table[mistake["type"]].format(**mistake.get("ctx", {}))
