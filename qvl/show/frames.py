"""Frames: what the network sees turned back into pictures, contact sheets with times, pictures stacked under headings."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from PIL import Image, ImageDraw
from torch import Tensor

from qvl.show.letters import font_for

PATCH, MERGE, FRAMES = 16, 2, 2
"""Sides of a patch and of a merged block, and the frames that share a patch, as in every Qwen3-VL."""
INK, PAPER, FAINT = "#1a1a1a", "#ffffff", "#666666"


def frames_of(patch_PX: Tensor, grid_I3: Tensor, slices: Sequence[int] | None = None) -> list[list[Image.Image]]:
    """The pictures behind patches (bytes, or floats in -1..1): two for each row of `grid_I3`, of an image twice the same.

    `slices` names the rows that are wanted; a long video is gigabytes as pictures.
    """
    areas = grid_I3.prod(dim=1).tolist()
    starts = [0, *accumulate(areas)]
    wanted = range(len(areas)) if slices is None else slices
    pictures = []
    for i in wanted:
        _, rows, columns = grid_I3[i].tolist()
        blocks = patch_PX[starts[i] : starts[i] + areas[i]]
        if blocks.is_floating_point():
            blocks = (blocks.float() * 127.5 + 127.5).round().clamp(0, 255).byte()
        blocks = blocks.view(rows // MERGE, columns // MERGE, MERGE, MERGE, 3, FRAMES, PATCH, PATCH)
        # to (frame, height, width, colour): block row, row in it, pixel row; block column, column in it, pixel column
        pixels = blocks.permute(5, 0, 2, 6, 1, 3, 7, 4).reshape(FRAMES, rows * PATCH, columns * PATCH, 3)
        pictures.append([Image.fromarray(frame) for frame in pixels.numpy()])
    return pictures


def with_grid(picture: Image.Image, step: int = PATCH * MERGE) -> Image.Image:
    """The picture with thin lines where one visual token ends and the next begins."""
    lines = Image.new("RGBA", picture.size)
    pen = ImageDraw.Draw(lines)
    for x in range(step, picture.width, step):
        pen.line((x, 0, x, picture.height), fill=(255, 255, 255, 110))
        pen.line((x - 1, 0, x - 1, picture.height), fill=(0, 0, 0, 60))
    for y in range(step, picture.height, step):
        pen.line((0, y, picture.width, y), fill=(255, 255, 255, 110))
        pen.line((0, y - 1, picture.width, y - 1), fill=(0, 0, 0, 60))
    return Image.alpha_composite(picture.convert("RGBA"), lines).convert("RGB")


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int | None = None, width: int = 1200
) -> Image.Image:
    """Pictures of one size in rows, each with its caption below."""
    if not pictures or len(pictures) != len(captions):
        raise ValueError(
            f"{len(pictures)} pictures came with {len(captions)} captions; give at least one, and one caption each."
        )
    columns = columns or min(len(pictures), max(2, math.ceil(math.sqrt(len(pictures) * 1.2))))
    gap = 8
    cell = (width - gap) // columns - gap
    longest = max(captions, key=len)
    size = max(10, min(18, cell // 12))
    font = font_for(size, "".join(captions))
    while size > 8 and font.getlength(longest) > cell:
        size -= 1
        font = font_for(size, "".join(captions))
    heights = [round(cell * picture.height / picture.width) for picture in pictures]
    rows = [range(i, min(i + columns, len(pictures))) for i in range(0, len(pictures), columns)]
    line = round(size * 1.5)
    total = gap + sum(max(heights[i] for i in row) + line + gap for row in rows)
    sheet = Image.new("RGB", (width, total), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = gap
    for row in rows:
        for column, i in enumerate(row):
            left = gap + column * (cell + gap)
            sheet.paste(pictures[i].convert("RGB").resize((cell, heights[i]), Image.Resampling.LANCZOS), (left, top))
            pen.text((left, top + heights[i] + 2), captions[i], font=font, fill=FAINT)
        top += max(heights[i] for i in row) + line + gap
    return sheet


def stacked(blocks: Sequence[tuple[str, str, Image.Image | None]], *, title: str, width: int = 1200) -> Image.Image:
    """One tall picture: a title, then for each block a heading, a line of words (wrapped) and a picture of at most the whole width."""
    margin = 24
    inner = width - 2 * margin
    every = title + "".join(head + words for head, words, _ in blocks)
    big, middle, small = (font_for(size, every) for size in (30, 22, 16))
    total = margin + 46
    made = []
    for head, words, picture in blocks:
        lines = _wrapped(words, small.getlength, inner)
        if picture is not None and picture.width > inner:
            picture = picture.resize(
                (inner, max(1, round(picture.height * inner / picture.width))), Image.Resampling.LANCZOS
            )
        made.append((head, lines, picture))
        total += 40 + 22 * len(lines) + (0 if picture is None else picture.height + 10) + 16
    sheet = Image.new("RGB", (width, total + margin), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, margin), title, font=big, fill=INK)
    top = margin + 46
    for head, lines, picture in made:
        pen.text((margin, top), head, font=middle, fill=INK)
        top += 34
        for text in lines:
            pen.text((margin, top), text, font=small, fill=FAINT)
            top += 22
        if picture is not None:
            sheet.paste(picture.convert("RGB"), (margin, top + 6))
            top += picture.height + 10
        top += 22
    return sheet


def _wrapped(text: str, length: Callable[[str], float], width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and length(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines
