"""A record becomes a conversation: media by reference, boxes written in thousandths of their picture (report 3.2, grounding)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qvl.data.record import PLACES, Record, content_blocks
from qvl.prompt.coordinates import Box, Box3D, Boxes, Place, Point, item_to_dict, to_json
from qvl.prompt.document import parse_pages
from qvl.prompt.message import ContentPart, Document, Image, Message, Text, Video
from qvl.prompt.openai import message_from_dict
from qvl.prompt.template import PlainText, Segment, VisualSlot, Written

MOST_PAGES = 2000


@dataclass(frozen=True)
class MediaName:
    """Stands in a message for a file of the record."""

    name: str


@dataclass(frozen=True)
class Page:
    """One page, from 0, of a PDF of the record."""

    name: str
    number: int


def conversation(record: Record) -> list[Message]:
    """The record's messages; pages of documents are images. For everything but a pretraining document."""
    return [_message(record, message, f"messages[{i}]") for i, message in enumerate(record.messages)]


def document_segments(record: Record) -> list[Segment]:
    """A pretraining document: loss on all text, none on pictures and times, `<|endoftext|>` learned at its end."""
    (message,) = record.messages
    parts = _parts(record, message, "messages[0]")
    segments: list[Segment] = [
        PlainText(part.text, is_target=True) if isinstance(part, Text) else VisualSlot(part)  # type: ignore[arg-type]
        for part in parts
    ]
    return [*(s for s in segments if s.text), Written("<|endoftext|>", is_target=True)]


def trained_messages(record: Record) -> frozenset[int]:
    """Places, from 0, of the assistant's messages whose weight is not 0."""
    return frozenset(
        i for i, message in enumerate(record.messages) if message["role"] == "assistant" and message.get("weight", 1)
    )


def _message(record: Record, message: Mapping[str, Any], where: str) -> Message:
    bare = {key: value for key, value in message.items() if key not in ("weight", "content")}
    return message_from_dict({**bare, "content": ""}, where=where).with_content(_parts(record, message, where))


def _parts(record: Record, message: Mapping[str, Any], where: str) -> list[ContentPart]:
    return [part for block in content_blocks(message) for part in _parts_of(record, block, where)]


def _parts_of(record: Record, block: Mapping[str, Any], where: str) -> list[ContentPart]:
    match block["type"]:
        case "text":
            return [Text(block["text"])]
        case "boxes":
            return [Text(boxes_text(record, block))]
        case "image":
            limits = {key: block[key] for key in ("min_tokens", "max_tokens") if block.get(key) is not None}
            return [Image(MediaName(block["image"]), **limits)]
        case "video":
            return [_video(block)]
        case "document":
            sizes = record.media[block["document"]].page_sizes
            assert sizes is not None
            pages = parse_pages(block.get("pages"), len(sizes), MOST_PAGES)
            limit = block.get("max_tokens")
            Document(MediaName(block["document"]), max_tokens=limit)  # checks the limit
            return [Image(Page(block["document"], number), max_tokens=limit) for number in pages]
        case kind:
            raise ValueError(f"{where} has a block of type {kind!r}.")


def _video(block: Mapping[str, Any]) -> Video:
    limit = block.get("max_tokens")
    if isinstance(block["video"], str):
        return Video(
            MediaName(block["video"]),
            sample_fps=block.get("fps"),
            num_frames=block.get("num_frames"),
            max_tokens=limit,
        )
    frames = tuple(MediaName(name) for name in block["video"])
    seconds = block.get("timestamps")
    if meta := block.get("meta"):
        seconds = [index / meta["fps"] for index in meta["frame_indices"]]
    return Video(
        frames,
        frame_fps=block.get("fps"),
        frame_seconds=None if seconds is None else tuple(float(s) for s in seconds),
        max_tokens=limit,
    )


def boxes_text(record: Record, block: Mapping[str, Any]) -> str:
    """The block as the model writes it: `[{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}]`, or for form "list" the numbers alone."""
    items: list[Place] = []
    for item in block.get("items", ()):
        name = item.get("image", block.get("image"))
        place = place_of(item)
        medium = record.media.get(name)
        if medium is not None and medium.w and medium.h:
            (place,) = Boxes(items=(place,), space="pixels").to_relative(medium.w, medium.h).items
        items.append(place)
    if block.get("form") == "list":
        (place,) = items
        numbers = item_to_dict(replace(place, label=None))[place.key]
        return "[" + ", ".join(map(str, numbers)) + "]"
    return to_json(Boxes(items=tuple(items), space="relative1000"))


def place_of(item: Mapping[str, Any]) -> Place:
    """A box, point or 3D box in the units of the record."""
    (key,) = (key for key in PLACES if key in item)
    numbers, label = [float(n) for n in item[key]], item.get("label")
    if key == "point_abs":
        return Point(numbers[0], numbers[1], label)
    if key == "bbox_abs":
        return Box(numbers[0], numbers[1], numbers[2], numbers[3], label)
    a, b, c, d, e, f, g, h, i = numbers
    return Box3D((a, b, c), (d, e, f), (g, h, i), label)
