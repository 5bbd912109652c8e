"""Numbers in a text, in digits (1,000 and 1e3 too) or in words: forty-five, a dozen, two hundred and six, 5 million."""

import re
import unicodedata

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = dict(
    zip(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], range(20, 100, 10), strict=True)
)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
_DIGITS = r"(?<![\w.,])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d{1,300})(?:\.\d{1,300})?(?:[eE][-+]?\d{1,3})?(?!\w|[.,]\d)"
_NAMES = "|".join([*_ONES, *_TENS, *_SCALES, r"a(?=\s{1,3}(?:hundred|thousand|million|billion|dozen)\b)"])
_PART = re.compile(rf"(?P<digits>{_DIGITS})|\b(?P<word>{_NAMES})\b", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s-]{1,3}(?:and\s{1,3})?")
"""What may stand between two parts of one number."""


def numbers_in(text: str) -> list[float]:
    """All of them in order. Words that make no number together ("one two three") are a number each."""
    text = unicodedata.normalize("NFKC", text)
    found: list[float] = []
    number, end = _Number(), -1
    for match in _PART.finditer(text):
        between = _BETWEEN.fullmatch(text, end, match.start()) if end >= 0 else None
        # "two hundred and six" is one number, "twenty and five" are two.
        joins = between is not None and (number.room >= 100 or "and" not in between[0].lower())
        if not (joins and number.takes(match)):
            found += number.value
            number = _Number()
            number.takes(match)
        end = match.end()
    return found + number.value


class _Number:
    """One number while its parts come: "two", "hundred", "six"."""

    def __init__(self) -> None:
        self.total = 0.0
        """Of the thousands and millions that are closed."""
        self.group: float | None = None
        """Below the next scale."""
        self.room = float("inf")
        """What comes next must be smaller: nine after forty, ninety-nine after a hundred."""

    @property
    def value(self) -> list[float]:
        return [] if self.group is None else [self.total + self.group]

    def takes(self, match: re.Match[str]) -> bool:
        """Whether the part belongs to this number; if so it is in."""
        if match["digits"]:
            if self.group is not None:
                return False
            self.group, self.room = float(match["digits"].replace(",", "").replace("\u2212", "-")), 0
            return True
        word = match["word"].lower()
        if word in _SCALES:
            return self._scale(_SCALES[word])
        value = 1 if word == "a" else _ONES.index(word) if word in _ONES else _TENS[word]
        if self.group is not None and not 0 < value < self.room:
            return False
        self.group = (self.group or 0.0) + value
        # "forty" leaves room for one to nine, "seven" for nothing.
        self.room = 10 if word in _TENS else 0
        return True

    def _scale(self, scale: int) -> bool:
        if self.group is None or (self.group == 0 and self.total):
            return False
        if scale in (12, 100):
            self.group, self.room = self.group * scale, scale if scale == 100 else 0
        else:
            self.total, self.group, self.room = self.total + self.group * scale, 0.0, scale
        return True
