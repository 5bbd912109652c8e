"""A folder's own unknown template: run in a sandbox, only when asked for, with user text kept out of its hands."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qvl.prompt.jinja import RenderLimits, hf_json, run_template
from qvl.prompt.message import Document, Image, Message, Video
from qvl.prompt.template import PlainText, Segment, VisualSlot, Written, rendered_text, template_dicts


def render_foreign(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    limits: RenderLimits | None = None,
    **variables: Any,
) -> list[Segment]:
    """The conversation as segments, written by a template that nobody here knows.

    How user text is kept from becoming control tokens: before rendering, every string of the conversation and of the
    tools is replaced by a mark made of private-use letters (white space at its ends stays outside, so that a template
    may strip it). What comes out between the marks is the template's own writing, in which control tokens count; the
    marks are put back as plain text. Nothing a person wrote ever passes through the template, so no filter, slice or
    concatenation in it can make a control token of it.

    The price: a template that looks into the text (for `</think>`, say) sees the mark. So the template is also rendered
    with the real strings, and a ValueError says so where the two texts differ; nothing is guessed.
    """
    limits = limits or RenderLimits()
    if any(isinstance(part, Document) for message in messages for part in message.content):
        raise ValueError("A document has no place in the template; turn its pages into images first.")
    data = {"messages": template_dicts(messages), "tools": [dict(tool) for tool in tools] if tools else None}
    options = {"add_generation_prompt": add_generation_prompt, **variables}
    real = run_template(template, data | options, limits=limits)
    marks = _Marks()
    marked = run_template(template, _mark_data(data, marks) | options, limits=limits, to_json=marks.to_json)
    segments = marks.split(marked)
    if rendered_text(segments) != real:
        raise ValueError(
            "The folder's chat template looks into or rewrites the text of the conversation, so its own words cannot "
            "be told from the user's; choose template 'instruct' or 'thinking', or give thoughts as reasoning_content."
        )
    return _place_media(segments, messages)


# ---- marks --------------------------------------------------------------------------------------------------------

MARK_OPEN, MARK_CLOSE = "\U000ff000", "\U000ff001"
MARK_PATTERN = re.compile(f"{MARK_OPEN}([0-9]+){MARK_CLOSE}")
# Words by which templates steer; they are kept, and spell no control token.
KEPT_KEYS = {"role", "type"}
KEPT_VALUES = re.compile(
    "system|user|assistant|tool|text|image|video|function|string|number|integer|boolean|array|object|null"
)
STEERING_KEY = re.compile(r"\$?[A-Za-z_][A-Za-z0-9_]*")
# Keys that a person chose, and that a template may write into the prompt: all below "arguments", the names below these.
NAME_MAPS = {"properties", "$defs", "definitions"}
Keys = Literal["known", "names", "all free"]


class _Marks:
    """Strings by number, each with a mark that stands for it while the template runs."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.number_of: dict[str, int] = {}

    def mark(self, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        return f"{text[:start]}{self._new(core)}{text[start + len(core) :]}"

    def _new(self, text: str) -> str:
        # The same text gets the same mark, so that a template may compare.
        number = self.number_of.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return f"{MARK_OPEN}{number}{MARK_CLOSE}"

    def restore(self, value: Any) -> Any:
        if isinstance(value, str):
            return MARK_PATTERN.sub(lambda match: self.texts[int(match[1])], value)
        if isinstance(value, Mapping):
            return {self.restore(key): self.restore(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.restore(item) for item in value]
        return value

    def to_json(self, value: Any, *args: Any, **kwargs: Any) -> str:
        """tojson while marks are about: the real JSON, behind a mark of its own."""
        return self._new(hf_json(self.restore(value), *args, **kwargs))

    def split(self, text: str) -> list[Segment]:
        segments: list[Segment] = []
        for i, piece in enumerate(MARK_PATTERN.split(text)):
            if i % 2:
                segments.append(PlainText(self.texts[int(piece)]))
            elif piece:
                segments.append(Written(piece))
        return segments


def _mark_data(value: Any, marks: _Marks, *, key: str = "", keys: Keys = "known") -> Any:
    """The same data with every string marked but the words templates steer by."""
    if isinstance(value, str):
        return value if key in KEPT_KEYS and KEPT_VALUES.fullmatch(value) else marks.mark(value)
    if isinstance(value, Mapping):
        marked = {}
        for name, item in value.items():
            is_known = keys == "known" and STEERING_KEY.fullmatch(str(name))
            below: Keys = "known"
            if keys == "all free" or (keys == "known" and name == "arguments"):
                below = "all free"
            elif keys == "known" and name in NAME_MAPS:
                below = "names"
            marked[name if is_known else marks.mark(str(name))] = _mark_data(item, marks, key=str(name), keys=below)
        return marked
    if isinstance(value, (list, tuple)):
        return [_mark_data(item, marks, keys="all free" if keys == "all free" else "known") for item in value]
    return value


PLACEHOLDER = re.compile(r"<\|vision_start\|><\|(image|video)_pad\|><\|vision_end\|>")


def _place_media(segments: Sequence[Segment], messages: Sequence[Message]) -> list[Segment]:
    """Slots where the template wrote a picture's or video's placeholder, in the order of the conversation."""
    media = [part for message in messages for part in message.content if isinstance(part, (Image, Video))]
    placed: list[Segment] = []
    used = 0
    for segment in segments:
        if not isinstance(segment, Written):
            placed.append(segment)
            continue
        end = 0
        for match in PLACEHOLDER.finditer(segment.text):
            wanted = Video if match[1] == "video" else Image
            if used >= len(media) or not isinstance(media[used], wanted):
                raise ValueError(
                    "The folder's chat template writes pictures and videos in another order than the conversation."
                )
            placed += [Written(segment.text[end : match.start()]), VisualSlot(media[used])]
            used, end = used + 1, match.end()
        placed.append(Written(segment.text[end:]))
    if used != len(media):
        raise ValueError(
            f"The folder's chat template has places for {used} of the conversation's {len(media)} pictures and videos."
        )
    return [segment for segment in placed if segment.text]
