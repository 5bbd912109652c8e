"""Picture files to RGB bytes with Pillow: five formats, header checked first, upright, transparency on white."""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from qvl.outside.media import MediaError, MediaLimits, Message, check_pixels, refusing

# Few decoders, little to attack: JPEG 2000, FPX, TIFF, PSD and EPS are where Pillow's recent memory bugs were.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
UNREADABLE = "the file is not a whole JPEG, PNG, WebP, GIF or BMP picture; check that it opens in a viewer."


def image(stream: BinaryIO, limits: MediaLimits) -> Iterator[Message]:
    """One message: {height, width} and height x width x 3 bytes. Of an animation, the first frame."""
    head = stream.read(12)
    stream.seek(0)
    if name := not_a_picture(head):
        raise MediaError(
            f"the file is {name}." if ":" in name else f"the file is {name}, no picture; hand it in as such."
        )
    with refusing(UNREADABLE), open_picture(stream, limits) as picture:
        # `upright` without its copy, a quarter of a gigabyte at 64 million pixels.
        ImageOps.exif_transpose(picture, in_place=True)
        pixels = np.array(rgb(picture))
    yield {"height": pixels.shape[0], "width": pixels.shape[1]}, pixels


def not_a_picture(head: bytes) -> str | None:
    """What a file handed in as a picture often is instead, by its first bytes."""
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis"):
        return "a HEIC or AVIF picture, which is not read: save it as JPEG or PNG"
    if head[4:8] == b"ftyp" or head.startswith(b"\x1aE\xdf\xa3") or head[8:12] == b"AVI ":
        return "a video"
    return "a PDF" if head.startswith(b"%PDF") else None


def open_picture(stream: BinaryIO, limits: MediaLimits) -> Image.Image:
    """Reads the header alone, and refuses by it: a 50,000 x 50,000 PNG is a small file."""
    try:
        picture = Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise MediaError(
            f"the picture has far more than the {limits.max_pixels:,} pixels allowed; scale it down first."
        ) from error
    check_pixels("the picture", picture.width, picture.height, limits)
    return picture


def upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says, as viewers and transformers' load_image do: boxes then refer to what people see."""
    return ImageOps.exif_transpose(picture)


def rgb(picture: Image.Image) -> Image.Image:
    """Mode RGB. Equal to transformers' do_convert_rgb (alpha composited on white) except for 16-bit grey.

    Pillow's own convert clips 16-bit grey at 255, which leaves a white sheet; here it is scaled to 8 bits.
    """
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = _scale_16_bits(picture)
    if picture.mode == "F":
        raise MediaError("the picture has floating-point pixels, whose range is unknown; convert it to 8 bits first.")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def _scale_16_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise MediaError("the picture has integer pixels outside 0..65535; convert it to 8 bits first.")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # round(v / 257)
