"""Reads the letter that an answer to a multiple-choice question chooses, in every usual spelling. Two letters are none."""

import re
import unicodedata
from collections.abc import Sequence

from qvl.scoring.extract import boxes_of, final_text, normalised, only, short_answer


def choice_letter(text: str, letters: Sequence[str], options: Sequence[str] = ()) -> str | None:
    r"""The one letter of `letters` that the answer chooses; None when it chooses none, or more than one.

    Looked for in this order, and the first kind that is there decides: a `\boxed{}`; "the answer is B", "B is correct" and a line that is
    a letter alone; "option B"; a letter in brackets, bold, or before its option; the words of one of `options`, alone or after "it is";
    a capital standing free. Letters turned down ("not A", "A is wrong") do not count. Two letters, a second thought that ends on another
    letter, or a letter before the words of another option are a contradiction.
    """
    final = final_text(text)
    if not final:
        return None
    final = unicodedata.normalize("NFKC", final)
    if "\\boxed" in final:
        return only(_chosen(content or "", letters, options) for content in boxes_of(final))
    final = _REJECTED.sub(" ", final)
    named = [
        m for kind in (_NAMED, _CONFIRMED, _CHINESE, _CHINESE_CONFIRMED) for m in kind.finditer(final) if _names(m)
    ]
    if said := named + list(_ALONE_ON_LINE.finditer(final)):
        letter = _known(only(m["letter"].upper() for m in said), letters)
        contradicted = any(_other_after(final, m, letters) or _belies(final, m, letters, options) for m in said)
        return None if contradicted or _retracts(final[max(m.end() for m in said) :], letter) else letter
    short = short_answer(text)
    if (short is not None) and (words := _of_words(short, letters, options)):
        return words
    mentioned = [m["letter"].upper() for m in _MENTIONED.finditer(final) if _names(m)]
    if mentioned:
        return _known(only(mentioned), letters)
    return _chosen(final, letters, options)


# ---- the marks of a letter -----------------------------------------------------------------------------------------

_OPEN, _CLOSE = r"""[(\[{<*_"'`“‘「【$ ]{0,5}""", r"""[)\]}>*_"'`”’」】$.]{0,5}"""  # noqa: RUF001 - such quotes are meant
_LETTER = rf"{_OPEN}(?P<letter>[A-Za-z])(?![A-Za-z]|'[A-Za-z])(?P<close>{_CLOSE})"
_BE = r"(?:is|was|ist|est|es|(?:would|should|must|will|could|might|may)\s{1,3}be)\b"
# What names the answer: "the answer is B", "correct option: B", "I choose B".
_NAMED = re.compile(
    rf"(?:\b(?:answer|ans|letter|réponse|respuesta|resposta|risposta|antwort|ответ)\b(?:'s\b|[*_\"']{{0,4}}(?:\s{{1,3}}{_BE})?)"
    rf"|\b(?:option|choice)\b[*_\"']{{0,4}}\s{{0,3}}(?:{_BE}|(?=[:=]))"
    rf"|(?<!not )(?<!n't )\b(?:choose|pick|select|go\s{{1,3}}with))"
    rf"\s{{0,3}}[:=]?[*_]{{0,2}}\s{{0,3}}(?:(?:the\s{{1,3}})?(?:option|choice|letter)\s{{1,3}})?{_LETTER}",
    re.IGNORECASE,
)
_CONFIRMED = re.compile(
    rf"(?<![A-Za-z'])(?P<letter>[A-Z])(?![A-Za-z]|'[A-Za-z])(?P<close>{_CLOSE})\s{{1,3}}{_BE}\s{{1,3}}(?:the\s{{1,3}})?"
    r"(?:most\s{1,3}|best\s{1,3})?(?:correct|right|best|answer|likely|accurate|appropriate)\b"
)
_CHINESE = re.compile(
    r"(?:(?:答案|正确的?选项|正解|答え|정답)\s{0,3}(?:应该|应当|应)?(?:是|为|选|は|은)?|(?<!不)(?<!不能)选择?(?!项)|选项(?:是|为))"
    rf"\s{{0,3}}[:*]{{0,3}}\s{{0,3}}(?:选项)?{_LETTER}"
)
_CHINESE_CONFIRMED = re.compile(r"(?<![A-Za-z])(?P<letter>[A-Z])(?P<close>)(?:选项)?(?:是|为)?(?:正确|对)")
_MENTIONED = re.compile(rf"(?:\b(?:option|choice)\b\s{{0,3}}|选项){_LETTER}", re.IGNORECASE)
_ALONE_ON_LINE = re.compile(
    rf"^[# \t]{{0,6}}{_OPEN}(?P<letter>[A-Z])(?P<close>[:]?{_CLOSE})[ \t]{{0,8}}$", re.MULTILINE
)
_MARKED = re.compile(
    r"\(([A-Za-z])\)|\[([A-Za-z])\]|\*\*\(?([A-Za-z])[.):]?\)?\*\*|^[ \t]{0,8}([A-Z])[ \t]?[.):](?=\s|$)", re.MULTILINE
)
_BARE = re.compile(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z]|'[A-Za-z])")
_OTHER = re.compile(
    rf"\s{{0,3}}(?:(?:or|and|nor)\s|[/&和与及、]|或者?|,\s{{0,3}}(?:or\s|and\s)?(?=[(\[*]{{0,3}}[A-Z][)\]*.]{{0,3}}\s{{0,3}}(?:$|,)))"
    rf"\s{{0,3}}(?:(?:option|choice)\s{{1,3}})?{_LETTER}",
    re.IGNORECASE | re.MULTILINE,
)
# A letter that is turned down is as good as not there: "not A", "A is wrong".
_REJECTED = re.compile(
    r"(?:\b(?:[Nn]ot|isn't|rather\s{1,3}than|instead\s{1,3}of)|(?:not|n't)\s{1,3}(?:be|choose|pick|select))\s{1,3}"
    r"(?:(?:option|choice)\s{1,3})?[(\[*]{0,3}[A-Z](?![A-Za-z]|'[A-Za-z])[)\]*]{0,3}"
    r"|(?:\b[Oo]ption\s{1,3})?(?<![A-Za-z'])[(\[*]{0,3}(?<![A-Za-z'])[A-Z][)\]*]{0,3}\s{1,3}(?:is|was)\s{1,3}(?:\w{1,12}\s{1,3})?"
    r"(?:wrong|incorrect|false|not|out|eliminated|excluded)\b"
    r"|(?:不是|而非|不选)\s{0,3}(?:选项)?[A-Z](?![A-Za-z])|(?:选项)?(?<![A-Za-z])[A-Z](?:选项)?(?:是)?(?:错误|不对|不正确|错)"
    r"|\b[Nn]either\s{1,3}[A-Z]\s{1,3}nor\s{1,3}[A-Z](?![A-Za-z])"
    r"|(?<![A-Za-z'])[A-Z](?:,\s?[A-Z](?![A-Za-z])){0,9},?\s{1,3}(?:and|or)\s{1,3}[A-Z]\s{1,3}(?:are|were)\s{1,3}(?:\w{1,12}\s{1,3})?"
    r"(?:wrong|incorrect|false|not|out|eliminated|excluded)\b"
)
_RETRACTED = re.compile(
    r"\b(?:wait|actually|correction|scratch\s{1,3}that|on\s{1,3}second\s{1,3}thought|no,)|不对|等等|更正", re.IGNORECASE
)
_PREFACED = re.compile(
    r"(?:(?:it|this|that|there|they|these)(?:\s{1,3}(?:is|are|was|were)\b|'s)|the\s{1,3}\w{1,20}(?:\s{1,3}\w{1,20})?\s{1,3}(?:is|are)\b)",
    re.IGNORECASE,
)


# ---- helpers -------------------------------------------------------------------------------------------------------


def _chosen(text: str, letters: Sequence[str], options: Sequence[str]) -> str | None:
    alone = text.strip(" \n.,:;()[]*\"'`$")
    if len(alone) == 1 and alone.isalpha():
        return _known(alone.upper(), letters)
    marks = list(_MARKED.finditer(text))
    if marks:
        letter = _known(only(next(filter(None, m.groups())).upper() for m in marks), letters)
        rest = normalised(re.sub(r"^\W*[A-Za-z]\W+", "", text.strip(), count=1))
        others = [x for x, option in zip(letters, options, strict=False) if normalised(option) == rest and x != letter]
        return None if others or _retracts(text[marks[-1].end() :], letter) else letter
    if words := _of_words(text, letters, options):
        return words
    bare = [m[1] for m in _BARE.finditer(text) if _is_no_article(m[1], text[m.end() : m.end() + 20])]
    return _known(only(bare), letters)


def _of_words(text: str, letters: Sequence[str], options: Sequence[str]) -> str | None:
    """The letter of the one option whose words these are, alone or after "it is"; of yes and no, the one that comes first."""
    if len(text) > 1000:
        return None
    preface = _PREFACED.match(text.strip())
    said = {normalised(text), normalised(text.strip()[preface.end() :]) if preface else ""} - {""}
    known = {letter: normalised(option) for letter, option in zip(letters, options, strict=False)}
    if sorted(known.values()) == ["no", "yes"]:
        said.add(re.split(r"\W", normalised(text), maxsplit=1)[0])
    return only(letter for letter, option in known.items() if option in said)


def _names(match: re.Match[str]) -> bool:
    """Whether the letter is one, not the article of what follows."""
    rest = match.string[match.end() : match.end() + 20]
    return _is_no_article(match["letter"], "" if match["close"].strip() else rest)


def _other_after(text: str, match: re.Match[str], letters: Sequence[str]) -> bool:
    """Whether another letter is offered along: "A or B", "A, C", "A和B"."""
    other = _OTHER.match(text, match.end())
    if other is None or not _names(other):
        return False
    return other["letter"].upper() != match["letter"].upper() and _known(other["letter"].upper(), letters) is not None


def _belies(text: str, match: re.Match[str], letters: Sequence[str], options: Sequence[str]) -> bool:
    """Whether the words behind the letter are those of another option."""
    line = text[match.end() : match.end() + 1000].split("\n", maxsplit=1)[0]
    rest, letter = normalised(line), match["letter"].upper()
    known = {x.upper(): normalised(option) for x, option in zip(letters, options, strict=False)}
    return bool(rest) and rest in known.values() and known.get(letter) != rest


def _retracts(rest: str, letter: str | None) -> bool:
    """Whether a second thought follows and names another letter."""
    thought = _RETRACTED.search(rest)
    if thought is None:
        return False
    later = rest[thought.end() :]
    return any(
        m[1] != (letter or "").upper() and _is_no_article(m[1], later[m.end() : m.end() + 20])
        for m in _BARE.finditer(later)
    )


def _known(letter: str | None, letters: Sequence[str]) -> str | None:
    return next((known for known in letters if letter is not None and known.upper() == letter.upper()), None)


def _is_no_article(letter: str, rest: str) -> bool:
    """Whether a letter is a choice, not the word "a" or "I" or the first letter of a lower-case phrase."""
    word = re.match(r"[ \t]+(\w+)", rest)  # an article stands on the line of its word
    if letter.isupper() and letter not in "AI":
        return True
    if (
        word is None or word[1] >= "\u2e80" or (len(word[1]) == 1 and word[1].isupper())
    ):  # before Chinese or another letter
        return True
    return word[1].lower() in ("is", "because", "since", "as", "and", "or", "but")
