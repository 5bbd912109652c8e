"""A PDF to one image a page, rendered once, as sharp as the token budget can use."""

import re
from collections.abc import Iterator

from qvl.outside.workers import Decoder, InProcess
from qvl.prompt.budget import ImageBudget, smart_resize
from qvl.prompt.image import Source, opened, patches_at, raster_from
from qvl.prompt.visual import Visual

POINTS_PER_INCH = 72
DPI = 200
"""A page is rendered at, unless the budget allows less."""


def load_document(
    source: Source,
    pages: str | None = None,
    budget: ImageBudget | None = None,
    decoder: Decoder | None = None,
    *,
    dpi: float = DPI,
    password: str | None = None,
) -> Iterator[Visual]:
    """An image for each page named by `pages` ("1-3,7"; all without), one after the other.

    A page is rendered at `dpi`, or at what the budget allows if that is less: straight to the size the resize asks for, never as a large
    raster to be scaled down. At 200 dpi an A4 page costs 3,796 tokens.
    """
    budget, decoder = budget or ImageBudget(), decoder or InProcess()
    with opened(source, decoder) as stream:
        ((facts, _),) = decoder.run("pdf_facts", stream, password=password)
        sizes = facts["sizes"]
        numbers = parse_pages(pages, len(sizes), decoder.limits.max_pages)
        targets = [page_target(sizes[number][0], sizes[number][1], budget, dpi) for number in numbers]
        scales = [scale for _, _, scale in targets]
        messages = decoder.run("pdf_pages", stream, pages=numbers, scales=scales, password=password)
        for (header, buffer), (tall, wide, _) in zip(messages, targets, strict=True):
            yield patches_at(raster_from(buffer, header["height"], header["width"]), tall, wide)


def page_target(width: float, height: float, budget: ImageBudget, dpi: float) -> tuple[int, int, float]:
    """Height and width of the image in pixels, and the scale in pixels a point at which the page covers it in both directions."""
    if not 10 <= dpi <= 1200:
        raise ValueError(f"dpi is {dpi}; expected 10 to 1200.")
    scale = dpi / POINTS_PER_INCH
    tall, wide = smart_resize(max(1, round(height * scale)), max(1, round(width * scale)), budget)
    return tall, wide, max(tall / height, wide / width)


def parse_pages(text: str | None, count: int, most: int) -> list[int]:
    """Page numbers from 0 in the order named; "1-3,7" counts from 1. "5-" runs to the end."""
    if text is None:
        numbers, total = list(range(count)), count
    else:
        numbers, total = [], 0
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d{1,6})\s*(?:(-)\s*(\d{1,6})?)?\s*", part)
            if not match:
                raise ValueError(f'the page range {text!r} cannot be read at {part!r}; write it like "1-3,7".')
            first = int(match[1])
            last = first if not match[2] else int(match[3]) if match[3] else count
            if not 1 <= first <= last <= count:
                raise ValueError(
                    f"the page range {text!r} names pages {first}-{last} and the document has pages 1-{count}."
                )
            total += last - first + 1
            if total <= most:  # "1-99999,1-99999,..." is short to write and long to list
                numbers.extend(range(first - 1, last))
    if total > most:
        raise ValueError(f"{total} pages were asked for and at most {most} are allowed; name fewer.")
    return numbers
