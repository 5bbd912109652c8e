"""A picture, from wherever it comes, to a raster and to patches."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qvl.outside.decode_image import rgb, upright
from qvl.outside.files import open_trusted
from qvl.outside.media import check_pixels
from qvl.outside.workers import Decoder, InProcess
from qvl.prompt.budget import ImageBudget, smart_resize
from qvl.prompt.visual import FRAMES, PATCH, Visual, check_raster, fold_bytes, resize_raster

Source = Path | str | bytes | BinaryIO
"""A file's path, its bytes, a data URI, or an open file (what a Fetcher returns). Addresses need a Fetcher."""


def load_image(source: Source | Image.Image | Tensor, decoder: Decoder | None = None) -> Tensor:
    """The picture upright, in RGB: uint8 (3, height, width), laid out row by row, pixel by pixel.

    JPEG, PNG, WebP, GIF (first frame) and BMP. Transparency lies on white. Without a decoder the file is decoded in this process,
    which suits files you trust; give a WorkerPool for any other. ValueError says what is wrong with a file.
    """
    if isinstance(source, Tensor):
        return check_raster(source)
    if isinstance(source, Image.Image):
        check_pixels("the picture", source.width, source.height, (decoder or InProcess()).limits)
        return _raster(np.array(rgb(upright(source))))
    decoder = decoder or InProcess()
    with opened(source, decoder) as stream:
        ((header, buffer),) = decoder.run("image", stream)
    return raster_from(buffer, header["height"], header["width"])


def image_patches(raster: Tensor, budget: ImageBudget | None = None) -> Visual:
    """Resized within the budget and cut into patches; equal to the bit to transformers' processor on the same raster."""
    check_raster(raster)
    return patches_at(raster, *smart_resize(raster.shape[1], raster.shape[2], budget or ImageBudget()))


def patches_at(raster: Tensor, height: int, width: int) -> Visual:
    """The same at a given size, multiples of 32."""
    source_height, source_width = raster.shape[1:]
    rows, columns = height // PATCH, width // PATCH
    folded = fold_bytes(resize_raster(raster, height, width))
    # Both frames of a patch show the picture.
    patch_PX = folded[:, None].expand(-1, FRAMES, -1).reshape(rows * columns, -1)
    return Visual(
        kind="image",
        patch_PX=patch_PX,
        grid_I3=torch.tensor([[1, rows, columns]]),
        height=height,
        width=width,
        source_height=source_height,
        source_width=source_width,
    )


@contextmanager
def opened(source: Source, decoder: Decoder) -> Iterator[BinaryIO]:
    """The source as an open file within the decoder's size limit. What the caller opened stays open."""
    if isinstance(source, bytes | str | Path):
        with open_trusted(source, decoder.limits.max_bytes) as stream:
            yield stream
        return
    if not hasattr(source, "read"):
        raise ValueError(
            f"the medium is a {type(source).__name__}; expected a path, bytes, a data URI or an open file."
        )
    yield cast(BinaryIO, source)


def raster_from(buffer: np.ndarray | bytearray, height: int, width: int) -> Tensor:
    """Bytes in (height, width, 3) order seen as a (3, height, width) raster, without a copy."""
    if isinstance(buffer, np.ndarray):
        return _raster(buffer)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)


def _raster(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)
