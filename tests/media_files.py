"""Small media files for tests, made on the spot: pictures, clips, PDFs, and broken ones."""

import io
import random
import struct
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image


def encoded(pixels: np.ndarray | Image.Image, format: str, **options: Any) -> bytes:
    """A picture file's bytes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): red grows to the right, green downwards, blue is 64."""
    pixels = np.full((height, width, 3), 64, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    pixels[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    return pixels


def numbered_frame(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A frame that says its number in binary, in black and white bars, so that it survives a lossy codec."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for bit in range(12):
        if number >> bit & 1:
            pixels[:, bit * width // 12 : (bit + 1) * width // 12] = 255
    return pixels


def read_number(raster: Any) -> int:
    """The number of a frame made by `numbered_frame`, from a raster (3, height, width)."""
    row = np.asarray(raster)[0, raster.shape[1] // 2]
    bars = [row[(2 * bit + 1) * row.shape[0] // 24] for bit in range(12)]
    return sum(int(bar > 127) << bit for bit, bar in enumerate(bars))


def write_video(
    path: Path | io.BytesIO,
    frames: Iterable[np.ndarray],
    *,
    fps: str = "25",
    codec: str = "libx264",
    format: str | None = None,
    times: list[int] | None = None,
    group: int = 12,
    b_frames: int = 2,
    muxer: dict[str, str] | None = None,
    **options: str,
) -> None:
    """`times`: presentation times in milliseconds, for a variable rate. `group`: frames from one key frame to the next."""
    with av.open(path, "w", format=format, options=muxer or {}) as container:
        stream: Any = None
        for number, pixels in enumerate(frames):
            if stream is None:
                stream = container.add_stream(
                    codec, rate=Fraction(fps), options={"preset": "ultrafast", "crf": "18", **options}
                )
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.codec_context.gop_size = group
                stream.codec_context.max_b_frames = b_frames
                stream.codec_context.thread_count = 1
                if times:
                    stream.codec_context.time_base = Fraction(1, 1000)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode(None))


def png_header(width: int, height: int, payload: bytes = b"") -> bytes:
    """A PNG that claims a size and holds `payload` as its compressed pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", payload) + chunk(b"IEND", b"")


def pdf(sizes: list[tuple[int, int]]) -> bytes:
    """A PDF with a page of each (width, height) in points; page n has a black square of 10 n points in its lower left corner."""
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(sizes)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(sizes)} >>"]
    for i, (width, height) in enumerate(sizes):
        drawing = f"0 0 {10 * (i + 1)} {10 * (i + 1)} re f"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] /Contents {4 + 2 * i} 0 R >>")
        objects.append(f"<< /Length {len(drawing)} >>\nstream\n{drawing}\nendstream")
    return _pdf(*objects)


def _pdf(*objects: str) -> bytes:
    out = bytearray(b"%PDF-1.4\n")
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{place:010d} 00000 n \n".encode() for place in places)
    out += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n".encode()
    return bytes(out)


def form_pdf() -> bytes:
    """A page of 100 x 100 points whose one form field has a black square as its appearance, and nothing else on the page."""
    square = "0 0 40 40 re f"
    field = "<< /Type /Annot /Subtype /Widget /FT /Tx /T (a) /V (b) /Rect [20 20 60 60] /F 4 /AP << /N 5 0 R >> >>"
    return _pdf(
        "<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] >> >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 100] /Annots [4 0 R] >>",
        field,
        f"<< /Type /XObject /Subtype /Form /BBox [0 0 40 40] /Length {len(square)} >>\nstream\n{square}\nendstream",
    )


def encrypted_pdf() -> bytes:
    """A PDF whose user password is unknown: the standard handler's entries with random keys."""
    plain = pdf([(100, 100)])
    keys = f"/Encrypt << /Filter /Standard /V 1 /R 2 /O <{'ab' * 32}> /U <{'cd' * 32}> /P -4 >> /ID [<{'01' * 16}> <{'01' * 16}>]"
    return plain.replace(b"/Root 1 0 R", b"/Root 1 0 R " + keys.encode())


def gif(frames: int, canvas: tuple[int, int] = (1, 1), sizes: Iterable[tuple[int, int]] = ()) -> bytes:
    """`frames` frames of one pixel, 20 bytes each, then frames that claim the `sizes` and hold one pixel too."""
    out = bytearray(b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff")
    for size in [(1, 1)] * frames + [*sizes]:
        out += b"\x21\xf9\x04\x08\x01\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\x02\x02\x44\x01\0"
    return bytes(out + b";")


def forged_mp4(num_frames: int) -> bytes:
    """A clip of four frames whose tables promise so many, of one byte each."""
    buffer = io.BytesIO()
    write_video(buffer, [numbered_frame(i) for i in range(4)], fps="10", format="mp4", b_frames=0)
    data = bytearray(buffer.getvalue())
    for box, start, values in (
        (b"stsz", 4, (1, num_frames)),
        (b"stsc", 4, (1, 1, num_frames, 1)),
        (b"stts", 8, (num_frames, 1)),
    ):
        place = data.index(box) + 4 + start
        data[place : place + 4 * len(values)] = struct.pack(f">{len(values)}I", *values)
    return bytes(data)


def damaged(data: bytes, seed: int) -> bytes:
    """The file after a few accidents: bytes and lengths changed, pieces cut out, doubled, moved, or its end lost."""
    draw = random.Random(seed)
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        if not out:
            break
        low = draw.randrange(len(out))
        high = min(len(out), low + draw.choice((1, 2, 4, 8, 64, 1024)))
        match draw.randrange(6):
            case 0:
                out[low] = draw.randrange(256)
            case 1:
                out[low:high] = draw.choice((b"\0", b"\xff", b"\x7f")) * (high - low)
            case 2:
                del out[low:high]
            case 3:
                out[low:low] = out[low:high]
            case 4:
                place = draw.randrange(len(out))
                out[place:place] = draw.randbytes(high - low)
            case _:
                del out[max(1, low) :]
    return bytes(out)
