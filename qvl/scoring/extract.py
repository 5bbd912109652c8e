"""What an answer finally says, cut out of the words around it. Two different answers are none."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from qvl.scoring.numerals import numbers_in

LONGEST = 100_000
"""Characters of an answer, its thought not counted, that are read at all."""

# Spaces are counted in all these, so that a long blank answer costs no more than any other.
_SAID = re.compile(r"(?:\banswer\s{0,3}(?:is\s{0,3}[:=]?|[:=])|答案\s{0,3}(?:是|为|[:=]))\s{0,3}(?=\S)", re.IGNORECASE)


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
    said = [line.strip() for m in _SAID.finditer(final) for line in final[m.end() :].splitlines()[:1]]
    return only(said) if said else final


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


# ---- letters ------------------------------------------------------------------------------------------------------

_NAMED = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s{1,3}is)?\s{0,3}[:=]?\s{0,3}[(\[*\"']{0,4}([A-Za-z])(?![A-Za-z'])(?P<close>[)\]*\"'.]{0,4})"
    r"(?P<rest>[ \t]{0,3}\w{0,12})",
    re.IGNORECASE,
)
_CHINESE = re.compile(r"(?:答案(?:是|为)?|选(?:择|项)?)\s{0,3}:?\s{0,3}\(?([A-Za-z])(?![A-Za-z])")
_MARKED = re.compile(
    r"\(([A-Za-z])\)|\[([A-Za-z])\]|\*\*\(?([A-Za-z])[.):]?\)?\*\*|^[ \t]{0,8}([A-Z])[ \t]?[.):](?=\s|$)", re.MULTILINE
)
_BARE = re.compile(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z'])")


def choice_letter(text: str, letters: Sequence[str], options: Sequence[str] = ()) -> str | None:
    r"""The one letter of `letters` that the answer chooses; None when it chooses none, or more than one.

    Looked for in this order, and the first kind that is there decides: a `\boxed{}`; "the answer is B", "option B"; a letter alone, in
    brackets, bold, or before its option; the words of one of `options`; a capital standing free. A letter before the words of another
    option is a contradiction.
    """
    final = final_text(text)
    if not final:
        return None
    final = unicodedata.normalize("NFKC", final)
    if "\\boxed" in final:
        return only(_chosen(content or "", letters, options) for content in boxes_of(final))
    named = [m[1].upper() for m in _NAMED.finditer(final) if _is_no_article(m[1], "" if m["close"] else m["rest"])]
    named += [m[1].upper() for m in _CHINESE.finditer(final)]
    if named:
        return _known(only(named), letters)
    return _chosen(final, letters, options)


def _chosen(text: str, letters: Sequence[str], options: Sequence[str]) -> str | None:
    alone = text.strip(" \n.,:;()[]*\"'`")
    if len(alone) == 1 and alone.isalpha():
        return _known(alone.upper(), letters)
    words = [letter for letter, option in zip(letters, options, strict=False) if normalised(option) == normalised(text)]
    marked = [next(filter(None, m.groups())).upper() for m in _MARKED.finditer(text)]
    if marked:
        letter = _known(only(marked), letters)
        rest = normalised(re.sub(r"^\W*[A-Za-z]\W+", "", text.strip(), count=1))
        others = [x for x, option in zip(letters, options, strict=False) if normalised(option) == rest and x != letter]
        return None if others else letter
    if words:
        return only(words)
    bare = [m[1] for m in _BARE.finditer(text) if _is_no_article(m[1], text[m.end() : m.end() + 20])]
    return _known(only(bare), letters)


def _known(letter: str | None, letters: Sequence[str]) -> str | None:
    return letter if letter is not None and letter in letters else None


def _is_no_article(letter: str, rest: str) -> bool:
    """Whether a letter is a choice, not the word "a" or "I" or the first letter of a lower-case phrase."""
    word = re.match(r"[ \t]+(\w+)", rest)  # an article stands on the line of its word
    if letter.isupper() and letter not in "AI":
        return True
    return word is None or word[1].lower() in ("is", "because", "since", "as", "and", "or", "but")


def _without_text_command(content: str) -> str:
    return re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", content).strip()
