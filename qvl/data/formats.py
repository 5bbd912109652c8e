"""Rows of the common data formats become records: OpenAI messages, ms-swift, LLaVA and ShareGPT, plain text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from qvl.data.marked import llava_messages, need, swift_messages, take_thought
from qvl.data.media import MediaBag
from qvl.data.native import read_native
from qvl.data.pairs import PAIR_KEYS, REJECTED_KEYS, rejected_turns, split_pair
from qvl.data.record import Kind, Record, record_from_dict
from qvl.prompt.message import ContentPart, Document, Image, Message, Text, Video
from qvl.prompt.openai import messages_from_dicts

Format = Literal["openai", "swift", "llava", "text", "record"]
FORMATS: tuple[str, ...] = get_args(Format)


def detect(row: Mapping[str, Any]) -> Format:
    """Which format a row is in, by its keys."""
    if "conversations" in row:
        return "llava"
    if "messages" in row and "kind" in row and "id" in row:
        return "record"
    if "messages" in row:
        has_media = {"images", "videos", "objects"} & row.keys() or row.get("image") or row.get("video")
        return "swift" if has_media or _has_call_roles(row) else "openai"
    if _is_bare_pair(row):
        return "swift" if {"images", "videos"} & row.keys() or row.get("image") or row.get("video") else "openai"
    if "query" in row and "response" in row:
        return "swift"
    if isinstance(row.get("text"), str):
        if media := sorted(_unread_media(row, set())):
            raise ValueError(
                f"a row of text has {media[0]!r} too; give conversations, or --format text to read the text alone."
            )
        return "text"
    raise ValueError(
        f"a row has the keys {', '.join(map(str, row)) or 'none'}; messages, conversations, query and response, or text was expected."
    )


def _is_bare_pair(row: Mapping[str, Any]) -> bool:
    """Whether the row's only conversations are the chosen and the rejected one, as TRL has them."""
    return {"chosen", "rejected"} <= row.keys() and not {"messages", "conversations", "query"} & row.keys()


def _has_call_roles(row: Mapping[str, Any]) -> bool:
    return any(
        isinstance(m, Mapping) and m.get("role") in ("tool_call", "tool_response") for m in row["messages"] or ()
    )


def to_record(row: Mapping[str, Any], format: Format, bag: MediaBag, *, id: str, kind: Kind, **facts: str) -> Record:
    """A record of the row; its media are taken into `bag`. ValueError says what is wrong with the row: media that the format does not
    read are, so that no row becomes text without a word.

    `facts`: source, category, lang, license, for rows that do not say.
    """
    if format == "record":
        return _record(row, bag)
    data: dict[str, Any] = {"id": str(row.get("id") or id), "kind": kind, "media": {}}
    if format == "text":
        data |= {"kind": "pretrain", "messages": [{"role": "document", "content": need(row, "text", str)}]}
    elif kind == "pretrain":
        raise ValueError("a conversation cannot be a pretrain record; import it as sft, or give rows with text.")
    elif kind == "pref":
        row, other = split_pair(row)
        data["messages"] = _messages(row, format, bag)
        data["rejected"] = rejected_turns(data["messages"], _other_messages(other, format, bag))
    elif _is_bare_pair(row):
        raise ValueError("the row is a pair of a chosen and a rejected answer; import it as pref (--kind pref).")
    else:
        data["messages"] = _messages(row, format, bag)
    if kind == "sft" and format != "text" and not any(m["role"] == "assistant" for m in data["messages"]):
        raise ValueError("the conversation has no assistant's message; there is nothing to learn from it.")
    for name in ("source", "category", "lang", "license"):
        value = row.get(name)
        data[name] = value if isinstance(value, str) and value else facts.get(name, "")
    if tools := row.get("tools"):
        data["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    if isinstance(row.get("reward"), Mapping):
        data["reward"] = row["reward"]
    data["media"] = {name: _plain(medium) for name, medium in bag.facts.items()}
    return record_from_dict(data, "row")


def _messages(row: Mapping[str, Any], format: Format, bag: MediaBag) -> list[dict[str, Any]]:
    """The row's conversation as record messages."""
    _check_no_media_is_unread(row, READS_MEDIA[format])
    readers = {"openai": _openai, "swift": swift_messages, "llava": llava_messages}
    return read_native(readers[format](row, bag))


def _other_messages(row: Mapping[str, Any], format: Format, bag: MediaBag) -> list[dict[str, Any]]:
    """The rejected conversation of a pair, whose media are in the bag already, under the same names."""
    other = MediaBag(root=bag.root, decoder=bag.decoder)
    messages = _messages(row, format, other)
    if any(bag.files.get(name) != data for name, data in other.files.items()):
        raise ValueError(
            "the rejected conversation shows other media than the chosen one; a pair asks one question, so both see the same media."
        )
    return messages


_CONVERSATION = {"messages", "conversations", "query", "response", "history", "system", "text", "objects"}
_FACTS = {
    "id",
    "kind",
    "source",
    "category",
    "lang",
    "license",
    "tools",
    "reward",
}
READS_MEDIA: dict[Format, set[str]] = {
    "openai": set(),
    "swift": {"image", "images", "video", "videos"},
    "llava": {"image", "images", "video", "videos"},
}
"""Format -> the keys of a row whose media it reads; OpenAI's messages hold theirs themselves."""
_MEDIA_NAMES = re.compile(
    r"(?i)(input_?|raw_?)?(images?|imgs?|pictures?|pics?|photos?|videos?|clips?|frames?|audios?|sounds?|speech|pdfs?|documents?|files?)"
    r"(_?(path|file|url|bytes|data|base64)s?)?"
)
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
_OTHER_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".wav", ".mp3", ".flac", ".ogg", ".pdf")


_TEXT_KEYS = _CONVERSATION | _FACTS
KNOWN_KEYS = {format: _TEXT_KEYS | media for format, media in READS_MEDIA.items()} | {"text": _TEXT_KEYS}


def unread_keys(row: Mapping[str, Any], format: Format, kind: Kind) -> list[str]:
    """Keys of a row that no record of that kind has a place for; a record of our own form was checked key by key."""
    known = KNOWN_KEYS.get(format, set()) | (PAIR_KEYS if kind == "pref" else set())
    return [] if format == "record" else [key for key in row if key not in known]


def _check_no_media_is_unread(row: Mapping[str, Any], read: set[str]) -> None:
    for key in _unread_media(row, read):
        where = " or ".join(sorted(read)) or "the messages, as image_url or video"
        raise ValueError(
            f"the row's key {key!r} holds media and is not read; name it in {where}, or drop it from the row."
        )
    for one, many in (("image", "images"), ("video", "videos")):
        if {one, many} <= read and row.get(one) and row.get(many):
            raise ValueError(f"the row has {one!r} and {many!r}; give all of them in one.")


def _unread_media(row: Mapping[str, Any], read: set[str]) -> Iterator[str]:
    for key, value in row.items():
        if key in _TEXT_KEYS or key in REJECTED_KEYS or key in read or value is None or value in ("", [], {}):
            continue
        # A name such as file_name beside media that are read is a note; alone it would be the row's only trace of an image.
        if _MEDIA_NAMES.fullmatch(key) or (_is_media(value) and not any(row.get(name) for name in read)):
            yield key


def _is_media(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_media, value))
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or _is_media(value.get("path"))
    if isinstance(value, str):
        return value[:5].lower() == "data:" or value.lower().endswith(_IMAGE_ENDINGS + _OTHER_ENDINGS)
    return isinstance(value, bytes | bytearray)


def _plain(medium: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(medium).items() if value is not None}


def _record(row: Mapping[str, Any], bag: MediaBag) -> Record:
    """A record in our own form whose media lie beside the list: {"media": {"0.jpg": {"path": "cats/1.jpg"}}}."""
    given = row.get("media") or {}
    renamed: dict[str, str] = {}
    for name, value in given.items():
        path = value.get("path", name) if isinstance(value, Mapping) else value
        kinds = {"mp4": "video", "webm": "video", "mkv": "video", "mov": "video", "avi": "video", "pdf": "document"}
        renamed[name] = bag.add(path, kinds.get(str(path).rpartition(".")[2].lower(), "image"))  # type: ignore[arg-type]
    text = json.dumps({**row, "media": {}})
    data = _rename(json.loads(text), renamed)
    return record_from_dict({**data, "media": {name: _plain(medium) for name, medium in bag.facts.items()}}, "row")


def _rename(value: Any, names: Mapping[str, str], key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _rename(v, names, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_rename(v, names, key) for v in value]
    return names.get(value, value) if isinstance(value, str) and key in ("image", "video", "document") else value


# ---- OpenAI -------------------------------------------------------------------------------------------------------


def _openai(row: Mapping[str, Any], bag: MediaBag) -> list[dict[str, Any]]:
    given = need(row, "messages", Sequence)
    bare = [{k: v for k, v in m.items() if k != "weight" and v is not None} for m in given if isinstance(m, Mapping)]
    if len(bare) != len(given):
        raise ValueError("a message is no object; role and content were expected.")
    messages = [_from_message(m, bag) for m in messages_from_dicts(bare)]
    for message, source in zip(messages, given, strict=True):
        if source.get("weight") is not None:
            message["weight"] = source["weight"]
    return messages


def _from_message(message: Message, bag: MediaBag) -> dict[str, Any]:
    data: dict[str, Any] = {"role": message.role, "content": [_block(part, bag) for part in message.content]}
    if message.thinking is not None:
        data["thinking"] = message.thinking
    elif message.role == "assistant":
        take_thought(data)
    if message.tool_calls:
        data["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return data


def _block(part: ContentPart, bag: MediaBag) -> dict[str, Any]:
    match part:
        case Text():
            return {"type": "text", "text": part.text}
        case Image():
            limits = {"min_tokens": part.min_tokens, "max_tokens": part.max_tokens}
            return {"type": "image", "image": bag.add(part.source, "image")} | _given(limits)
        case Video(source=tuple()):
            seconds = None if part.frame_seconds is None else list(part.frame_seconds)
            limits = {"fps": part.frame_fps, "timestamps": seconds, "max_tokens": part.max_tokens}
            return {"type": "video", "video": [bag.add(frame, "image") for frame in part.source]} | _given(limits)
        case Video():
            limits = {"fps": part.sample_fps, "num_frames": part.num_frames, "max_tokens": part.max_tokens}
            return {"type": "video", "video": bag.add(part.source, "video")} | _given(limits)
        case Document():
            limits = {"pages": part.pages, "max_tokens": part.max_tokens}
            return {"type": "document", "document": bag.add(part.source, "document")} | _given(limits)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
