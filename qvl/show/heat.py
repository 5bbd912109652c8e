"""Heat maps: weights of a grid laid over the picture they belong to."""

from collections.abc import Sequence

from PIL import Image

# Dark violet to light yellow, growing evenly in lightness (after matplotlib's inferno).
STOPS = (
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
)


def heat_colour(part: float) -> tuple[int, int, int]:
    """0 to 1 as a colour."""
    at = min(max(part, 0.0), 1.0) * (len(STOPS) - 1)
    low = min(int(at), len(STOPS) - 2)
    red, green, blue = (round(a + (b - a) * (at - low)) for a, b in zip(STOPS[low], STOPS[low + 1], strict=True))
    return red, green, blue


def heat_map(rows: Sequence[Sequence[float]], top: float | None = None) -> Image.Image:
    """One RGBA pixel for each weight; strong weights cover, weak ones let the picture through.

    `top` is the weight drawn as the strongest; None takes the 99th percentile, so that one sink (models park attention on single
    tokens, often at the picture's edge) does not leave everything else dark.
    """
    flat = sorted(weight for row in rows for weight in row)
    if top is None:
        top = flat[min(len(flat) - 1, int(len(flat) * 0.99))]
    picture = Image.new("RGBA", (len(rows[0]), len(rows)))
    scale = 1 / top if top > 0 else 0.0
    parts = [min(1.0, weight * scale) for row in rows for weight in row]
    picture.putdata([(*heat_colour(part), round(60 + 150 * part)) for part in parts])
    return picture


def overlay(picture: Image.Image, rows: Sequence[Sequence[float]], top: float | None = None) -> Image.Image:
    """The picture under its heat map. Cells keep their edges: one cell is one visual token."""
    heat = heat_map(rows, top).resize(picture.size, Image.Resampling.NEAREST)
    grey = picture.convert("L").convert("RGBA")  # colours of the picture would read as heat
    return Image.alpha_composite(grey, heat).convert("RGB")
