"""OpenAI-style dictionaries become messages, and messages dictionaries."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qvl.core.config import did_you_mean
from qvl.prompt.message import (
    ROLES,
    ContentPart,
    Document,
    Image,
    Message,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
    Video,
)

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal", *THOUGHT_KEYS}


def messages_from_dicts(data: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """OpenAI-style messages, as they come from a request or a line of a data file."""
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Sequence):
        raise ValueError(f"Messages came as {type(data).__name__}; a list of messages was expected.")
    if not data:
        raise ValueError("The conversation is empty; give at least one message.")
    return tuple(message_from_dict(item, where=f"messages[{i}]") for i, item in enumerate(data))


def message_from_dict(data: Mapping[str, Any], where: str = "message") -> Message:
    """One message. `content` is a string, a list of parts, or null; the role "developer" is read as "system"."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is {type(data).__name__}; an object with 'role' and 'content' was expected.")
    _refuse_unknown(data, MESSAGE_KEYS, where)
    role = data.get("role")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise ValueError(f"{where} has the role {data.get('role')!r}; it must be one of {', '.join(ROLES)}.")
    content = _content_from(data.get("content"), f"{where}.content")
    calls_data = data.get("tool_calls") or ()
    if not isinstance(calls_data, Sequence) or isinstance(calls_data, (str, bytes)):
        raise ValueError(f"{where}.tool_calls is {type(calls_data).__name__}; a list was expected.")
    calls = [_call_from(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls_data)]
    thought = next((data[key] for key in THOUGHT_KEYS if data.get(key) is not None), None)
    if role != "assistant" and (calls or thought is not None):
        raise ValueError(f"{where} has the role {role!r}; only the assistant has thoughts and tool calls.")
    if role == "tool":
        call_id = _optional(data, "tool_call_id", str, where)
        return Message("tool", (ToolResult(content, id=call_id, name=_optional(data, "name", str, where)),))
    if thought is not None and not isinstance(thought, str):
        raise ValueError(f"{where} has a thought of type {type(thought).__name__}; a string was expected.")
    thoughts = () if thought is None else (Thinking(thought),)
    return Message(role, (*thoughts, *content, *calls))


def _content_from(data: Any, where: str) -> tuple[ContentPart, ...]:
    if data is None or data == "":
        return ()
    if isinstance(data, str):
        return (Text(data),)
    if not isinstance(data, Sequence) or isinstance(data, (bytes, Mapping)):
        raise ValueError(f"{where} is {type(data).__name__}; a string or a list of parts was expected.")
    return tuple(_part_from(item, f"{where}[{i}]") for i, item in enumerate(data))


PART_KEYS: dict[str, set[str]] = {
    "text": {"text"},
    "image": {"image", "min_tokens", "max_tokens", "min_pixels", "max_pixels"},
    "image_url": {"image_url", "min_tokens", "max_tokens", "min_pixels", "max_pixels"},
    "video": {"video", "fps", "num_frames", "timestamps", "max_tokens"},
    "video_url": {"video_url", "fps", "num_frames", "max_tokens"},
    "video_frames": {"video_frames", "fps", "timestamps", "max_tokens"},
    "file": {"file", "pages", "max_tokens"},
    "document": {"document", "pages", "max_tokens"},
}
PIXELS_PER_TOKEN = 32 * 32  # patch 16, merged 2 by 2


def _part_from(data: Any, where: str) -> ContentPart:
    if isinstance(data, str):
        return Text(data)
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is {type(data).__name__}; an object with a 'type' was expected.")
    kind = data.get("type")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"{where}.type is {type(kind).__name__}; a string was expected.")
    if kind is None:  # the short form {"image": ...} of Qwen's own cookbooks
        found = [name for name in PART_KEYS if name in data]
        if len(found) != 1:
            raise ValueError(f"{where} has no 'type'; it must be one of {', '.join(PART_KEYS)}.")
        kind = found[0]
    if kind not in PART_KEYS:
        hint = did_you_mean(str(kind), PART_KEYS)
        raise ValueError(f"{where} has the type {kind!r}{hint}; it must be one of {', '.join(PART_KEYS)}.")
    _refuse_unknown(data, PART_KEYS[kind] | {"type"}, where)
    if kind not in data:
        raise ValueError(f"{where} has the type {kind!r} and no {kind!r} field.")
    value = data[kind]
    if kind == "text":
        if not isinstance(value, str):
            raise ValueError(f"{where}.text is {type(value).__name__}; a string was expected.")
        return Text(value)
    if kind in ("image", "image_url"):
        return Image(
            _url(value, {"url", "detail"}, "url", f"{where}.{kind}") if kind == "image_url" else value,
            min_tokens=_tokens(data, "min", where),
            max_tokens=_tokens(data, "max", where),
        )
    max_tokens = _optional(data, "max_tokens", int, where)
    if kind in ("file", "document"):
        source = _url(value, {"file_data", "filename"}, "file_data", f"{where}.file") if kind == "file" else value
        return Document(source, pages=_optional(data, "pages", str, where), max_tokens=max_tokens)
    if kind == "video_url":
        value = _url(value, {"url"}, "url", f"{where}.video_url")
    fps = _optional(data, "fps", float, where)
    is_frames = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if kind == "video_frames" and not is_frames:
        raise ValueError(f"{where}.video_frames is {type(value).__name__}; a list of images was expected.")
    if not is_frames:
        if data.get("timestamps") is not None:
            raise ValueError(f"{where} gives timestamps for a video file; they belong to a list of frames.")
        frames = _optional(data, "num_frames", int, where)
        return Video(value, sample_fps=fps, num_frames=frames, max_tokens=max_tokens)
    if data.get("num_frames") is not None:
        raise ValueError(f"{where} gives num_frames for a list of frames; all of them are used.")
    frames = tuple(
        _url(frame, {"url", "detail"}, "url", f"{where}[{i}]") if isinstance(frame, Mapping) else frame
        for i, frame in enumerate(value)
    )
    seconds = data.get("timestamps")
    if seconds is not None:
        if not isinstance(seconds, Sequence) or isinstance(seconds, (str, bytes)):
            raise ValueError(f"{where}.timestamps is {type(seconds).__name__}; a list of seconds was expected.")
        seconds = tuple(_number(second, f"{where}.timestamps[{i}]") for i, second in enumerate(seconds))
    return Video(frames, frame_fps=fps, frame_seconds=seconds, max_tokens=max_tokens)


def _url(value: Any, allowed: set[str], key: str, where: str) -> Any:
    """The source inside {"url": source}; OpenAI's "detail" is accepted and has no effect: say max_tokens instead."""
    if not isinstance(value, Mapping):
        return value
    _refuse_unknown(value, allowed, where)
    if not value.get(key):
        raise ValueError(f"{where} has no {key!r}.")
    return value[key]


def _call_from(data: Any, where: str) -> ToolCall:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is {type(data).__name__}; an object with a 'function' was expected.")
    function = data.get("function") or data
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} has no function name.")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, (str, Mapping)):
        raise ValueError(
            f"{where} has arguments of type {type(arguments).__name__}; JSON text or an object was expected."
        )
    return ToolCall(function["name"], arguments, id=_optional(data, "id", str, where))


def _tokens(data: Mapping[str, Any], end: str, where: str) -> int | None:
    """A ceiling or floor in visual tokens, also accepted in pixels."""
    tokens, pixels = (_optional(data, f"{end}_{unit}", int, where) for unit in ("tokens", "pixels"))
    if tokens is not None and pixels is not None:
        raise ValueError(f"{where} gives both {end}_tokens and {end}_pixels; give one of them.")
    if pixels is not None:
        tokens = max(1, pixels // PIXELS_PER_TOKEN)
    return tokens


def _optional(data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = data.get(key)
    if value is None:
        return None
    if kind is float:
        return _number(value, f"{where}.{key}")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}.{key} is {value!r}; {'a whole number' if kind is int else 'a string'} was expected.")
    return value


def _number(value: Any, where: str) -> float:
    # Compared, not converted: a whole number of 400 digits is no float.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{where} is {value!r}; a number was expected.")
    return float(value)


def _refuse_unknown(data: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ValueError(f"{where} has an unknown field {key!r}{did_you_mean(str(key), known)}.")


# ---- to dictionaries --------------------------------------------------------------------------------------------


def message_to_dict(message: Message) -> dict[str, Any]:
    """The OpenAI-style dictionary; `message_from_dict` reads it back to an equal message."""
    data: dict[str, Any] = {"role": message.role}
    content = message.content
    if not content:
        data["content"] = ""
    elif len(content) == 1 and isinstance(content[0], Text) and content[0].text:
        data["content"] = content[0].text
    else:
        data["content"] = [_part_to_dict(part) for part in content]
    if message.role == "tool":
        (result,) = message.parts
        assert isinstance(result, ToolResult)
        data |= {"tool_call_id": result.id} if result.id is not None else {}
        data |= {"name": result.name} if result.name is not None else {}
    if message.thinking is not None:
        data["reasoning_content"] = message.thinking
    if message.tool_calls:
        data["tool_calls"] = [_call_to_dict(call) for call in message.tool_calls]
    return data


def messages_to_dicts(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [message_to_dict(message) for message in messages]


def _call_to_dict(call: ToolCall) -> dict[str, Any]:
    identity = {} if call.id is None else {"id": call.id}
    arguments = call.arguments if isinstance(call.arguments, str) else dict(call.arguments)
    return identity | {"type": "function", "function": {"name": call.name, "arguments": arguments}}


def _part_to_dict(part: ContentPart) -> dict[str, Any]:
    match part:
        case Text():
            return {"type": "text", "text": part.text}
        case Image():
            limits = {"min_tokens": part.min_tokens, "max_tokens": part.max_tokens}
            return {"type": "image", "image": part.source} | _given(limits)
        case Video(source=tuple()):
            seconds = None if part.frame_seconds is None else list(part.frame_seconds)
            options = {"fps": part.frame_fps, "timestamps": seconds, "max_tokens": part.max_tokens}
            return {"type": "video", "video": list(part.source)} | _given(options)
        case Video():
            options = {"fps": part.sample_fps, "num_frames": part.num_frames, "max_tokens": part.max_tokens}
            return {"type": "video", "video": part.source} | _given(options)
        case Document():
            return {"type": "document", "document": part.source} | _given(
                {"pages": part.pages, "max_tokens": part.max_tokens}
            )


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}
