"""Messages: who said what, as typed parts."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)

# Frame rates outside this range make positions overflow or loops run long (a denial of service elsewhere).
FPS_RANGE = (0.01, 240.0)


@dataclass(frozen=True)
class Text:
    """Words of a person, a tool or the model. Never read as control tokens, whatever they spell."""

    text: str


@dataclass(frozen=True)
class Image:
    """A still picture: a path, a URL, a data URI, bytes, a raster, or a prepared `qvl.prompt.visual.Visual`."""

    source: Any
    min_tokens: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_count("max_tokens", self.max_tokens)
        _check_count("min_tokens", self.min_tokens)
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, above max_tokens, which is {self.max_tokens}.")


@dataclass(frozen=True)
class Video:
    """A clip: a file to sample from, or a tuple of frames that somebody else sampled."""

    source: Any
    sample_fps: float | None = None
    """How many frames a second to take from a file."""
    num_frames: int | None = None
    """How many frames to take from a file; excludes `sample_fps`."""
    frame_fps: float | None = None
    """For a tuple of frames: how many of them make a second."""
    frame_seconds: tuple[float, ...] | None = None
    """For a tuple of frames: the time of each; excludes `frame_fps`."""
    max_tokens: int | None = None
    """What the whole clip is scaled down to; a rule's floor for each frame, and its rounding of sides, stand above it."""

    def __post_init__(self) -> None:
        for name in ("sample_fps", "frame_fps"):
            fps = getattr(self, name)
            if fps is not None and not (math.isfinite(fps) and FPS_RANGE[0] <= fps <= FPS_RANGE[1]):
                raise ValueError(f"{name} is {fps}; give a number from {FPS_RANGE[0]} to {FPS_RANGE[1]:g}.")
        _check_count("num_frames", self.num_frames)
        _check_count("max_tokens", self.max_tokens)
        if self.sample_fps is not None and self.num_frames is not None:
            raise ValueError("A video has both fps and num_frames; give one of them.")
        if isinstance(self.source, tuple):
            if not self.source:
                raise ValueError("The list of frames is empty; give at least one frame.")
            if (self.frame_fps is None) == (self.frame_seconds is None):
                raise ValueError(
                    "A list of frames says nothing about time; give either 'fps' (frames a second) or 'timestamps'."
                )
            if self.frame_seconds is not None and len(self.frame_seconds) != len(self.source):
                raise ValueError(
                    f"The video has {len(self.source)} frames and {len(self.frame_seconds)} timestamps; "
                    "give one timestamp for each frame."
                )


@dataclass(frozen=True)
class Document:
    """A PDF; the processor turns each page into an image. `pages` is a range such as "1-3,7"."""

    source: Any
    pages: str | None = None
    max_tokens: int | None = None
    """Ceiling on the visual tokens of each page."""

    def __post_init__(self) -> None:
        _check_count("max_tokens", self.max_tokens)


@dataclass(frozen=True)
class Thinking:
    """What the assistant thought before it answered."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """One call the assistant asks for. `arguments` is JSON text as it was written, or a mapping."""

    name: str
    arguments: str | Mapping[str, Any]
    id: str | None = None

    def parsed_arguments(self) -> Any:
        """The arguments as data; ValueError when the text is no JSON."""
        if not isinstance(self.arguments, str):
            return self.arguments
        try:
            return json.loads(self.arguments)
        except json.JSONDecodeError as error:
            raise ValueError(f"The arguments of tool call {self.name!r} are not JSON: {error}.") from error


@dataclass(frozen=True)
class ToolResult:
    """What a tool answered: words and pictures."""

    parts: tuple["Text | Image | Video | Document", ...]
    id: str | None = None
    """The id of the call this answers."""
    name: str | None = None


Part = Text | Image | Video | Document | Thinking | ToolCall | ToolResult
ContentPart = Text | Image | Video | Document
MEDIA = (Image, Video, Document)


@dataclass(frozen=True)
class Message:
    """One turn. An assistant's parts come in the order thought, words, calls; a tool's message is one ToolResult."""

    role: Role
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"The role is {self.role!r}; it must be one of {', '.join(ROLES)}.")
        kinds = [type(part) for part in self.parts]
        if self.role == "tool":
            if kinds != [ToolResult]:
                raise ValueError("A tool message holds exactly one ToolResult.")
            return
        if ToolResult in kinds:
            raise ValueError(f"A {self.role} message holds a ToolResult; give it the role 'tool'.")
        if self.role != "assistant":
            for kind in (Thinking, ToolCall):
                if kind in kinds:
                    raise ValueError(f"A {self.role} message holds a {kind.__name__}; only the assistant has those.")
        if Thinking in kinds[1:]:
            raise ValueError("A thought stands once, before everything else in the assistant's message.")
        places = [2 if kind is ToolCall else 1 for kind in kinds]
        if places != sorted(places):
            raise ValueError("In the assistant's message the words come first and the tool calls last.")

    @property
    def content(self) -> tuple[ContentPart, ...]:
        """The words and media, without the thought and the calls; of a tool's message, what the tool answered."""
        if self.role == "tool":
            (result,) = self.parts
            assert isinstance(result, ToolResult)
            return result.parts
        return tuple(part for part in self.parts if isinstance(part, ContentPart))

    @property
    def text(self) -> str:
        """The words alone, joined."""
        return "".join(part.text for part in self.content if isinstance(part, Text))

    @property
    def thinking(self) -> str | None:
        return next((part.text for part in self.parts if isinstance(part, Thinking)), None)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return tuple(part for part in self.parts if isinstance(part, ToolCall))

    def with_content(self, content: Iterable[ContentPart]) -> "Message":
        """The same message with other words and media; thought and calls stay."""
        if self.role == "tool":
            (result,) = self.parts
            assert isinstance(result, ToolResult)
            return replace(self, parts=(replace(result, parts=tuple(content)),))
        thought = [part for part in self.parts if isinstance(part, Thinking)]
        return replace(self, parts=(*thought, *content, *self.tool_calls))


def _check_count(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1.")


def system(*content: ContentPart | str) -> Message:
    return Message("system", _content(content))


def user(*content: ContentPart | str) -> Message:
    """`user(Image("cat.jpg"), "What is this?")`"""
    return Message("user", _content(content))


def assistant(*content: ContentPart | str, thinking: str | None = None, calls: Sequence[ToolCall] = ()) -> Message:
    thought = () if thinking is None else (Thinking(thinking),)
    return Message("assistant", (*thought, *_content(content), *calls))


def tool(*content: ContentPart | str, id: str | None = None, name: str | None = None) -> Message:
    return Message("tool", (ToolResult(_content(content), id=id, name=name),))


def _content(content: Iterable[ContentPart | str]) -> tuple[ContentPart, ...]:
    return tuple(Text(part) if isinstance(part, str) else part for part in content)
