"""Judges how an answer is written, whatever it says: does it loop, does it leave its language, does it keep the form asked for."""

import json
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from qvl.scoring.extract import LONGEST, boxes_of, final_text

MIN_COPIES = 3
MIN_LOOP = 18
"""Tokens that the copies cover together: a sentence of six words three times."""
MIN_COPIES_SHORT = 8
"""Of at most three words without a mark between: "the cat the cat ..."."""
MIN_LOOP_OF_CELLS, MIN_LOOP_OF_SYMBOLS, MIN_LOOP_OF_MARKS = 60, 40, 200
"""Equal cells of a table or numbers, emoji, and one digit, rules or markup repeat in sound answers too."""
MIN_LOOP_OF_LETTERS = 40
"""Characters of one unbroken word, "hahaha..."."""
MAX_PERIOD = 1000
WINDOW, MIN_REPEATED_SHARE, MIN_TOKENS = 20, 0.5, 120
"""For loops that vary or are longer than MAX_PERIOD: half of all windows of 20 tokens were there before."""


def repetition(answer: str) -> bool:
    """Whether the answer, its thought counted, runs in a loop: the same words at least three times on end, or half of it said before.

    Tokens are words, single Chinese and Japanese characters, and marks; the numbers of a list's items are none. Of text longer than
    100,000 characters the end is read, where a loop is. With the limits above 3 of 2,212 pieces of 4,000 characters (prose, Python, JSON)
    are found: code that does say a line thrice.
    """
    tokens = _TOKEN.findall(_NUMBERING.sub("", answer[-LONGEST:]))
    if any(len(token) >= MIN_LOOP_OF_LETTERS and _is_looping_word(token) for token in tokens):
        return True
    number: dict[str, int] = {}
    ids = np.array([number.setdefault(token, len(number)) for token in tokens], dtype=np.int64)
    for period in range(1, min(MAX_PERIOD, len(ids) // MIN_COPIES) + 1):
        for start, end in _runs(ids, period, max(period * (MIN_COPIES - 1), MIN_COPIES_SHORT - 1)):
            if end - start >= _tokens_of_a_loop(tokens[start : start + period]):
                return True
    return _share_said_before(ids, np.array([_has_letters(token) for token in tokens])) >= MIN_REPEATED_SHARE


_SINGLE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Scripts without spaces between words."""
_NUMBERING = re.compile(r"^[ \t]{0,20}(?:\d{1,4}[.)]|[-*])[ \t]{1,8}", re.MULTILINE)
_TOKEN = re.compile(rf"</?[A-Za-z][^<>]{{0,200}}>|[{_SINGLE}]|[^\W{_SINGLE}]+|[^\w\s]")


def _tokens_of_a_loop(segment: Sequence[str]) -> int:
    """How many tokens copies of the segment must cover to be a loop."""
    if not any(map(_has_letters, segment)):
        if len({token for token in segment if token.isdigit()}) > 1:
            return MIN_LOOP_OF_CELLS
        return MIN_LOOP_OF_MARKS if all(token.isascii() for token in segment) else MIN_LOOP_OF_SYMBOLS
    if "|" in segment or "&" in segment:
        return MIN_LOOP_OF_CELLS
    if len(segment) <= 3 and all(map(_has_letters, segment)):
        return min(MIN_LOOP, MIN_COPIES_SHORT * len(segment))
    return max(MIN_LOOP, MIN_COPIES * len(segment))


def _has_letters(token: str) -> bool:
    return not token.startswith("<") and any(map(str.isalpha, token))


def _runs(ids: np.ndarray, period: int, shortest: int) -> list[tuple[int, int]]:
    """(start, end) of the stretches whose tokens, but the first `period`, equal those a period before; at least `shortest` that do."""
    equal = ids[period:] == ids[:-period]
    if np.count_nonzero(equal) < shortest:
        return []
    breaks = np.concatenate(([-1], np.flatnonzero(~equal), [len(equal)]))
    return [
        (int(breaks[i]) + 1, int(breaks[i + 1]) + period) for i in np.flatnonzero(np.diff(breaks) - 1 >= shortest)[:100]
    ]


def _is_looping_word(word: str) -> bool:
    codes = np.frombuffer(word.encode("utf-32-le"), dtype=np.uint32)
    least = MIN_LOOP_OF_LETTERS if any(map(str.isalpha, word)) else MIN_LOOP_OF_MARKS
    return any(
        end - start >= max(least, MIN_COPIES_SHORT * period)
        for period in range(1, min(20, len(word) // 2) + 1)
        for start, end in _runs(codes, period, period)
    )


def _share_said_before(ids: np.ndarray, is_word: np.ndarray) -> float:
    """Of the windows; those with fewer words than half their tokens are none that say anything."""
    if len(ids) < MIN_TOKENS:
        return 0.0
    with np.errstate(over="ignore"):
        mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        windows = np.zeros(len(ids) - WINDOW + 1, dtype=np.uint64)
        for i in range(WINDOW):
            windows = windows * np.uint64(0x100000001B3) + (mixed[i : i + len(windows)] >> np.uint64(7))
    words = np.convolve(is_word.astype(np.int64), np.ones(WINDOW, dtype=np.int64), mode="valid")
    speaking = windows[2 * words >= WINDOW]
    return (len(speaking) - len(np.unique(speaking))) / len(windows)


# ---- language ------------------------------------------------------------------------------------------------------

_LATIN = (
    "en fr de es pt it nl pl cs sk sl hr ro hu sv no nb da fi et lv lt sq tr az id ms vi tl sw ca gl eu ga is mt la af"
)
_LANGUAGE_SCRIPTS: dict[str, frozenset[str]] = {
    **{code: frozenset({"latin"}) for code in _LATIN.split()},
    "zh": frozenset({"han"}),
    "ja": frozenset({"han", "kana"}),
    "ko": frozenset({"hangul"}),
    **{code: frozenset({"cyrillic"}) for code in ("ru", "uk", "be", "bg", "sr", "mk", "kk", "ky", "mn", "tg")},
    **{code: frozenset({"arabic"}) for code in ("ar", "fa", "ur", "ps")},
    "he": frozenset({"hebrew"}),
    "el": frozenset({"greek"}),
    "th": frozenset({"thai"}),
    **{code: frozenset({"devanagari"}) for code in ("hi", "mr", "ne")},
}
_NAMES = {
    "english": "en", "chinese": "zh", "mandarin": "zh", "japanese": "ja", "korean": "ko", "russian": "ru", "arabic": "ar",
    "french": "fr", "german": "de", "spanish": "es", "portuguese": "pt", "italian": "it", "dutch": "nl", "turkish": "tr",
    "vietnamese": "vi", "indonesian": "id", "polish": "pl", "hebrew": "he", "greek": "el", "thai": "th", "hindi": "hi",
    "ukrainian": "uk", "persian": "fa", "urdu": "ur", "swedish": "sv", "czech": "cs",
    "latin": "en", "中文": "zh", "英文": "en", "英语": "en", "日本語": "ja", "한국어": "ko", "русский": "ru",
}  # fmt: skip
_SCRIPTS = {
    "latin": r"A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "han": r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af",
    "kana": r"\u3041-\u3096\u30a1-\u30fa\u30fc\u31f0-\u31ff",
    "hangul": r"\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3",
    "cyrillic": r"\u0400-\u052f",
    "arabic": r"\u0620-\u064a\u0671-\u06d3\u0750-\u077f",
    "hebrew": r"\u05d0-\u05ea",
    "greek": r"\u0370-\u03ff\u1f00-\u1fff",
    "thai": r"\u0e01-\u0e3a\u0e40-\u0e4e",
    "devanagari": r"\u0904-\u0939\u0958-\u0961",
}

MIN_FOREIGN_WORDS = 4
"""Words of another alphabet on end that are a phrase, no name: two of them without a capital."""
MIN_FUNCTION_WORDS = 2
"""English words of no meaning of their own ("the", "so") in an answer of another script."""
MAX_FOREIGN_CHARACTERS = 12
"""Chinese or Japanese on end that may be a name or what a sign says."""


def language_mix(answer: str, prompt_language: str) -> bool:
    """Whether the answer, its thought counted, leaves the language of its prompt, judged by script: French in English is not seen.

    `prompt_language` is a code (zh, zh-CN, en, ja, ko, ru, ar, ...) or an English name. Code, formulas, addresses, quoted and bracketed
    words are not counted; names, single technical terms and what a sign reads may be foreign. Foreign is: four words of another alphabet
    on end, two of them without a capital; two English function words outside of a title, or one alone that no code has ("because");
    Chinese that no "reads", "means" or name stands beside, or of more than 12 characters, or with a function word (的, 是, 因为); kana
    outside Japanese but a lone の; a Chinese sentence in Japanese. ValueError for a language that is not known.
    """
    own = _scripts_of(prompt_language)
    text = unicodedata.normalize("NFC", answer[-LONGEST:])
    for pattern in _NOT_COUNTED:
        text = pattern.sub(" ; ", text)
    if any(script not in own and _has_phrase(text, script) for script in _SCRIPTS if script not in ("han", "kana")):
        return True
    if "kana" in own:
        return any(len(run) > MAX_FOREIGN_CHARACTERS and _CHINESE_WORDS.search(run) for run in _HAN_ONLY.findall(text))
    if any(len(run) > 1 for run in _KANA.findall(text)):
        return True
    return "han" not in own and _has_chinese(text)


def _scripts_of(language: str) -> frozenset[str]:
    code = language.strip().casefold()
    code = _NAMES.get(code, re.split(r"[-_ (]", code, maxsplit=1)[0])
    code = _NAMES.get(code, code)
    if code not in _LANGUAGE_SCRIPTS:
        raise ValueError(f"the prompt's language is {language[:40]!r}; give a code such as en, zh, ja, ko, ru or ar.")
    return _LANGUAGE_SCRIPTS[code]


_NOT_COUNTED = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"```.*?(?:```|\Z)",
        r"`[^`\n]{0,500}`",
        r"</?[A-Za-z][^<>]{0,200}>",
        r"\\boxed\s{0,3}\{[^{}]{0,200}\}",
        r"\$\$.{0,1000}?\$\$|\$[^$\n]{0,500}\$|\\\(.{0,500}?\\\)|\\\[.{0,1000}?\\\]",
        r"\\[A-Za-z]{1,20}(?:\{[^{}]{0,200}\})?",
        r"(?:https?://|www\.)[!-~]{1,2000}|[\w.+-]{1,64}@[\w-]{1,64}\.[\w.]{1,64}|(?:[\w.-]{1,64}/){2,20}[\w.-]{0,64}",
        r"\"[^\"\n]{0,300}\"|“[^”\n]{0,300}”|「[^」\n]{0,300}」|『[^』\n]{0,300}』|«[^»\n]{0,300}»|《[^》\n]{0,300}》|‘[^’\n]{0,300}’",  # noqa: RUF001
        r"(?<!\w)'[^'\n]{1,300}'(?!\w)",
        r"[(\uff08][^()\uff08\uff09\n]{0,40}[)\uff09]|\u3010[^\u3011\n]{0,40}\u3011",
        r"\b\w{0,40}(?:[_=]|\w\.\w|\d)[\w.=()]{0,80}",
    )
]
_FUNCTION = (
    "the is are was were and or but so because therefore however thus then that this these those which we you they it its there of to in "
    "on with for from by as at be have has can should will would if not let need also first since an"
)
_SWITCH = "the are was were but so because therefore however thus that which we you they there should would since"
_FUNCTION_WORDS, _SWITCH_WORDS = frozenset(_FUNCTION.split()), frozenset(_SWITCH.split())
"""The second are those that no code has: one alone between words of another script leaves the language."""
_CHINESE_WORDS = re.compile(
    r"[的是了吗呢吧们这那]|因为|所以|但是|然后|需要|可以|首先|其次|其实|应该|如果|而且|或者|因此|已经|没有|不能|我|你|他|她|它"
)
_WORDS = {
    script: re.compile(rf"[{letters}][{letters}'\u2019\u0300-\u036f\u064b-\u0652-]*")
    for script, letters in _SCRIPTS.items()
}
_PHRASE = {
    script: re.compile(rf"[{letters}][{letters}'\u2019\u0300-\u036f\u064b-\u0652 \t,-]*")
    for script, letters in _SCRIPTS.items()
}
_KANA = re.compile(rf"[{_SCRIPTS['kana']}]+")
_HAN = re.compile(rf"[{_SCRIPTS['han']}][{_SCRIPTS['han']},:\u3001\u3002\uff0c\uff1a]*")
_HAN_ONLY = re.compile(rf"[{_SCRIPTS['han']}][{_SCRIPTS['han']}\d,:\u3001\uff0c\uff1a]*")
_READ_OUT = re.compile(
    r"\b(?:(?:reads?|says?|said|called|named|writes|written|means?|meaning|signs?|text|title[ds]?|words?|characters?|labell?(?:ed)?|name|"
    r"phrases?)(?:\s{1,3}(?:is|as))?|[A-Z]\w{1,30})[\s:*]{0,4}$|:[\s*]{0,4}$"
)
_READ_OUT_AFTER = re.compile(r"\s{0,3}(?:\*\*)?\s{0,3}(?:means?|characters?|signs?|translates|stands|refers)\b")
"""What stands around a foreign word that is spoken about: "the sign reads ...", "... means", "Kyoto ..."."""


def _has_phrase(text: str, script: str) -> bool:
    """Of an alphabet: four words on end, or function words, that are no name."""
    function_words = 0
    for phrase in _PHRASE[script].findall(text):
        words = [word for word in _WORDS[script].findall(phrase) if len(word) > 1]
        lower = [word.lower() for word in words]
        plain = [word for word in words if not word[0].isupper()]
        if len(words) >= MIN_FOREIGN_WORDS and len(plain) >= 2 and not _FUNCTION_WORDS.issuperset(plain):
            return True
        if len(words) == 1:
            if lower[0] in _SWITCH_WORDS:
                return True
        elif any(
            word not in _FUNCTION_WORDS and not full[0].isupper() for word, full in zip(lower, words, strict=True)
        ):
            function_words += sum(word in _FUNCTION_WORDS for word in lower)
        elif all(word in _FUNCTION_WORDS for word in lower):  # else a title: "Lord of the Rings"
            function_words += len(lower)
    return function_words >= MIN_FUNCTION_WORDS


def _has_chinese(text: str) -> bool:
    for match in _HAN.finditer(text):
        if len(match[0]) > MAX_FOREIGN_CHARACTERS or _CHINESE_WORDS.search(match[0]):
            return True
        before = _READ_OUT.search(text, max(0, match.start() - 40), match.start())
        if before is None and _READ_OUT_AFTER.match(text, match.end()) is None and text.strip(" .!") != match[0]:
            return True
    return False


# ---- form ----------------------------------------------------------------------------------------------------------


def keeps_thought_form(answer: str, thinks: bool) -> bool:
    """With `thinks`: one thought that closes, at the start, and an answer after it. Without: an answer and no thought."""
    opened, closed = answer.count("<think>"), answer.count("</think>")
    if not thinks:
        return not opened and not closed and bool(answer.strip())
    starts_well = opened == 0 or (opened == 1 and answer.lstrip().startswith("<think>"))
    return closed == 1 and starts_well and bool(answer.partition("</think>")[2].strip())


def has_one_box(answer: str) -> bool:
    r"""Whether the answer, after its thought, gives one `\boxed{}` that is closed and not empty."""
    boxes = boxes_of(final_text(answer) or "")
    return len(boxes) == 1 and bool(boxes[0])


def is_json(answer: str) -> bool:
    """Whether the answer, after its thought, is one JSON object or list and nothing else, in a ```json fence or bare."""
    final = final_text(answer) or ""
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", final, re.DOTALL | re.IGNORECASE)
    try:
        return isinstance(json.loads(fenced[1] if fenced else final), dict | list)
    except (ValueError, RecursionError):
        return False
