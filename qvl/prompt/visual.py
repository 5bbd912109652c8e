"""What a picture or a video becomes: patches in the order the network wants, and where they came from."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.model.vision import normalise

PATCH = 16
"""Side of a patch in pixels."""
MERGE = 2
"""Patches of each side that the merger joins into one token."""
FRAMES = 2
"""Frames that share one patch."""
FACTOR = PATCH * MERGE
"""Side of a visual token in pixels."""


@dataclass(frozen=True, kw_only=True)
class Visual:
    """One image, or one video, ready for a Sample."""

    kind: Literal["image", "video"]
    patch_PX: Tensor
    """uint8; X runs over (3 channels, 2 frames, 16, 16); patches of a slice in merge-block order (h/2, w/2, 2, 2)."""
    grid_I3: Tensor
    """int64 (1, h, w) in patches: one row for an image, one for each temporal slice (two frames) of a video."""
    height: int
    """After resizing, in pixels: 16 h."""
    width: int
    source_height: int
    source_width: int
    seconds: tuple[float, ...] | None = None
    """Video: the time of each slice, the mean of its first and last frame's."""
    frame_indices: tuple[int, ...] | None = None
    """Video: which source frames were taken, before an odd count is filled up with the last."""
    fps: float | None = None
    """Video: frames a second of the source."""
    notes: tuple[str, ...] = ()
    """What a reader of the answer should know: a file that breaks off, a variable frame rate, frames that stood in for others."""

    @property
    def num_tokens(self) -> int:
        """Placeholders in the prompt, without timestamps and markers."""
        return int(self.grid_I3.prod(dim=1).sum()) // MERGE**2

    @property
    def values_PX(self) -> Tensor:
        """The patches as transformers' processors give them: float32 in -1..1."""
        return normalise(self.patch_PX)

    @property
    def scale(self) -> tuple[float, float]:
        """Source pixels a resized pixel, (vertical, horizontal)."""
        return self.source_height / self.height, self.source_width / self.width


def resize_raster(raster: Tensor, height: int, width: int) -> Tensor:
    """A uint8 (3, h, w) raster at the new size, bicubic with antialias, rounded to uint8 in between as torchvision does.

    Pillow's bicubic differs from it by up to 2 of 255 on 0.5-0.9 % of the values, which is why torch resizes here.
    """
    if raster.shape[-2:] == (height, width):
        return raster
    batch = raster[None]
    if batch.is_contiguous(memory_format=torch.channels_last):
        # A batch of one keeps its old stride, and torch then no longer sees that a pixel's channels lie together: 3 times slower.
        batch = batch.as_strided(batch.shape, (raster.numel(), *raster.stride()))
    return F.interpolate(batch, size=(height, width), mode="bicubic", antialias=True)[0]


def fold_bytes(raster: Tensor) -> Tensor:
    """A (3, h, w) raster as (patches x 3, 256) bytes: patches in merge-block order (h/32, w/32, 2, 2), channels, pixels of a patch.

    The 16 bytes of a patch's row move as one complex number.
    """
    rows, columns = raster.shape[1] // FACTOR, raster.shape[2] // FACTOR
    lines = raster.contiguous().view(torch.complex128).view(3, rows, MERGE, PATCH, columns, MERGE)
    return lines.permute(1, 4, 2, 5, 0, 3).contiguous().view(torch.uint8).view(-1, PATCH * PATCH)


def check_raster(raster: Tensor) -> Tensor:
    """Refuses anything but uint8 (3, height, width): a guess at the order of axes turns a 3-pixel-wide image into nonsense."""
    if raster.dtype != torch.uint8 or raster.ndim != 3 or raster.shape[0] != 3 or 0 in raster.shape:
        shape = "x".join(map(str, raster.shape))
        raise ValueError(
            f"the raster is {raster.dtype} of shape {shape}; expected torch.uint8 of shape 3 x height x width."
        )
    return raster
