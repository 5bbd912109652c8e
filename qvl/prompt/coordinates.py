"""Coordinates: boxes and points with a declared space, read from a model's answer and written as its JSON."""

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

Space = Literal["relative1000", "pixels"]
"""relative1000: 0 to 1000 along each axis whatever the picture's size, as Qwen3-VL answers (report 3.2, grounding).
pixels: of one picture."""

SCALE = 1000.0


@dataclass(frozen=True)
class Box:
    """A rectangle by its left, top, right and bottom edges."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str | None = None

    key = "bbox_2d"

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.x1, self.y1, self.x2, self.y2)

    def scaled(self, x: "Ratio", y: "Ratio") -> "Box":
        return Box(_times(self.x1, x), _times(self.y1, y), _times(self.x2, x), _times(self.y2, y), self.label)

    def ordered(self) -> "Box":
        """The same rectangle with left before right and top before bottom."""
        (x1, x2), (y1, y2) = sorted((self.x1, self.x2)), sorted((self.y1, self.y2))
        return Box(x1, y1, x2, y2, self.label)


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    label: str | None = None

    key = "point_2d"

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.x, self.y)

    def scaled(self, x: "Ratio", y: "Ratio") -> "Point":
        return Point(_times(self.x, x), _times(self.y, y), self.label)


@dataclass(frozen=True)
class Box3D:
    """A box in metres in the camera's frame: x right, y down, z forward. The picture's size does not touch it.

    `angles` holds the last three numbers as they are written. The report names them roll, pitch, yaw; the official
    drawing code multiplies them by 180 and reads degrees in the order pitch, yaw, roll. Nothing is converted here.
    """

    center: tuple[float, float, float]
    size: tuple[float, float, float]
    angles: tuple[float, float, float]
    label: str | None = None

    key = "bbox_3d"

    @property
    def numbers(self) -> tuple[float, ...]:
        return (*self.center, *self.size, *self.angles)

    def scaled(self, x: "Ratio", y: "Ratio") -> "Box3D":
        return self


Place = Box | Point | Box3D


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Places of one picture, all in one declared space."""

    items: tuple[Place, ...]
    space: Space
    is_truncated: bool = False
    """The text ended inside the list; `items` are those that came whole."""
    problems: tuple[str, ...] = field(default=(), compare=False)
    """One sentence for each object that looks like a place and is none."""

    def __post_init__(self) -> None:
        if self.space not in get_args(Space):
            raise ValueError(f"The space is {self.space!r}; it must be one of {', '.join(get_args(Space))}.")

    def __iter__(self) -> Iterator[Place]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def to_pixels(self, width: float, height: float) -> "Boxes":
        """In pixels of a picture of this size (its own size, not that after resizing)."""
        return self if self.space == "pixels" else self._in("pixels", (width, SCALE), (height, SCALE))

    def to_relative(self, width: float, height: float) -> "Boxes":
        """In thousandths of the width and height; not rounded, `to_json` does that."""
        return self if self.space == "relative1000" else self._in("relative1000", (SCALE, width), (SCALE, height))

    def _in(self, space: Space, x: "Ratio", y: "Ratio") -> "Boxes":
        if min(*x, *y) <= 0:
            width, height = (x[0], y[0]) if space == "pixels" else (x[1], y[1])
            raise ValueError(f"The picture is {width} by {height} pixels; both must be positive.")
        return replace(self, items=tuple(item.scaled(x, y) for item in self.items), space=space)


Ratio = tuple[float, float]
"""Kept as two numbers, so that 960 of 1920 pixels is 500 exactly."""


def _times(value: float, ratio: Ratio) -> float:
    return value * ratio[0] / ratio[1]


# ---- to text ------------------------------------------------------------------------------------------------------


def to_json(boxes: Boxes, *, fenced: bool = False) -> str:
    """The report's form, `[{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}]`: whole numbers in 2D, two decimals in 3D."""
    items = [item_to_dict(item) for item in boxes.items]
    if not fenced:
        return json.dumps(items, ensure_ascii=False)
    lines = ",\n".join("\t" + json.dumps(item, ensure_ascii=False) for item in items)
    return f"```json\n[\n{lines}\n]\n```" if items else "```json\n[]\n```"


def item_to_dict(item: Place) -> dict[str, Any]:
    numbers = [round(value, 2) if isinstance(item, Box3D) else _whole(value) for value in item.numbers]
    return {item.key: numbers} | ({} if item.label is None else {"label": item.label})


def _whole(value: float) -> int:
    return math.floor(value + 0.5)  # half up: Python's round would send 0.5 and 1.5 to even numbers


# ---- from text ----------------------------------------------------------------------------------------------------

FENCE = re.compile(r"```[A-Za-z]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
FARTHEST = 1e6
"""Of a coordinate in an answer: a thousand pictures away."""
LENGTHS = {"bbox_2d": 4, "point_2d": 2, "bbox_3d": 9}
ALIASES = {"bbox": "bbox_2d"}
"""Keys that models write for another; read, by the lenient reader, only where that other is not there."""
_JSON_WORD = re.compile(r"(?<=[\[:,\s])(null|true|false)(?=\s*[,}\]])")
_PYTHON_WORDS = {"null": "None", "true": "True", "false": "False"}


def read_boxes(text: str, space: Space = "relative1000", *, lenient: bool = False) -> Boxes:
    """Places in a model's answer. The space is declared by the caller, never guessed from the numbers.

    Reads lists inside ```json fences where there are any, else anywhere in the text. A list that was cut off gives its
    complete objects. Single quotes and trailing commas are accepted; an object that cannot be read for sure is left out
    and named in `problems`. `lenient` also takes the key "bbox" for "bbox_2d", and JSON's null, true and false among single quotes.
    """
    blocks = [match[1] for match in FENCE.finditer(text)]
    found = [_read_block(block, lenient) for block in blocks]
    if not any(items or problems for items, problems, _ in found):
        found = [_read_block(text, lenient)]
    return Boxes(
        items=tuple(item for items, _, _ in found for item in items),
        space=space,
        is_truncated=any(is_open for _, _, is_open in found),
        problems=tuple(problem for _, problems, _ in found for problem in problems),
    )


def _read_block(text: str, lenient: bool) -> tuple[list[Place], list[str], bool]:
    items: list[Place] = []
    problems: list[str] = []
    objects, is_open = _innermost_objects(text)
    for source in objects:
        if not any(key in source for key in (*LENGTHS, *(ALIASES if lenient else ()))):
            continue
        data = _read_object(source, lenient)
        if data is None:
            problems.append(f"This is no JSON object: {_short(source)}.")
            continue
        if lenient:
            data = {key if (name := ALIASES.get(key, key)) in data else name: value for key, value in data.items()}
        for key, length in LENGTHS.items():
            if key not in data:
                continue
            if (numbers := _numbers(data[key], length)) is None:
                problems.append(f"{key} must be {length} numbers: {_short(source)}.")
            else:
                items.append(_place(key, numbers, data.get("label")))
    return items, problems, is_open


def _innermost_objects(text: str) -> tuple[list[str], bool]:
    """The `{...}` without another inside, in order, and whether the text ends in the middle of an object or list."""
    objects: list[str] = []
    starts: list[int] = []
    has_child: list[bool] = []
    quote = ""
    lists = 0
    at = 0
    while at < len(text):
        letter = text[at]
        if quote:
            if letter == "\\":
                at += 1
            elif letter == quote and (quote == '"' or _ends_single_quoted(text, at)):
                quote = ""
        elif letter == "{":
            if has_child:
                has_child[-1] = True
            starts.append(at)
            has_child.append(False)
        elif letter == "}" and starts:
            start = starts.pop()
            if not has_child.pop():
                objects.append(text[start : at + 1])
        elif letter in "[]":
            lists = max(0, lists + (1 if letter == "[" else -1))
        elif starts and (letter == '"' or (letter == "'" and text[max(0, at - 8) : at].rstrip()[-1:] in "{[,:")):
            quote = letter
        at += 1
    return objects, bool(starts) or (lists > 0 and bool(objects))


def _ends_single_quoted(text: str, at: int) -> bool:
    """Whether the ' at `at` closes a string: only before a sign that may follow one, so that "it's" goes on."""
    following = text[at + 1 : at + 8].lstrip()[:1]
    return following in (":", ",", "}", "]", "")


def _read_object(source: str, lenient: bool) -> Mapping[str, Any] | None:
    if len(source) > 20_000:  # a place is short; the readers below are recursive
        return None
    for read in (json.loads, ast.literal_eval, *((_read_mixed,) if lenient else ())):
        try:
            data = read(source)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return data if isinstance(data, Mapping) else None
    return None


def _read_mixed(source: str) -> Any:
    """A Python dictionary with JSON's null, true or false in it."""
    return ast.literal_eval(_JSON_WORD.sub(lambda match: _PYTHON_WORDS[match[0]], source))


def _numbers(value: Any, length: int) -> tuple[float, ...] | None:
    if not isinstance(value, (list, tuple)) or len(value) != length:
        return None
    if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in value):
        return None
    try:
        numbers = tuple(float(number) for number in value)
    except OverflowError:
        return None
    # A number whose digits repeat without end is no place, and would be drawn pixel by pixel.
    return numbers if all(abs(number) <= FARTHEST for number in numbers) else None  # NaN is not


def _place(key: str, numbers: tuple[float, ...], label: Any) -> Place:
    label = label if label is None or isinstance(label, str) else str(label)
    if key == "point_2d":
        return Point(numbers[0], numbers[1], label)
    if key == "bbox_2d":
        return Box(numbers[0], numbers[1], numbers[2], numbers[3], label)
    a, b, c, d, e, f, g, h, i = numbers
    return Box3D((a, b, c), (d, e, f), (g, h, i), label)


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
