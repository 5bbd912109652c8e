"""What a decoding job may cost, what it sends back, and the one error it raises. Light: the worker process reads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Message = tuple[dict[str, Any], Any]
"""A JSON-able header and a buffer of raw bytes (a numpy array or b"")."""


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What one file may cost. The defaults suit a trusted machine; a server passes smaller ones."""

    max_bytes: int = 2 * 1024**3
    """Size of the file."""
    max_pixels: int = 64 * 1024**2
    """Pixels of one picture, frame or page, read from the header before anything is decoded. The network sees 16.8 million at most."""
    max_frames: int = 1_000_000
    """Frames in the file: 9 hours at 30 a second."""
    max_pages: int = 2_000
    """Pages taken from one document."""
    max_seconds: float = 300.0
    """Wall time one job may keep its caller waiting; then its process is killed. Two hours of 1080p need minutes on two cores."""
    memory_bytes: int = 2 * 1024**3
    """Memory of one worker process. Not enforced in process."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; a limit must be above zero.")


class MediaError(ValueError):
    """A file was refused. The text is one sentence of ours and holds nothing a decoder said, because decoders quote
    addresses and paths (CVE-2026-22778)."""


@contextmanager
def refusing(sentence: str) -> Iterator[None]:
    """Whatever a decoder raises inside becomes MediaError(sentence), with the cause chained."""
    try:
        yield
    except (MediaError, GeneratorExit):
        raise
    except MemoryError as error:
        raise MediaError("decoding the file needs more memory than it may have; send a smaller one.") from error
    except Exception as error:
        raise MediaError(sentence) from error


def check_pixels(what: str, width: int, height: int, limits: MediaLimits) -> None:
    if width < 1 or height < 1:
        raise MediaError(f"{what} is {width}x{height}; it needs at least one pixel.")
    if width * height > limits.max_pixels:
        raise MediaError(
            f"{what} is {width}x{height}, {width * height:,} pixels; at most {limits.max_pixels:,} are allowed. "
            "Scale it down first."
        )
