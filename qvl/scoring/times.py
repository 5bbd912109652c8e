"""Scorers of moments and spans of a video, in seconds or in hours, minutes and seconds."""

import json
import re
import unicodedata
from itertools import pairwise

from qvl.scoring.extract import short_answer
from qvl.scoring.truth import Truth, needed, numbers

TOLERANCE = 0.5
_SLACK = 1e-6
"""Times are written in tenths; a difference of exactly the tolerance is within it, whatever floats make of it."""

_NUMBER = r"\d{1,7}(?:\.\d{1,6})?"
_HOURS, _MINUTES = r"(?:hours?|hrs?|h)\b", r"(?:minutes?|mins?|m)\b"
_SECONDS = r"(?:seconds?|secs?|s)\b"
_AND = r"\s{0,3}(?:and\s{1,3})?"
_TIME = re.compile(
    r"(?<![\w.:])(?:(?P<h>\d{1,3}):)?(?:(?P<m>\d{1,4}):)(?P<s>\d{1,2}(?:\.\d{1,6})?)(?![\w:]|\.\d)"
    rf"|(?<![\w.:])(?P<n>{_NUMBER})(?:\s{{0,3}}(?:{_SECONDS}|(?P<ms>(?:milliseconds?|msecs?|ms)\b)))?(?![\w:]|\.\d)"
)
_COUNTED = re.compile(
    rf"(?<![\w.:])(?={_NUMBER}\s{{0,3}}(?:{_HOURS}|{_MINUTES}))(?:(?P<h>{_NUMBER})\s{{0,3}}{_HOURS}{_AND})?"
    rf"(?:(?P<m>{_NUMBER})\s{{0,3}}{_MINUTES}{_AND})?(?:(?P<s>{_NUMBER})\s{{0,3}}{_SECONDS})?"
)
_SHARED_UNIT = re.compile(
    rf"(?<![\w.:])({_NUMBER})(\s{{0,3}}(?:to|and|-|\u2013)\s{{0,3}})(?={_NUMBER}\s{{0,3}}({_HOURS}|{_MINUTES}))"
)
"""The first number of "1.5 to 2 minutes", whose unit stands behind the second."""
_NEGATIVE = re.compile(r"(?:(?<=^)|(?<=[\s(\[<:,]))[-\u2212](?=\d)")


_OBJECT = re.compile(r"\{[^{}]{1,2000}\}")
_ONE_TIME = (
    rf"(?:(?:\d{{1,4}}:){{1,2}}\d{{1,2}}(?:\.\d{{1,6}})?|{_NUMBER})"
    rf"(?:\s{{0,3}}(?:{_HOURS}|{_MINUTES}|{_SECONDS}|(?:milliseconds?|msecs?|ms)\b)){{0,1}}"
)
_JOINED = re.compile(
    rf"(?<![\w.:])<?{_ONE_TIME}>?\s{{0,3}}(?:,\s{{0,3}})?"
    r"(?:to|till|until|through|and(?:\s{1,3}(?:it\s{1,3})?(?:ends?|ending|finishes|stops|lasts)(?:\s{1,3}(?:at|by|until))?)?"
    r"|(?:it\s{1,3})?ends?\s{1,3}at|[-\u2012-\u2015~\u2192]|->)"
    rf"\s{{0,3}}<?{_ONE_TIME}>?(?![\w:]|\.\d)"
    rf"|\[\s{{0,3}}{_ONE_TIME}\s{{0,3}},\s{{0,3}}{_ONE_TIME}\s{{0,3}}\]",
    re.IGNORECASE,
)
"""Two times that the words between them make a span."""


def temporal(answer: str, truth: Truth) -> float:
    """1 if the one time of the answer is within truth["tolerance"] (half a second) of truth["seconds"]."""
    said = short_answer(answer)
    times = set(times_in(said)) if said is not None else set()
    if len(times) != 1:
        return 0.0
    (right,) = numbers([needed(truth, "seconds")], 1, "seconds")
    return float(abs(times.pop() - right) <= truth.get("tolerance", TOLERANCE) + _SLACK)


def temporal_iou(answer: str, truth: Truth) -> float:
    """Overlap of the one span in the answer with truth["span"], [start, end]. Two different spans score 0, and so does a reversed one."""
    start, end = numbers(needed(truth, "span"), 2, "span")
    if not 0 <= start < end:
        raise ValueError(f"the truth's 'span' is {[start, end]}; expected 0 <= start < end.")
    said = short_answer(answer)
    span = one_span(said) if said is not None else None
    if span is None or span[0] >= span[1]:
        return 0.0
    shared = max(0.0, min(span[1], end) - max(span[0], start))
    return shared / (span[1] - span[0] + end - start - shared)


def span_iou(answer: str, span: tuple[float, float]) -> float:
    """Overlap of the one span in an answer with `span` (seconds, start before end), as a benchmark counts it: a reversed span is put in
    order, and words around the span may hold other numbers. Two different spans score 0, and so does a span without length.
    """
    said = spoken_span(answer)
    if said is None or said[0] == said[1] or span[0] >= span[1]:
        return 0.0
    shared = max(0.0, min(said[1], span[1]) - max(said[0], span[0]))
    return shared / (said[1] - said[0] + span[1] - span[0] - shared)


def spoken_span(answer: str) -> tuple[float, float] | None:
    """The one span of an answer, earlier time first. Where the text names other numbers too: that of its JSON, else the two times that
    words such as "to", "until", "and", a dash or brackets join. None when there are none, or two that differ.
    """
    short = short_answer(answer)
    if short is None:
        return None
    span = one_span(short)
    if span is None:
        objects = [text for match in _OBJECT.finditer(short) if (text := _from_json(match[0]))]
        joined = objects or [match[0] for match in _JOINED.finditer(unicodedata.normalize("NFKC", short))]
        spans = {one_span(text) for text in joined}
        span = spans.pop() if len(spans) == 1 else None
    return None if span is None else (min(span), max(span))


def read_time(answer: str, truth: Truth) -> str | None:
    """The one time `temporal` reads."""
    said = short_answer(answer)
    times = set(times_in(said)) if said is not None else set()
    return f"{times.pop():.15g} seconds" if len(times) == 1 else None


def read_span(answer: str, truth: Truth) -> str | None:
    """The one span `temporal_iou` reads."""
    said = short_answer(answer)
    span = one_span(said) if said is not None else None
    return None if span is None or span[0] >= span[1] else f"{span[0]:.15g} to {span[1]:.15g} seconds"


def one_span(text: str) -> tuple[float, float] | None:
    """The start and end that a text names; None unless it names exactly two times, or the same two again."""
    times = times_in(_from_json(text) or text)
    if len(times) < 2 or len(times) % 2:
        return None
    spans = set(list(pairwise(times))[::2])
    return spans.pop() if len(spans) == 1 else None


def times_in(text: str) -> list[float]:
    """Every time in the text in order: `3.4 seconds`, `<3.4 seconds>`, `3.4`, `0:03.4`, `00:00:03.4`, `1 minute 3 seconds`, `1.5 hours`,
    `500 ms`.

    Empty when any is below zero or has more than 59 seconds or minutes after a colon: such an answer names no time.
    """
    text = unicodedata.normalize("NFKC", text)
    if _NEGATIVE.search(text) and not re.search(r"\d\s+[-\u2212]\d", text):
        return []
    text = _SHARED_UNIT.sub(r"\1 \3\2", text)
    found = []
    for match in _COUNTED.finditer(text):
        found.append((match.start(), _seconds(match)))
    rest = _COUNTED.sub(lambda match: " " * len(match[0]), text)
    for match in _TIME.finditer(rest):
        found.append(
            (match.start(), float(match["n"]) / (1000 if match["ms"] else 1) if match["n"] else _seconds(match))
        )
    times = [seconds for _, seconds in sorted(found, key=lambda entry: entry[0])]
    return [] if None in times else [seconds for seconds in times if seconds is not None]


def _seconds(match: re.Match[str]) -> float | None:
    hours, minutes, seconds = (float(match[name] or 0) for name in "hms")
    if seconds >= 60 or (match["h"] and minutes >= 60):
        return None
    return hours * 3600 + minutes * 60 + seconds


def _from_json(text: str) -> str | None:
    """Start and end of a JSON object as plain text, whatever the order of its keys."""
    try:
        data = json.loads(re.sub(r"^```\w*|```$", "", text.strip()))
    except (ValueError, RecursionError):
        return None
    if isinstance(data, list) and len(data) == 1:
        data = data[0]
    if isinstance(data, dict):
        pair = [
            next((data[k] for k in keys if k in data), None) for keys in (("start", "start_time"), ("end", "end_time"))
        ]
        if None not in pair:
            return f"{pair[0]} to {pair[1]}"
    return None
