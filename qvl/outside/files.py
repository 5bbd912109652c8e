"""Local files and data URIs as open files: trusted ones by name, others only below an allowed folder."""

import base64
import binascii
import io
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from qvl.outside.media import MediaError

BASE64_PIECE = 4 * 2**18
"""Letters, whole groups of four: 768 KiB of bytes."""
_DATA_URI = re.compile(r"data:((?:image|video)/[a-z0-9.+\-]+|application/pdf);base64,", re.IGNORECASE)


def open_data_uri(text: str, max_bytes: int) -> BinaryIO:
    """The bytes of `data:image/png;base64,...`, decoded only once their size is known to fit."""
    head = _DATA_URI.match(text[:200])
    if not head:
        raise MediaError(
            "the data URI must begin with data:image/...;base64, or data:video/...;base64, or data:application/pdf;base64,"
        )
    if (len(text) - head.end()) * 3 // 4 > max_bytes + 2:
        raise MediaError(f"the data URI holds more than the {max_bytes:,} bytes allowed; send a smaller file.")
    file = io.BytesIO()
    try:
        # In pieces, because no other thread of Python runs while one is decoded (a third of a second for 45 MB).
        for start in range(head.end(), len(text), BASE64_PIECE):
            piece = text[start : start + BASE64_PIECE]
            if "=" in piece and start + BASE64_PIECE < len(text):
                raise ValueError("padding before the end")
            file.write(base64.b64decode(piece, validate=True))
        file.seek(0)
        return file
    except (binascii.Error, ValueError) as error:
        raise MediaError("the data URI is not valid base64; encode the file again without line breaks.") from error


def open_trusted(source: Path | str | bytes, max_bytes: int) -> BinaryIO:
    """A file a person named on their own machine, or bytes already here. Never for a path that came over a network: use a Fetcher."""
    if isinstance(source, bytes):
        if len(source) > max_bytes:
            raise MediaError(f"the file has {len(source):,} bytes; at most {max_bytes:,} are allowed.")
        return io.BytesIO(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return open_data_uri(source, max_bytes)
    if isinstance(source, str) and source[:7].lower() == "file://":
        source = file_uri_path(source)
    if isinstance(source, str) and re.match(r"[a-z][a-z0-9+.\-]+://", source, re.IGNORECASE):
        raise MediaError(
            "an address was given where a file was expected; open it with a Fetcher that allows its domain."
        )
    try:
        # NONBLOCK: opening a named pipe must not wait for a writer.
        return _regular(os.open(source, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)), max_bytes)
    except OSError as error:
        raise MediaError(f"the file {os.fspath(source)!r} cannot be opened ({error.strerror}).") from error


def file_uri_path(uri: str) -> str:
    path = unquote(uri[len("file://") :])
    return path.removeprefix("localhost") if path.startswith("localhost/") else path


def open_below(folder: Path, parts: tuple[str, ...], max_bytes: int) -> BinaryIO:
    """Walks down one name at a time and follows no link, so that nothing can be swapped between a check and the opening."""
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = below
        fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
    except OSError as error:
        raise MediaError("the file is missing, unreadable or behind a symbolic link; name the file itself.") from error
    finally:
        os.close(here)
    return _regular(fd, max_bytes, links=1)


def _regular(fd: int, max_bytes: int, links: int | None = None) -> BinaryIO:
    facts = os.fstat(fd)
    problem = None
    if not stat.S_ISREG(facts.st_mode):
        problem = "the path is not a regular file; name a picture, video or PDF."
    elif links is not None and facts.st_nlink > links:
        problem = "the file has a second name elsewhere (a hard link); copy it."
    elif facts.st_size > max_bytes:
        problem = f"the file has {facts.st_size:,} bytes; at most {max_bytes:,} are allowed."
    if problem:
        os.close(fd)
        raise MediaError(problem)
    return os.fdopen(fd, "rb")
