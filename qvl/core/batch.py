"""What flows through the house: Sample (one conversation as numbers) and Batch (many, laid end to end)."""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation as the network sees it, before packing.

    `token_T` holds placeholder ids where visual tokens go. `grid_I3` has one row (frames t, patch rows h, patch columns w) for each
    run of placeholders, in the order in which the runs stand in `token_T`: an image is (1, h, w), each temporal slice of a video is its
    own (1, h, w) because its timestamp text stands before it (report 2, "Video Timestamp"). `patch_PX` holds the raw patches of all rows in
    the same order; inside a frame they come in 2x2 merge-block order (h/2, w/2, 2, 2).
    """

    token_T: Tensor
    """int64, on the CPU."""
    patch_PX: Tensor | None = None
    """P = sum of t*h*w over the rows of grid_I3, X = 3 channels x 2 frames x 16 x 16. uint8 as the picture has them (a quarter of the
    memory: ten minutes of video are 63 MiB), or float32 already normalised to -1..1; the network takes both."""
    grid_I3: Tensor | None = None
    """int64, (t, h, w) in patches."""
    is_target_T: Tensor | None = None
    """bool: tokens whose prediction is trained. None outside training."""
    second_I: Tensor | None = None
    """float32: seconds between two temporal slices of a row, for absolute-time rotary ids only (Qwen2.5-VL's scheme)."""

    @property
    def num_tokens(self) -> int:
        return self.token_T.numel()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples end to end: no batch axis, no padding. Made by `qvl.model.pack.pack`.

    Everything that steers control flow (`lengths`, `frame_lengths`) is a tuple of Python ints, so that a step on an accelerator never waits
    for a number to come back from the device.
    """

    token_T: Tensor
    """int64 token ids."""
    position_3T: Tensor
    """int64 rotary ids (time, height, width) of each token."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, in order; their sum is T."""
    patch_PX: Tensor | None = None
    """Raw patches of all images and frames, uint8 or normalised float32 (see Sample)."""
    grid_I3: Tensor | None = None
    """int64 (t, h, w) in patches, one row for each run of placeholders."""
    frame_lengths: tuple[int, ...] = ()
    """Patches of each frame (h*w, t times for each row of grid_I3); their sum is P."""
    visual_M: Tensor | None = None
    """int64 places of the visual tokens in token_T, ascending."""
    is_target_T: Tensor | None = None
    """bool: tokens whose prediction is trained."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def to(self, device: torch.device | str) -> Self:
        """The same batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if isinstance(v, Tensor)})
