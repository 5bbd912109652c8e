"""Boxes, points and 3D boxes with their labels, drawn on a picture so that they can be read at any size."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image, ImageDraw

from qvl.show.letters import Font, font_for

# Okabe and Ito's colours, which differ also for the colour-blind, from the strongest on photographs to the weakest.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2", "#999999")
LEAST_SIDE = 480
"""A picture whose longer side is less is enlarged first: a label of 12 pixels would cover it otherwise."""

Rectangle = tuple[float, float, float, float]


class Place(Protocol):
    """What is drawn (qvl.prompt.coordinates has these), in pixels of the picture; a 3D box in metres in the camera's frame."""

    @property
    def key(self) -> str:
        """bbox_2d, point_2d or bbox_3d."""
        ...

    @property
    def numbers(self) -> tuple[float, ...]: ...

    @property
    def label(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole: focal lengths and centre in pixels."""

    fx: float
    fy: float
    cx: float
    cy: float


def camera_for(width: int, height: int, degrees: float = 60.0) -> Camera:
    """The camera assumed where none is known: its view is `degrees` wide horizontally, its centre the picture's, its pixels square."""
    focal = width / 2 / math.tan(math.radians(degrees) / 2)
    return Camera(fx=focal, fy=focal, cx=width / 2, cy=height / 2)


def draw_places(picture: Image.Image, places: Iterable[Place], *, camera: Camera | None = None) -> Image.Image:
    """A copy of the picture with the places on it: one colour a label, a number where there is none.

    Lines and letters grow with the picture. A small picture comes back enlarged by a whole factor.
    """
    places = list(places)
    camera = camera or camera_for(*picture.size)
    factor = max(1, math.ceil(LEAST_SIDE / max(picture.size)))
    canvas = picture.convert("RGB")
    if factor > 1:
        canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    stroke = max(2, round(max(canvas.size) / 400))
    colours = colours_of([place.label for place in places])
    anchors = [_draw_lines(pen, place, camera, factor, stroke, colours[place.label]) for place in places]
    # Labels last, so that no line crosses a word; the smallest box first, which has the least room.
    letters = font_for(max(12, round(max(canvas.size) / 55)), "".join(place.label or "" for place in places))
    taken: list[Rectangle] = []
    for number in sorted(range(len(places)), key=lambda i: _area(anchors[i])):
        if (anchor := anchors[number]) is not None:
            label = places[number].label
            text = label if label else str(number + 1)
            taken.append(_draw_label(pen, text, anchor, taken, canvas.size, letters, colours[label]))
    return canvas


def colours_of(labels: Sequence[str | None]) -> dict[str | None, str]:
    """A colour for each label, in the order they come up."""
    return {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(dict.fromkeys(labels))}


def corners_3d(numbers: Sequence[float]) -> list[tuple[float, float, float]]:
    """The eight corners in the camera's frame.

    The angles are parts of half a turn around x, y and z, applied in that order: so the official drawing code reads them.
    """
    x, y, z, *rest = numbers
    size, angles = rest[:3], [angle * math.pi for angle in rest[3:]]
    corners = []
    for sign in range(8):
        point = [size[axis] / 2 * (1 if sign >> axis & 1 else -1) for axis in range(3)]
        for axis, angle in enumerate(angles):
            # The plane turned by each axis: (y, z), then (z, x), then (x, y).
            a, b = (axis + 1) % 3, (axis + 2) % 3
            cos, sin = math.cos(angle), math.sin(angle)
            point[a], point[b] = point[a] * cos - point[b] * sin, point[a] * sin + point[b] * cos
        corners.append((point[0] + x, point[1] + y, point[2] + z))
    return corners


def _draw_lines(
    pen: ImageDraw.ImageDraw, place: Place, camera: Camera, factor: int, stroke: int, colour: str
) -> Rectangle | None:
    """Draws one place and returns the rectangle its label belongs to; None when nothing of it can be seen."""
    if place.key == "bbox_3d":
        return _draw_3d(pen, place, camera, factor, stroke, colour)
    numbers = [number * factor for number in place.numbers]
    if place.key == "point_2d":
        x, y = numbers
        radius = 3 * stroke
        for grow, fill in ((stroke, "white"), (0, colour)):
            pen.ellipse((x - radius - grow, y - radius - grow, x + radius + grow, y + radius + grow), fill=fill)
        return x - radius, y - radius, x + radius, y + radius
    if place.key != "bbox_2d":
        raise ValueError(f"a place of kind {place.key!r} came; bbox_2d, point_2d and bbox_3d can be drawn.")
    left, right = sorted((numbers[0], numbers[2]))
    top, bottom = sorted((numbers[1], numbers[3]))
    # A dark line under the coloured one: seen on light and dark ground alike.
    pen.rectangle(
        (left - stroke / 2, top - stroke / 2, right + stroke / 2, bottom + stroke / 2),
        outline="black",
        width=2 * stroke,
    )
    pen.rectangle((left, top, right, bottom), outline=colour, width=stroke)
    return left, top, right, bottom


def _near(pixel: float) -> float:
    """A corner close before the camera lies anywhere; Pillow walks all the way there."""
    return max(-1e5, min(1e5, pixel))


def _draw_3d(
    pen: ImageDraw.ImageDraw, place: Place, camera: Camera, factor: int, stroke: int, colour: str
) -> Rectangle | None:
    corners = corners_3d(place.numbers)
    if min(z for _, _, z in corners) <= 0:  # partly behind the camera: its picture would be no box
        return None
    flat = [
        (_near(camera.fx * x / z + camera.cx) * factor, _near(camera.fy * y / z + camera.cy) * factor)
        for x, y, z in corners
    ]
    edges = [(i, i | 1 << axis) for axis in range(3) for i in range(8) if not i >> axis & 1]
    for width, fill in ((2 * stroke, "black"), (stroke, colour)):
        for a, b in edges:
            pen.line((*flat[a], *flat[b]), fill=fill, width=width)
    xs, ys = [x for x, _ in flat], [y for _, y in flat]
    return min(xs), min(ys), max(xs), max(ys)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    text: str,
    anchor: Rectangle,
    taken: Sequence[Rectangle],
    canvas: tuple[int, int],
    letters: Font,
    colour: str,
) -> Rectangle:
    """Above the box, else inside its top, below it, inside its bottom: the first that hides no other label; inside the canvas always."""
    pad = max(2, letters.size // 5)
    text = " ".join(text.split())
    while len(text) > 4 and letters.getlength(text) + 2 * pad > 0.6 * canvas[0]:
        text = text[:-2] + "…"
    width, height = math.ceil(letters.getlength(text)) + 2 * pad, round(letters.size * 1.25) + pad
    left, top, _, bottom = anchor
    tries = []
    for y in (top - height, top, bottom, bottom - height):
        x = min(max(0.0, left), canvas[0] - width)
        y = min(max(0.0, y), canvas[1] - height)
        tries.append((x, y, x + width, y + height))
    place = next((spot for spot in tries if not any(_overlap(spot, other) for other in taken)), tries[0])
    pen.rectangle(place, fill=colour)
    ink = "black" if _is_light(colour) else "white"
    pen.text((place[0] + pad, place[1] + height / 2), text, font=letters, fill=ink, anchor="lm")
    return place


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _area(anchor: Rectangle | None) -> float:
    return 0.0 if anchor is None else (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])


def _is_light(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue > 110
