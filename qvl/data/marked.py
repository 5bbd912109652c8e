"""Conversations whose text says <image> or <bbox> where a medium stands: ms-swift, LLaVA, ShareGPT."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qvl.data.media import MediaBag
from qvl.data.native import media_marks
from qvl.prompt.template import split_thinking

_MARK = re.compile(r"(<image>|<video>|<bbox>|<ref-object>)")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}


def swift_messages(row: Mapping[str, Any], bag: MediaBag) -> list[dict[str, Any]]:
    if "messages" in row:
        turns = [_turn(message) for message in need(row, "messages", Sequence)]
    else:
        pairs = [*(row.get("history") or ()), (need(row, "query", str), need(row, "response", str))]
        turns = [("system", row["system"], None)] if row.get("system") else []
        turns += [turn for q, a in pairs for turn in (("user", q, None), ("assistant", a, None))]
    return _marked(
        turns, _as_list(row, "images", "image"), _as_list(row, "videos", "video"), bag, row.get("objects") or {}
    )


_TURN_KEYS = {"role", "content", "loss", "weight"}


def _turn(message: Any) -> tuple[Any, Any, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is a {type(message).__name__}; role and content were expected.")
    if others := sorted(str(key) for key in message.keys() - _TURN_KEYS if message[key] is not None):
        raise ValueError(
            f"a message has {others[0]!r} in a row with images, videos or objects of its own; say it in ms-swift's turns (tool_call, "
            "<think>...</think>), or put the media into the messages as image_url."
        )
    return message.get("role"), message.get("content"), message.get("loss", message.get("weight"))


def _words(content: Any) -> str:
    """A turn's text. Typed blocks, as chat templates take them, become text whose marks say where the row's media stand."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise ValueError(f"a message's content is a {type(content).__name__}; text or a list of blocks was expected.")
    words = []
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        given = {key for key, value in block.items() if value is not None} if isinstance(block, Mapping) else set()
        if kind == "text" and isinstance(block["text"], str) and given == {"type", "text"}:
            words.append(block["text"])
        elif kind in ("image", "video") and given == {"type"}:
            words.append(f"<{kind}>")
        else:
            raise ValueError(
                "a message holds a block that is neither text nor a bare image or video; where the row names its media, blocks name none."
            )
    return "".join(words)


def llava_messages(row: Mapping[str, Any], bag: MediaBag) -> list[dict[str, Any]]:
    turns = []
    for turn in need(row, "conversations", Sequence):
        if not isinstance(turn, Mapping):
            raise ValueError(f"a turn is a {type(turn).__name__}; from and value were expected.")
        turns.append((turn.get("from", turn.get("role")), turn.get("value", turn.get("content")), turn.get("weight")))
    if row.get("system"):
        turns = [("system", row["system"], None), *turns]
    return _marked(turns, _as_list(row, "image", "images"), _as_list(row, "video", "videos"), bag, {})


def _marked(
    turns: Sequence[tuple[Any, Any, Any]],
    images: list[Any],
    videos: list[Any],
    bag: MediaBag,
    objects: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Messages whose media stand where the text says `<image>` or `<video>`; where no mark is, before the first user's words."""
    texts = [media_marks(_words(content)) for _, content, _ in turns]
    marks = [mark for (role, _, _), text in zip(turns, texts, strict=True) for mark in _MARK.findall(text)]
    lacking = ""
    for mark, media in (("<image>", images), ("<video>", videos)):
        if media and mark not in marks:
            lacking += mark * len(media)
        elif marks.count(mark) != len(media):
            raise ValueError(
                f"the text has {marks.count(mark)} {mark} and the row {len(media)} files for them; make them equal."
            )
    refs, boxes = list(objects.get("ref") or ()), list(objects.get("bbox") or ())
    for mark, values in (("<ref-object>", refs), ("<bbox>", boxes)):
        if marks.count(mark) != len(values) and marks.count(mark):
            raise ValueError(
                f"the text has {marks.count(mark)} {mark} and the row's objects {len(values)}; make them equal."
            )
    names = {"<image>": iter([bag.add(v, "image") for v in images]), "<video>": iter([_video(v, bag) for v in videos])}
    places = iter(_places(boxes, objects, bag))
    words = iter(refs)
    messages: list[dict[str, Any]] = []
    for (role, _, weight), text in zip(turns, texts, strict=True):
        known = _ROLES.get(str(role))
        if known is None:
            raise ValueError(f"a message comes from {role!r}; expected one of {', '.join(_ROLES)}.")
        if known == "call":
            _add_calls(messages, text)
            continue
        if known == "user" and lacking:
            text, lacking = lacking + text, ""
        blocks: list[dict[str, Any]] = []
        for piece in _MARK.split(text):
            if piece == "<image>":
                blocks.append({"type": "image", "image": next(names[piece])})
            elif piece == "<video>":
                blocks.append({"type": "video", **next(names[piece])})
            elif piece == "<bbox>" and boxes:
                blocks.append({"type": "boxes", "form": "list", **next(places)})
            elif piece:
                piece = str(next(words)) if piece == "<ref-object>" and refs else piece
                blocks.append({"type": "text", "text": piece})
        message: dict[str, Any] = {"role": known, "content": blocks}
        if known == "assistant":
            take_thought(message)
        if weight is not None:
            message["weight"] = int(bool(weight))
        messages.append(message)
    return messages


def _video(value: Any, bag: MediaBag) -> dict[str, Any]:
    if isinstance(value, list | tuple):
        raise ValueError(
            "a video is a list of frames without their times; give the file, or frames with fps in OpenAI's form."
        )
    return {"video": bag.add(value, "video")}


def _places(boxes: Sequence[Any], objects: Mapping[str, Any], bag: MediaBag) -> list[dict[str, Any]]:
    images = [name for name, medium in bag.facts.items() if medium.num_frames is None]
    ids = objects.get("image_id") or [0] * len(boxes)
    found = []
    for box, number in zip(boxes, ids, strict=True):
        if not 0 <= number < len(images):
            raise ValueError(f"a box belongs to image {number} and the row has {len(images)}.")
        name = images[number]
        medium = bag.facts[name]
        assert medium.w is not None and medium.h is not None
        kind = objects.get("bbox_type", "real")
        if kind not in ("real", "norm1"):
            raise ValueError(f"the boxes are of type {kind!r}; expected real (pixels) or norm1.")
        scale = (medium.w, medium.h) if kind == "norm1" else (1, 1)
        numbers = [value * scale[i % 2] for i, value in enumerate(box)]
        found.append({"image": name, "items": [{("point_abs" if len(numbers) == 2 else "bbox_abs"): numbers}]})
    return found


def _add_calls(messages: list[dict[str, Any]], text: str) -> None:
    """A tool call of its own turn joins the assistant's message before it, or makes one."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"a tool call is no JSON: {error}.") from None
    calls = [{"type": "function", "function": call} for call in (data if isinstance(data, list) else [data])]
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": []})
    messages[-1].setdefault("tool_calls", []).extend(calls)


def _as_list(row: Mapping[str, Any], *names: str) -> list[Any]:
    value = next((row[name] for name in names if row.get(name) is not None), [])
    return list(value) if isinstance(value, list | tuple) else [value]


def need(row: Mapping[str, Any], name: str, kind: type) -> Any:
    value = row.get(name)
    if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str)) or not value:
        raise ValueError(
            f"{name} is {str(value)[:60]!r}; {'text' if kind is str else 'a list that is not empty'} was expected."
        )
    return value


def take_thought(message: dict[str, Any]) -> None:
    """A thought that came as `<think>...</think>` before the answer becomes the message's own field."""
    blocks = message["content"]
    if blocks and blocks[0].get("text", "").lstrip().startswith("<think>"):
        parted = split_thinking(blocks[0]["text"])
        if parted is None:
            raise ValueError("an assistant's message begins with <think> and has no </think>; close the thought.")
        thought, answer = parted
        message["content"] = [*([{"type": "text", "text": answer}] if answer else []), *blocks[1:]]
        if thought:
            message["thinking"] = thought
