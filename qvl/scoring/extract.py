"""What an answer finally says, cut out of the words around it. Two different answers are none."""

import re
import unicodedata
from collections.abc import Iterable

from qvl.scoring.numerals import numbers_in

LONGEST = 100_000
"""Characters of an answer, its thought not counted, that are read at all."""

# Spaces are counted in all these, so that a long blank answer costs no more than any other.
_SAID = re.compile(r"(?:\banswer\s{0,3}(?:is\s{0,3}[:=]?|[:=])|答案\s{0,3}(?:是|为|[:=]))\s{0,3}(?=\S)", re.IGNORECASE)

_LINE = re.compile("[^\\n\\r\\v\\f\\x1c-\\x1e\\x85\\u2028\\u2029]*")
"""What str.splitlines calls a line."""


def final_text(text: str) -> str | None:
    """What stands after the last `</think>`. None when a thought was opened and never closed: there is no answer yet."""
    opened, closed = text.rfind("<think>"), text.rfind("</think>")
    if opened > closed:
        return None
    start = closed + len("</think>") if closed >= 0 else 0
    return text[start : start + LONGEST].strip()  # a thought may be as long as it likes


def only(found: Iterable[str | None]) -> str | None:
    """The one thing that was found, however often; None when it was nothing or not one."""
    distinct = set(found)
    return distinct.pop() if len(distinct) == 1 else None


def boxes_of(text: str) -> list[str | None]:
    r"""The contents of every `\boxed{...}`, braces balanced; None for one that is cut off. Empty when there are more than a hundred."""
    found: list[str | None] = []
    starts = [match.end() for match in re.finditer(r"\\boxed\s{0,3}\{", text)]
    for start in starts if len(starts) <= 100 else ():
        depth = 1
        for at in range(start, min(len(text), start + 2000)):
            depth += (text[at] == "{") - (text[at] == "}")
            if depth == 0:
                found.append(_without_text_command(text[start:at]))
                break
        else:
            found.append(None)
    return found


def short_answer(text: str) -> str | None:
    r"""A `\boxed{}` if there is one, else what follows "answer:" or "the answer is" on its line, else the whole.

    None for an unclosed thought, for two different boxes, for two different sayings.
    """
    final = final_text(text)
    if final is None:
        return None
    if "\\boxed" in final:
        return only(boxes_of(final))
    said: str | None = None
    for match in _SAID.finditer(final):
        line = _LINE.match(final, match.end())
        assert line is not None
        if (
            said is not None and line[0].strip() != said
        ):  # at once, so that a long line is not read again at each of its sayings
            return None
        said = line[0].strip()
    return final if said is None else said


def one_number(text: str) -> float | None:
    """The number of the short answer; None when it holds none, or two that differ."""
    short = short_answer(text)
    numbers = set(numbers_in(short)) if short is not None else set()
    return numbers.pop() if len(numbers) == 1 else None


def normalised(text: str) -> str:
    """For comparing short answers: compatible forms, case, spaces, leading articles and marks around the answer do not count."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    text = text.strip(" .,:;!?\"'`*_()[]{}。，“”‘’")  # noqa: RUF001 - full-width marks are meant
    return re.sub(r"^(?:a|an|the) (?=\S)", "", text)


def _without_text_command(content: str) -> str:
    return re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", content).strip()
