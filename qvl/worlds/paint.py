"""Painting: noisy backgrounds and smooth-edged shapes, placed to a fraction of a pixel so that every box is exact."""

import numpy as np
from numpy.random import Generator
from PIL import Image

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 35, 35),
    "green": (35, 165, 50),
    "blue": (45, 75, 230),
    "yellow": (240, 215, 40),
    "purple": (160, 50, 190),
    "cyan": (60, 210, 220),
}
TEXTURES = ("filled", "striped")

# Arrays here are pixel rasters, (height, width) or (height, width, 3).


def background(random: Generator, size: int) -> np.ndarray:
    """Some grey, a slope of light across it, and noise: float32 (size, size, 3)."""
    level, across, down, grain = random.random(4)
    light = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    shade = light[None, :] * ((across - 0.5) * 60) + light[:, None] * ((down - 0.5) * 60)
    noise = random.random((size, size, 3), dtype=np.float32)
    noise -= 0.5
    noise *= 6 + 44 * grain
    noise += (40 + 170 * level + shade).astype(np.float32)[:, :, None]
    return noise


def paint_shape(
    raster: np.ndarray, *, shape: str, ink: np.ndarray, texture: str, x: float, y: float, side: float
) -> None:
    """Paints into `raster` the shape whose box has its corner at (x, y), in fractions of the picture, and this side."""
    size = raster.shape[0]
    left, top, long = x * size, y * size, side * size
    rows = slice(int(top), min(size, int(np.ceil(top + long)) + 1))
    columns = slice(int(left), min(size, int(np.ceil(left + long)) + 1))
    across = np.arange(columns.start, columns.stop, dtype=np.float32) + (0.5 - left)
    down = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + (0.5 - top)
    patch = raster[rows, columns]
    cover = coverage(shape, across, down, long)[:, :, None]
    if texture == "striped":
        # Slanted bands, two to three on any object, none thinner than a pixel and a half. Dark bands keep the hue readable, but on
        # dark ground they would cut the shape to pieces: there they are light, or half as bright where the ink is light itself.
        period = max(long / 2.5, 3.0)
        wave = np.sin((across + down) * np.float32(2 * np.pi / period)) * np.float32(period / 4)
        if patch.mean() > 120:
            other = ink * 0.28
        else:
            other = ink * 0.5 if ink.mean() > 150 else ink * 0.4 + 150
        ink = ink + (other - ink) * np.clip(0.5 + wave, 0, 1)[:, :, None]
    patch += cover * (ink - patch)


def ink_of(colour: str, random: Generator) -> np.ndarray:
    """The colour, a little off."""
    return np.array(COLOURS[colour], dtype=np.float32) + (random.random(3, dtype=np.float32) - 0.5) * 30


def coverage(shape: str, across: np.ndarray, down: np.ndarray, side: float) -> np.ndarray:
    """How much of each pixel the shape covers; `across` and `down` are pixel centres from the box's corner."""
    if shape == "square":
        return span(across, 0, side) * span(down, 0, side)
    if shape == "circle":
        radius = side / 2
        return np.clip(radius + 0.5 - np.hypot(across - radius, down - radius), 0, 1)
    if shape == "triangle":
        # Point up. The slanted edges fall side by side / 2; their distance is scaled by the edge's length.
        slant = (down / 2 - np.abs(across - side / 2)) * np.float32(2 / np.sqrt(5))
        return np.clip(slant + 0.5, 0, 1) * span(down, 0, side)
    if shape == "cross":
        low, high = side / 3, side * 2 / 3
        return np.maximum(span(across, low, high) * span(down, 0, side), span(across, 0, side) * span(down, low, high))
    raise ValueError(f"the shape is {shape!r}; it must be one of {', '.join(SHAPES)}.")


def span(centres: np.ndarray, start: float, end: float) -> np.ndarray:
    """How much of each pixel, one wide around its centre, lies between start and end."""
    return np.clip(np.minimum(centres + 0.5, end) - np.maximum(centres - 0.5, start), 0, 1)


def blend(raster: np.ndarray, cover: np.ndarray, top: int, left: int, ink: np.ndarray) -> None:
    """Lays a colour through a mask of 0 to 1 whose corner is at (top, left)."""
    patch = raster[top : top + cover.shape[0], left : left + cover.shape[1]]
    patch += cover[:, :, None] * (ink - patch)


def picture(raster: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(raster + 0.5, 0, 255).astype(np.uint8))


def check_size(size: int, least: int = 32) -> None:
    """Pictures are squares of whole visual tokens, 32 pixels each, so that no resizing blurs what was painted."""
    if size < least or size % 32:
        raise ValueError(f"the picture's side is {size}; give a multiple of 32 from {least} up.")
