"""The chat templates: a conversation becomes the words around it, byte for byte as published, without running Jinja."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal, get_args

from qvl.prompt.message import MEDIA, Document, Image, Message, Text, Video

Style = Literal["instruct", "thinking"]
STYLES: tuple[str, ...] = get_args(Style)
Targets = Literal["all", "last", "none"] | frozenset[int]
"""Whose tokens are trained: every assistant turn, those after the last question, none, or the messages at these places, from 0."""


@dataclass(frozen=True)
class Written:
    """Words of the template itself; the control tokens in them count."""

    text: str
    is_target: bool = False


@dataclass(frozen=True)
class PlainText:
    """Words of a person, a tool or the model; control tokens in them are letters."""

    text: str
    is_target: bool = False


@dataclass(frozen=True)
class VisualSlot:
    """The place of one image or video, written `<|vision_start|><|image_pad|><|vision_end|>` until it is expanded."""

    part: Image | Video
    is_target: bool = False

    @property
    def text(self) -> str:
        return f"<|vision_start|><|{'video' if isinstance(self.part, Video) else 'image'}_pad|><|vision_end|>"


Segment = Written | PlainText | VisualSlot

TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call><|im_end|>\n"
)
TOOL_OPEN, TOOL_CLOSE = "<tool_response>", "</tool_response>"


def render(
    messages: Sequence[Message],
    *,
    style: Style,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    add_vision_id: bool = False,
    strict: bool = True,
    split_thinking: bool = False,
    targets: Targets = "all",
) -> list[Segment]:
    """The conversation as segments; their texts joined are what the published Jinja template renders.

    `strict` refuses what the template would drop without a word (see `check_nothing_is_lost`); without it the segments
    still equal the template's.
    `split_thinking` reads an assistant's words "thought</think>answer" as a thought and an answer, as the published
    Thinking template does with histories that come as raw text. It is off by default because it lets text decide about
    structure: typed `Thinking` parts need no such guess.
    `targets` says whose tokens are marked for training: every assistant turn ("all"), those after the last question
    ("last"), or the assistant's messages at the places of a set.
    """
    if style not in STYLES:
        raise ValueError(f"The template style is {style!r}; it must be one of {', '.join(STYLES)}.")
    if not messages:
        raise ValueError("The conversation is empty; give at least one message.")
    if any(isinstance(part, Document) for message in messages for part in message.content):
        raise ValueError("A document has no place in the template; turn its pages into images first.")
    if strict:
        check_nothing_is_lost(messages, style)
    writer = _Writer(messages, style, add_vision_id, split_thinking, targets)
    writer.write_system(tools)
    for index in range(len(messages)):
        writer.write_message(index)
    if add_generation_prompt:
        writer.add(Written("<|im_start|>assistant\n" + ("<think>\n" if style == "thinking" else "")))
    return writer.segments


def rendered_text(segments: Iterable[Segment]) -> str:
    """What the published template gives as one string."""
    return "".join(segment.text for segment in segments)


def check_nothing_is_lost(messages: Sequence[Message], style: Style) -> None:
    """ValueError where the published template would leave part of the conversation out or count a picture wrongly."""
    for index, message in enumerate(messages):
        has_media = any(isinstance(part, MEDIA) for part in message.content)
        if has_media and message.role == "system":
            raise ValueError("A system message holds a picture or video; move it into the first user message.")
        if style == "thinking":
            continue
        if has_media and message.role == "assistant":
            raise ValueError("The instruct template drops pictures in an assistant's message; move them to the user.")
        if message.role == "system" and index > 0:
            raise ValueError("The instruct template drops system messages after the first; put them into the first.")
        if message.thinking:
            raise ValueError("The instruct template drops thoughts; use the thinking template or leave them out.")


def split_thinking(text: str) -> tuple[str, str] | None:
    """(thought, answer) of an assistant's raw text, or None where no thought ends in it.

    As the Thinking template does: the thought is what stands before the first `</think>` (after the last `<think>` in
    it), the answer what stands after the last one. Only for text the model itself wrote.
    """
    if "</think>" not in text:
        return None
    thought = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thought, text.split("</think>")[-1].lstrip("\n")


def to_json(value: Any) -> str:
    """Hugging Face's tojson: keys in the given order, ", " and ": ", no escapes beyond JSON's own."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"A tool's description or arguments cannot be written as JSON: {error}.") from error


class _Writer:
    def __init__(
        self, messages: Sequence[Message], style: Style, add_vision_id: bool, split: bool, targets: Targets
    ) -> None:
        self.messages = messages
        self.is_thinking = style == "thinking"
        self.add_vision_id = add_vision_id
        self.split = split and self.is_thinking
        self.targets = targets
        self.last_query = _last_query(messages)
        self.counts = {Image: 0, Video: 0}
        self.segments: list[Segment] = []

    def add(self, *segments: Segment) -> None:
        self.segments.extend(segment for segment in segments if segment.text)

    def content(self, message: Message, *, count: bool = True) -> list[Segment]:
        """Words and media in order. Pictures are numbered through the conversation."""
        segments: list[Segment] = []
        for part in message.content:
            if isinstance(part, Text):
                segments.append(PlainText(part.text))
            elif isinstance(part, (Image, Video)):
                if count:
                    self.counts[type(part)] += 1
                if self.add_vision_id:
                    segments.append(Written(f"{_word(part)} {self.counts[type(part)]}: "))
                segments.append(VisualSlot(part))
        return segments

    def words(self, message: Message) -> list[Segment]:
        return [PlainText(part.text) for part in message.content if isinstance(part, Text)]

    def write_system(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        first = self.messages[0]
        head: list[Segment] = []
        if first.role == "system":
            # The Thinking template numbers the pictures of this message only when it comes by again in its main loop.
            head = self.content(first, count=False) if self.is_thinking else self.words(first)
        if tools:
            self.add(Written("<|im_start|>system\n"), *head)
            self.add(Written(("\n\n" if first.role == "system" else "") + TOOLS_BEFORE))
            for tool in tools:
                if not isinstance(tool, Mapping):
                    raise ValueError(f"A tool is {type(tool).__name__}; an object with its JSON schema was expected.")
                self.add(Written("\n"), PlainText(to_json(tool)))
            self.add(Written(TOOLS_AFTER))
        elif first.role == "system":
            self.add(Written("<|im_start|>system\n"), *head, Written("<|im_end|>\n"))

    def write_message(self, index: int) -> None:
        message = self.messages[index]
        if message.role == "user":
            self.write_turn("user", self.content(message))
        elif message.role == "system" and self.is_thinking:
            content = self.content(message)
            if index > 0:
                self.write_turn("system", content)
        elif message.role == "assistant":
            self.write_assistant(index)
        elif message.role == "tool":
            self.write_tool(index)

    def write_turn(self, role: str, content: Iterable[Segment]) -> None:
        self.add(Written(f"<|im_start|>{role}\n"), *content, Written("<|im_end|>\n"))

    def write_assistant(self, index: int) -> None:
        message = self.messages[index]
        target = self.is_trained(index)
        if self.is_thinking:
            opening, said, follows = self.thinking_turn(index)
        else:
            # The published template asks whether there is content at all, even an empty text.
            opening, said, follows = "", self.words(message), bool(message.content)
        for call in message.tool_calls:
            arguments = call.arguments if isinstance(call.arguments, str) else to_json(call.arguments)
            said += [
                Written(("\n" if follows else "") + '<tool_call>\n{"name": "'),
                PlainText(call.name),
                Written('", "arguments": '),
                PlainText(arguments),
                Written("}\n</tool_call>"),
            ]
            follows = True
        self.add(Written("<|im_start|>assistant\n" + opening))
        self.add(*(replace(segment, is_target=target and not isinstance(segment, VisualSlot)) for segment in said))
        # The end of turn is learned, the line break after it is not: the engine stops before it.
        self.add(Written("<|im_end|>", target), Written("\n"))

    def is_trained(self, index: int) -> bool:
        if isinstance(self.targets, frozenset):
            return index in self.targets
        return self.targets == "all" or (self.targets == "last" and index > self.last_query)

    def thinking_turn(self, index: int) -> tuple[str, list[Segment], bool]:
        """(what the generation prompt writes, what the assistant said, whether a line break comes before a call)."""
        message = self.messages[index]
        content: list[Segment] = self.content(message)
        thought = message.thinking or ""
        if self.split and message.thinking is None and (parted := split_thinking(message.text)):
            if any(isinstance(part, MEDIA) for part in message.content):
                raise ValueError(
                    "An assistant's message with pictures holds '</think>'; give the thought as its own part."
                )
            thought, answer = parted
            content = [PlainText(answer)]
        has_content = any(segment.text for segment in content)
        # Thoughts before the last question are forgotten; the final turn has one even if it is empty.
        is_last = index == len(self.messages) - 1
        if index <= self.last_query or not (is_last or thought):
            return "", content, has_content
        said = [PlainText(thought.strip("\n")), Written("\n</think>\n\n"), *_lstrip_lines(content)]
        return "<think>\n", said, has_content

    def write_tool(self, index: int) -> None:
        def is_tool(at: int) -> bool:
            return 0 <= at < len(self.messages) and self.messages[at].role == "tool"

        opening = "" if is_tool(index - 1) else "<|im_start|>user"
        closing = "" if is_tool(index + 1) else "<|im_end|>\n"
        self.add(Written(f"{opening}\n{TOOL_OPEN}\n"), *self.content(self.messages[index]))
        self.add(Written(f"\n{TOOL_CLOSE}{closing}"))


def _word(part: Image | Video) -> str:
    return "Video" if isinstance(part, Video) else "Picture"


def _last_query(messages: Sequence[Message]) -> int:
    """Place of the last user message that is no tool result; the last message where there is none."""
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if message.role != "user":
            continue
        # A picture's mark stands where it stands: no text around it can make this a tool result from the middle.
        text = "".join(part.text if isinstance(part, Text) else "<|" for part in message.content)
        if not (text.startswith(TOOL_OPEN) and text.endswith(TOOL_CLOSE)):
            return index
    return len(messages) - 1


def _lstrip_lines(segments: Sequence[Segment]) -> list[Segment]:
    """The segments without line breaks at their start."""
    for i, segment in enumerate(segments):
        if not isinstance(segment, PlainText):
            return list(segments[i:])
        if text := segment.text.lstrip("\n"):
            return [PlainText(text), *segments[i + 1 :]]
    return []


# ---- the same templates as Jinja, for exported folders ------------------------------------------------------------


def jinja_template(style: Style) -> str:
    """The Jinja text an exported folder gets; it renders what `render` renders."""
    return (resources.files("qvl.prompt.templates") / f"{style}.jinja").read_text(encoding="utf-8")


def detect_style(template: str) -> Style | None:
    """Which of the two published styles a folder's Jinja text is, read from its words; None when it is neither."""
    marks = (
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<tool_response>",
        "# Tools",
        "<tool_call>",
        "add_vision_id",
    )
    # A default system prompt (Qwen2-VL), another call format or a thinking switch (later families): another template.
    others = ("You are a helpful assistant", "<function=", "enable_thinking")
    if not all(mark in template for mark in marks) or any(mark in template for mark in others):
        return None
    # Jinja texts spell the line break as \n; the generation prompt tells the two apart.
    return "thinking" if r"<|im_start|>assistant\n<think>\n" in template else "instruct"


def template_dicts(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The conversation as the Jinja templates read it: media by type alone, without their sources."""
    return [_template_dict(message) for message in messages]


def _template_dict(message: Message) -> dict[str, Any]:
    content = message.content
    data: dict[str, Any] = {"role": message.role, "content": [_template_part(part) for part in content]}
    if not content:
        data["content"] = ""
    elif len(content) == 1 and isinstance(content[0], Text) and content[0].text:
        data["content"] = content[0].text
    if message.thinking is not None:
        data["reasoning_content"] = message.thinking
    if message.tool_calls:
        data["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return data


def _template_part(part: Any) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "video" if isinstance(part, Video) else "image"}
