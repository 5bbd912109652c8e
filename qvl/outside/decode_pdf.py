"""PDF pages to RGB bytes with PDFium, each rendered once at the size asked for."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import pypdfium2
from pypdfium2 import raw

from qvl.outside.media import MediaError, MediaLimits, Message, check_pixels, refusing

UNREADABLE = "the file is not a readable PDF; check that it opens in a viewer."
MOST_PAGES = 100_000

# PDFium is one C library with global state and no locks of its own.
_one_at_a_time = threading.Lock()


def pdf_facts(stream: BinaryIO, limits: MediaLimits, *, password: str | None = None) -> Iterator[Message]:
    """One message: {sizes: [[width, height] of every page, in points (1/72 inch)]}."""
    del limits
    with _one_at_a_time, refusing(UNREADABLE):
        document = _open(stream, password)
        try:
            if len(document) > MOST_PAGES:
                raise MediaError(
                    f"the PDF has {len(document):,} pages; at most {MOST_PAGES:,} can be listed. Split it."
                )
            sizes = [document.get_page_size(number) for number in range(len(document))]
        finally:
            document.close()
    if not sizes:
        raise MediaError("the PDF has no pages; nothing can be shown of it.")
    yield {"sizes": sizes}, b""


def pdf_pages(
    stream: BinaryIO, limits: MediaLimits, *, pages: list[int], scales: list[float], password: str | None = None
) -> Iterator[Message]:
    """A message {height, width} with RGB bytes for each page number (from 0), at its scale in pixels a point."""
    for number, scale in zip(pages, scales, strict=True):
        with _one_at_a_time, refusing(f"page {number + 1} of the PDF cannot be rendered; it is damaged."):
            document = _open(stream, password)
            try:
                # Before any page is loaded: what people typed and ticked is drawn by the form environment (this PDFium runs no scripts).
                document.init_forms()
                if document.formenv is not None:
                    raw.FPDF_SetFormFieldHighlightAlpha(
                        document.formenv, 0
                    )  # as it is printed, without a viewer's blue
                width, height = document.get_page_size(number)
                check_pixels(f"page {number + 1}", round(width * scale), round(height * scale), limits)
                bitmap = document[number].render(
                    scale=scale, rev_byteorder=True, force_bitmap_format=raw.FPDFBitmap_BGR
                )
                pixels = bitmap.to_numpy().copy()
            finally:
                document.close()
        yield {"height": pixels.shape[0], "width": pixels.shape[1]}, pixels


def _open(stream: BinaryIO, password: str | None) -> Any:
    try:
        return pypdfium2.PdfDocument(_rewound(stream), password=password)
    except pypdfium2.PdfiumError as error:
        if not _wants_password(error):
            raise
    # PDFium keeps the error of an earlier file when this one fails without setting one. A load of nothing sets it afresh.
    with suppress(pypdfium2.PdfiumError):
        pypdfium2.PdfDocument(b"-")
    try:
        return pypdfium2.PdfDocument(_rewound(stream), password=password)
    except pypdfium2.PdfiumError as error:
        if not _wants_password(error):
            raise
        said = "the PDF is encrypted and the password is wrong" if password else "the PDF is encrypted"
        raise MediaError(f"{said}; save it without a password and send that.") from error


def _rewound(stream: BinaryIO) -> BinaryIO:
    stream.seek(0)
    return stream


def _wants_password(error: pypdfium2.PdfiumError) -> bool:
    return getattr(error, "err_code", None) == raw.FPDF_ERR_PASSWORD
