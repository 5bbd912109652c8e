"""Media on their way into a record: found under one folder, measured by their headers, named by what they are."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvl.data.record import Medium
from qvl.data.store import is_remote
from qvl.outside.decode_image import open_picture
from qvl.outside.files import open_data_uri
from qvl.outside.media import MediaLimits
from qvl.outside.workers import Decoder, InProcess

ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""
MediaKind = Literal["image", "video", "document"]


@dataclass(kw_only=True)
class MediaBag:
    """Collects the media of one record. `root` is the folder that all paths must lie in."""

    root: Path
    decoder: Decoder = field(default_factory=InProcess)
    files: dict[str, bytes] = field(default_factory=dict)
    facts: dict[str, Medium] = field(default_factory=dict)

    def add(self, value: Any, kind: MediaKind) -> str:
        """Takes in a path, a data URI, bytes, or a table's {"bytes", "path"}; gives the name it has in the record."""
        data, suffix = self._read(value)
        medium, suffix = measure(data, kind, suffix, self.decoder)
        name = f"{len(self.files)}.{suffix}"
        self.files[name], self.facts[name] = data, medium
        return name

    def _read(self, value: Any) -> tuple[bytes, str]:
        if isinstance(value, Mapping):
            inner = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
            if inner is None:
                raise ValueError(
                    f"a medium has the keys {', '.join(map(str, value)) or 'none'}; bytes, path or url was expected."
                )
            data, suffix = self._read(inner)
            return data, suffix or _suffix(value.get("path"))
        if isinstance(value, bytes | bytearray):
            return bytes(value), ""
        if not isinstance(value, str | Path) or not str(value):
            raise ValueError(f"a medium is a {type(value).__name__}; a path, a data URI or bytes was expected.")
        text = str(value)
        limit = self.decoder.limits.max_bytes
        if text[:5].lower() == "data:":
            return open_data_uri(text, limit).read(), ""
        if is_remote(text):
            raise ValueError(f"the medium {text[:80]} is an address; download it and give the file.")
        # The list may come from anywhere: it may not name files of this machine beside the data.
        path = (self.root / text.removeprefix("file://")).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError(
                f"the medium {text} lies outside the media folder {self.root}; move it there or give another folder."
            )
        if not _is_file(path):
            raise ValueError(
                f"the medium {text[:200]} is not in {self.root.resolve()}; check the path, or give --media-root."
            )
        if path.stat().st_size > limit:
            raise ValueError(f"the medium {text} has {path.stat().st_size:,} bytes; at most {limit:,} are allowed.")
        return path.read_bytes(), _suffix(text)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have, such as a whole picture in base64
        return False


def measure(data: bytes, kind: MediaKind, suffix: str, decoder: Decoder) -> tuple[Medium, str]:
    """A file's facts and the ending of its name. Pictures are read by their header, videos by their packets; nothing is decoded."""
    if kind == "image":
        return _measure_image(data, decoder.limits)
    if kind == "document":
        ((facts, _),) = decoder.run("pdf_facts", io.BytesIO(data))
        return Medium(page_sizes=tuple((w, h) for w, h in facts["sizes"])), "pdf"
    ((facts, _),) = decoder.run("video_facts", io.BytesIO(data))
    first, *_ = decoder.run("video_frames", io.BytesIO(data), wanted=[0], keys=None)
    # The first picture decides: phones note a turn that the header's width and height do not have.
    header, _ = first
    duration = facts["num_frames"] / facts["fps"]
    medium = Medium(
        w=header["width"], h=header["height"], num_frames=facts["num_frames"], fps=facts["fps"], duration=duration
    )
    return medium, suffix or "mp4"


def _measure_image(data: bytes, limits: MediaLimits) -> tuple[Medium, str]:
    try:
        with open_picture(io.BytesIO(data), limits) as picture:
            turned = picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)  # by a quarter; turning would decode it
            size = picture.size[::-1] if turned else picture.size
            suffix = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}[
                str(picture.format)
            ]
    except OSError as error:
        raise ValueError("a picture is no JPEG, PNG, WebP, GIF or BMP; check that it opens in a viewer.") from error
    return Medium(w=size[0], h=size[1]), suffix


def _suffix(path: Any) -> str:
    suffix = Path(str(path or "")).suffix[1:].lower()
    return suffix if suffix.isalnum() and suffix.isascii() else ""
