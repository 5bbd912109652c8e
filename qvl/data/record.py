"""One training record: typed messages beside facts about its media, checked when it is read, JSON on disk."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from qvl.core.config import near_miss

Kind = Literal["pretrain", "sft", "rl", "pref"]
KINDS: tuple[str, ...] = get_args(Kind)
TimeStyle = Literal["seconds", "hms"]
BLOCK_KEYS: dict[str, set[str]] = {
    "text": {"text"},
    "image": {"image", "min_tokens", "max_tokens"},
    "video": {"video", "fps", "num_frames", "timestamps", "meta", "max_tokens"},
    "document": {"document", "pages", "max_tokens"},
    "boxes": {"image", "items", "form"},
}
MESSAGE_KEYS = {"role", "content", "thinking", "tool_calls", "tool_call_id", "name", "weight"}
ROLES = ("system", "user", "assistant", "tool", "document")
REWARD_KEYS = {"scorer", "truth", "answer"}
PLACES = {"bbox_abs": 4, "point_abs": 2, "bbox_3d": 9}
"""How a box block writes a place, and its count of numbers. The first two are pixels of the picture as it is stored, turned upright."""


@dataclass(frozen=True, kw_only=True)
class Medium:
    """What is known of a file without decoding it: enough to compute how many tokens it costs."""

    w: int | None = None
    h: int | None = None
    """Pixels, after an EXIF turn. Of a video: of its frames."""
    num_frames: int | None = None
    fps: float | None = None
    duration: float | None = None
    """Seconds; of a video."""
    page_sizes: tuple[tuple[float, float], ...] | None = None
    """Of a PDF: width and height of each page in points."""
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """A conversation or a document, as its JSON says it:

        {"id": "a1", "kind": "sft", "license": "CC0-1.0", "media": {"0.jpg": {"w": 640, "h": 480}},
         "messages": [{"role": "user", "content": [{"type": "image", "image": "0.jpg"}, {"type": "text", "text": "Find it."}]},
                      {"role": "assistant", "thinking": "...", "weight": 1, "content": [
                          {"type": "boxes", "image": "0.jpg", "items": [{"bbox_abs": [8, 16, 320, 240], "label": "cat"}]}]}]}

    Boxes are in pixels here and become thousandths when they are tokenised. A `pretrain` record has one message of the role `document`:
    all its text is learned. `messages` are plain dicts, checked by `read_record`; their keys are MESSAGE_KEYS and BLOCK_KEYS.
    """

    id: str
    kind: Kind
    messages: tuple[Mapping[str, Any], ...]
    media: Mapping[str, Medium] = field(default_factory=dict)
    source: str = ""
    """Where it came from: a data set's name."""
    category: str = ""
    lang: str = ""
    license: str = ""
    objects: tuple[Mapping[str, Any], ...] = ()
    """Annotations that are in no message: {"image", "label", "bbox_abs"}. Drawn in the preview, truths for rewards."""
    tools: tuple[Mapping[str, Any], ...] = ()
    reward: Mapping[str, Any] | None = None
    """How answers to an rl record are judged: {"scorer": a scorer's name, "truth": what it needs, "answer": a right answer as text}. The
    answer may be missing."""
    rejected: tuple[Mapping[str, Any], ...] = ()
    """Of a pref record: the turns that are worse than those at the end of `messages`, and stand in their place (`answer_place`)."""
    time_style: TimeStyle = "seconds"
    """How the time before a video's slices is written (report 2, "Video Timestamp": both styles are trained)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else a pipeline wants to keep: scores, hashes, where it was found."""

    def blocks(self) -> Iterator[Mapping[str, Any]]:
        """The content blocks of all messages, in order; those of the rejected ones come last."""
        for message in (*self.messages, *self.rejected):
            yield from content_blocks(message)


def answer_place(messages: Sequence[Mapping[str, Any]]) -> int:
    """Where the answer to the last question begins: behind all that is neither the assistant's nor a tool's."""
    return 1 + max((i for i, m in enumerate(messages) if m["role"] not in ("assistant", "tool")), default=-1)


def prompt_end(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many messages an answer is asked to: all but what the assistant says at the end. The last may be a tool's."""
    return 1 + max((i for i, m in enumerate(messages) if m["role"] != "assistant"), default=-1)


def same_turn(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two messages say the same; text as a string and as one block is the same, and weights do not count."""

    def said(message: Mapping[str, Any]) -> dict[str, Any]:
        bare = {key: value for key, value in message.items() if value and key not in ("weight", "content")}
        return bare | {"content": content_blocks(message)}

    return said(one) == said(other)


def content_blocks(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The typed blocks of a message; a plain string is one text block."""
    content = message.get("content")
    if content is None or content == "":
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def names_of(block: Mapping[str, Any]) -> list[str]:
    """The media a block shows: one file, or the frames of a video."""
    value = block[block["type"]]
    return list(value) if isinstance(value, list | tuple) else [value]


# ---- to and from JSON ---------------------------------------------------------------------------------------------


def record_to_json(record: Record) -> bytes:
    """The record as it stands in a shard; what is empty is left out."""
    data: dict[str, Any] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        if f.name == "media":
            value = {name: _given(medium) for name, medium in value.items()}
        if value or f.name in ("id", "kind", "messages"):
            data[f.name] = value
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def _given(medium: Medium) -> dict[str, Any]:
    return {f.name: value for f in fields(medium) if (value := getattr(medium, f.name)) is not None}


def read_record(text: bytes | str, where: str = "record") -> Record:
    """A record from its JSON, every key checked. ValueError says what is wrong with it, in one sentence."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}.") from None
    return record_from_dict(data, where)


def record_from_dict(data: Any, where: str = "record") -> Record:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is a {type(data).__name__}; expected an object with id, kind and messages.")
    _known(data, {f.name for f in fields(Record)}, where)
    for name in ("id", "kind", "messages"):
        if name not in data:
            raise ValueError(f"{where} lacks {name!r}.")
    if not isinstance(data["id"], str) or not data["id"]:
        raise ValueError(f"{where} has id {data['id']!r}; expected text.")
    where = f"{where} {data['id']!r}"
    if data["kind"] not in KINDS:
        raise ValueError(f"{where} has kind {data['kind']!r}; expected one of {', '.join(KINDS)}.")
    for name in ("source", "category", "lang", "license"):
        if not isinstance(data.get(name, ""), str):
            raise ValueError(f"{where} has {name} {data[name]!r}; expected text.")
    if data.get("time_style", "seconds") not in get_args(TimeStyle):
        raise ValueError(f"{where} has time_style {data['time_style']!r}; expected one of seconds, hms.")
    if data["kind"] == "pref":
        data = _rejected_from_extra(data, where)
    raw_media = _mapping(data.get("media", {}), "media", where)
    media = {name: _medium(value, f"{where} media {name!r}") for name, value in raw_media.items()}
    record = Record(
        **{k: v for k, v in data.items() if k not in ("messages", "media", "objects", "tools", "rejected")},
        messages=_sequence(data["messages"], "messages", where),
        objects=_sequence(data.get("objects", ()), "objects", where),
        tools=_sequence(data.get("tools", ()), "tools", where),
        rejected=_sequence(data.get("rejected", ()), "rejected", where),
        media=media,
    )
    _check_messages(record, "messages", where)
    if record.kind == "pref":
        _check_messages(record, "rejected", where)
        _check_pair(record, where)
    elif record.rejected:
        raise ValueError(f"{where} is a {record.kind} record with rejected messages; only pref records have them.")
    if record.kind == "rl":
        _check_prompt(record, where)
    for item in record.objects:
        _check_place(item, record, {"image", "label"}, f"{where} objects")
    return record


_TAGS = re.compile(r"<\|\w+\|>|</?think>|</?tool_call>|<image>|<video>|<bbox>|<ref-object>")


def _rejected_from_extra(data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Pref records of before `rejected` had a field: the row's own rejected answer was kept among `extra`. A plain text replaces the last
    message; anything else has to be read by the importer."""
    extra = data.get("extra")
    if not isinstance(extra, Mapping) or "rejected" not in extra or data.get("rejected"):
        return data
    text, messages = extra["rejected"], _sequence(data["messages"], "messages", where)
    if not isinstance(text, str) or _TAGS.search(text):
        raise ValueError(
            f"{where} keeps its rejected answer in extra, in the form of the row it came from; import the data again."
        )
    if not all(isinstance(message, Mapping) and message.get("role") in ROLES for message in messages):
        return data  # the messages' own check says it better
    rejected = [*messages[answer_place(messages) : -1], {"role": "assistant", "content": text}]
    others = {key: value for key, value in extra.items() if key != "rejected"}
    return {**data, "extra": others, "rejected": rejected}


def _check_pair(record: Record, where: str) -> None:
    place = answer_place(record.messages)
    chosen, rejected = record.messages[place:], record.rejected
    if place == 0 or not chosen or chosen[0]["role"] != "assistant":
        raise ValueError(
            f"{where} is a pref record without a question and an answer to it; messages end with the chosen answer."
        )
    if rejected[0]["role"] != "assistant" or answer_place(rejected):
        raise ValueError(
            f"{where} has rejected messages of the roles {', '.join(m['role'] for m in rejected)}; expected what the assistant says in "
            "place of the chosen answer (tools may answer it), without the question."
        )
    if len(chosen) == len(rejected) and all(map(same_turn, chosen, rejected)):
        raise ValueError(f"{where} has a rejected answer that is the chosen one; there is nothing to prefer.")


def _check_prompt(record: Record, where: str) -> None:
    if prompt_end(record.messages) == 0:
        raise ValueError(f"{where} is an rl record of the assistant's messages alone; expected a question.")
    reward = record.reward
    if not isinstance(reward, Mapping):
        raise ValueError(
            f"{where} is an rl record with the reward {reward!r}; expected an object with scorer and truth, which say how answers are "
            "judged."
        )
    _known(reward, REWARD_KEYS, f"{where} reward")
    if not isinstance(reward.get("scorer"), str) or not reward["scorer"]:
        raise ValueError(f"{where} reward has scorer {reward.get('scorer')!r}; expected a scorer's name.")
    if not isinstance(reward.get("truth"), Mapping):
        raise ValueError(
            f"{where} reward has truth {reward.get('truth')!r}; expected an object with what the scorer needs."
        )
    if not isinstance(reward.get("answer", ""), str):
        raise ValueError(f"{where} reward has answer {reward['answer']!r}; expected text.")


def _check_messages(record: Record, name: Literal["messages", "rejected"], where: str) -> None:
    messages: tuple[Mapping[str, Any], ...] = getattr(record, name)
    if not messages:
        raise ValueError(f"{where} has no {name}{' messages' * (name == 'rejected')}; expected at least one.")
    for i, message in enumerate(messages):
        here = f"{where} {name}[{i}]"
        _mapping(message, "a message", here)
        _known(message, MESSAGE_KEYS, here)
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{here} has the role {role!r}; expected one of {', '.join(ROLES)}.")
        if (role == "document") != (record.kind == "pretrain") or (role == "document" and len(messages) > 1):
            raise ValueError(f"{here} has the role {role!r}; a pretrain record holds one document, others hold a chat.")
        weight = message.get("weight", 1.0)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise ValueError(f"{here} has weight {weight!r}; 1 trains the message, 0 leaves it out of the loss.")
        if not isinstance(message.get("content", ""), str | list | tuple | None):
            raise ValueError(f"{here}.content is a {type(message['content']).__name__}; expected text or blocks.")
        for j, block in enumerate(content_blocks(message)):
            _check_block(block, record, f"{here}.content[{j}]")


def _check_block(block: Any, record: Record, where: str) -> None:
    _mapping(block, "a block", where)
    kind = block.get("type")
    if kind not in BLOCK_KEYS:
        raise ValueError(f"{where} has the type {kind!r}; expected one of {', '.join(BLOCK_KEYS)}.")
    _known(block, BLOCK_KEYS[kind] | {"type"}, where)
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise ValueError(f"{where}.text is {block.get('text')!r}; expected text.")
        return
    if kind == "boxes":
        if block.get("form", "json") not in ("json", "list"):
            raise ValueError(f"{where} has form {block['form']!r}; expected json or list.")
        items = _sequence(block.get("items", ()), "items", where)
        for item in items:
            _check_place({"image": block.get("image"), **item}, record, {"image", "label"}, where)
        if block.get("form") == "list" and len(items) != 1:
            raise ValueError(f"{where} writes {len(items)} places as one list; the form 'list' takes one.")
        return
    if kind not in block:
        raise ValueError(f"{where} has the type {kind!r} and no {kind!r} field.")
    for name in names_of(block):
        medium = record.media.get(name) if isinstance(name, str) else None
        if medium is None:
            raise ValueError(f"{where} shows {name!r}, which is not among the record's media.")
        lacking = _lacking(medium, kind, isinstance(block[kind], str))
        if lacking:
            raise ValueError(f"{where} shows {name!r}, whose facts lack {', '.join(lacking)}; import the data again.")
    if kind == "video" and not isinstance(block["video"], str):
        meta = block.get("meta") or {}
        given = [block.get("fps") is not None, block.get("timestamps") is not None, bool(meta)]
        if sum(given) != 1:
            raise ValueError(f"{where} is a list of frames; give one of fps, timestamps or meta (fps, frame_indices).")
        if meta and (not meta.get("fps") or len(meta.get("frame_indices") or ()) != len(block["video"])):
            raise ValueError(
                f"{where}.meta needs fps and one frame index for each of the {len(block['video'])} frames."
            )


def _lacking(medium: Medium, kind: str, is_file: bool) -> list[str]:
    needed = ("page_sizes",) if kind == "document" else ("w", "h")
    if kind == "video" and is_file:
        needed = ("w", "h", "num_frames", "fps")
    return [name for name in needed if not getattr(medium, name)]


def _check_place(item: Any, record: Record, others: set[str], where: str) -> None:
    _mapping(item, "a place", where)
    _known(item, set(PLACES) | others, where)
    found = [key for key in PLACES if key in item]
    if len(found) != 1:
        raise ValueError(f"{where} holds a place with {len(found)} of {', '.join(PLACES)}; expected one.")
    numbers = item[found[0]]
    if not isinstance(numbers, list | tuple) or len(numbers) != PLACES[found[0]] or not all(map(_is_number, numbers)):
        raise ValueError(f"{where} has {found[0]} {numbers!r}; expected {PLACES[found[0]]} numbers.")
    if found[0] == "bbox_3d":
        return
    if found[0] == "bbox_abs" and (numbers[2] < numbers[0] or numbers[3] < numbers[1]):
        raise ValueError(
            f"{where} has bbox_abs {list(numbers)}, whose x2 < x1 or y2 < y1; is it x, y, width, height? Corners are expected."
        )
    medium = record.media.get(item.get("image"))  # type: ignore[arg-type]
    if medium is None or not medium.w or not medium.h:
        raise ValueError(f"{where} has a place in {item.get('image')!r}; expected an image of the record with w and h.")
    width, height = medium.w, medium.h
    if any(not -1 <= x <= width + 1 for x in numbers[::2]) or any(not -1 <= y <= height + 1 for y in numbers[1::2]):
        raise ValueError(f"{where} has {found[0]} {list(numbers)}, outside the picture of {width}x{height} pixels.")


def _medium(data: Any, where: str) -> Medium:
    _known(_mapping(data, "a medium", where), {f.name for f in fields(Medium)}, where)
    for name in ("w", "h", "num_frames"):
        value = data.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{where} has {name} {value!r}; expected a whole number above 0.")
    for name in ("fps", "duration"):
        value = data.get(name)
        if value is not None and (not _is_number(value) or value < 0):
            raise ValueError(f"{where} has {name} {value!r}; expected a number of at least 0.")
    pages = data.get("page_sizes")
    if pages is not None:
        if not all(isinstance(p, list | tuple) and len(p) == 2 and all(map(_is_number, p)) for p in pages):
            raise ValueError(f"{where} has page_sizes {pages!r}; expected a width and a height for each page.")
        data = {**data, "page_sizes": tuple((float(w), float(h)) for w, h in pages)}
    return Medium(**data)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _known(data: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ValueError(f"{where} has an unknown key {key!r}{near_miss(str(key), known)}.")


def _mapping(value: Any, what: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {what} is a {type(value).__name__}; expected an object.")
    return value


def _sequence(value: Any, what: str, where: str) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise ValueError(f"{where}: {what} is a {type(value).__name__}; expected a list.")
    return tuple(value)
