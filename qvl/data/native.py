"""Qwen's own control marks, spelled in the text of rows: read into what they mean, or the row is rejected.

Text is always tokenised as letters, so a mark that stayed in an assistant's turn would be learned as letters that no parser takes for a
call or a box. What people ask about may hold such words; there they stay.
"""

import re
from collections.abc import Mapping
from typing import Any

from qvl.prompt.answer import parse_answer
from qvl.prompt.control import QWEN3_VL_CONTROL

IMAGE_MARK, VIDEO_MARK = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
_VISION = tuple(name for name in QWEN3_VL_CONTROL if "vision" in name or name in ("<|image_pad|>", "<|video_pad|>"))
_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
_CALL = re.compile(r"<tool_call>.*?</tool_call>", re.DOTALL)


def media_marks(text: str) -> str:
    """The template's own marks for an image and a video as the short ones that row formats use."""
    return text.replace(IMAGE_MARK, "<image>").replace(VIDEO_MARK, "<video>")


def read_native(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with tool calls and tool responses read out of their text. ValueError names a mark that means nothing here."""
    found: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        if role in ("tool", "user") and (responses := _responses(message)) is not None:
            found += [{"role": "tool", "content": [{"type": "text", "text": text}]} for text in responses]
            continue
        if role == "assistant":
            message = _with_calls(message)
        _reject_marks(message)
        found.append(message)
    return found


def _text_of(message: Mapping[str, Any]) -> str:
    return "".join(block.get("text", "") for block in message["content"] if block["type"] == "text")


def _responses(message: Mapping[str, Any]) -> list[str] | None:
    """What stands in the wrapped responses that a turn consists of; the template wraps them itself. None for any other turn."""
    text = _text_of(message)
    if any(block["type"] != "text" for block in message["content"]) or not text.lstrip().startswith("<tool_response>"):
        return None
    if _RESPONSE.sub("", text):
        raise ValueError(
            f"a {message['role']}'s turn holds <tool_response> and other words beside it; give each response a turn of its own."
        )
    return _RESPONSE.findall(text)


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    """The assistant's message with the calls that its text spells as its own calls."""
    text = _text_of(message)
    if "<tool_call>" not in text:
        return message
    if len(message["content"]) > 1:
        raise ValueError("an assistant's turn spells <tool_call> among blocks; give its calls as tool_calls.")
    before, _, calls = text.partition("<tool_call>")
    if _CALL.sub("", "<tool_call>" + calls).strip():
        raise ValueError("an assistant's turn has words behind a <tool_call>; the template writes calls last.")
    parsed = parse_answer("<tool_call>" + calls)
    if parsed.problems:
        raise ValueError(f"an assistant's turn spells a <tool_call> that cannot be read: {parsed.problems[0]}")
    given = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in parsed.message.tool_calls
    ]
    words = before.removesuffix("\n")
    content = [{"type": "text", "text": words}] if words.strip() else []
    return {**message, "content": content, "tool_calls": [*message.get("tool_calls", ()), *given]}


def _reject_marks(message: Mapping[str, Any]) -> None:
    text = _text_of(message)
    marks = QWEN3_VL_CONTROL if message["role"] == "assistant" else _VISION
    if "<" not in text or (mark := next((mark for mark in marks if mark in text), None)) is None:
        return
    if mark in _VISION:
        advice = "name the file in images or videos, one for each mark"
    elif "box" in mark or "quad" in mark or "ref" in mark:
        advice = "give places as objects, as boxes blocks, or as JSON of thousandths"
    elif "think" in mark:
        advice = "a thought stands once, closed, before the answer"
    else:
        advice = "leave it to the template"
    raise ValueError(f"the {message['role']}'s text spells the control token {mark}, which would be letters; {advice}.")
