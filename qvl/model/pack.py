"""Samples laid end to end: the one way from conversations to a Batch, for training, RL and serving alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qvl.core.batch import Batch, Sample
from qvl.model.config import ModelConfig
from qvl.model.positions import positions


def pack(samples: Sequence[Sample], config: ModelConfig) -> Batch:
    """One Batch on the CPU. Raises ValueError when a sample's placeholders, grids and patches disagree."""
    if not samples:
        raise ValueError("pack needs at least one sample.")
    token_T = torch.cat([s.token_T for s in samples])
    lengths = tuple(s.num_tokens for s in samples)
    grids = [s.grid_I3 for s in samples if s.grid_I3 is not None]
    patches = [s.patch_PX for s in samples if s.patch_PX is not None]
    seconds = [s.second_I for s in samples if s.second_I is not None]
    if len({p.dtype for p in patches}) > 1:
        raise ValueError("some samples hold patches as bytes and some as floats; give all of them in one form.")
    if config.vision is None and (patches or grids):
        raise ValueError("the samples bring pictures and the model is text only; leave the pictures out.")
    grid_I3 = torch.cat(grids) if grids else None
    patch_PX = torch.cat(patches) if patches else None
    for number, sample in enumerate(samples):
        found = 0 if sample.patch_PX is None else sample.patch_PX.shape[0]
        expected = 0 if sample.grid_I3 is None else int(sample.grid_I3.prod(1).sum())
        if found != expected:
            raise ValueError(f"sample {number} brings {found} patches, but its grids say {expected}.")
        if sample.second_I is None and seconds and sample.grid_I3 is not None:
            raise ValueError(
                f"sample {number} does not say the seconds between its slices (second_I), others do; give all of them."
            )
    position_3T = positions(token_T, lengths, grid_I3, config, second_I=torch.cat(seconds) if seconds else None)
    targets = [s.is_target_T for s in samples if s.is_target_T is not None]
    if targets and len(targets) != len(samples):
        raise ValueError(
            "some samples say which tokens are targets and some do not; give all of them is_target_T or none."
        )
    return Batch(
        token_T=token_T,
        position_3T=position_3T,
        lengths=lengths,
        patch_PX=patch_PX,
        grid_I3=grid_I3,
        frame_lengths=frame_lengths(grid_I3),
        visual_M=visual_places(token_T, config) if grid_I3 is not None else None,
        is_target_T=torch.cat(targets) if targets else None,
    )


def frame_lengths(grid_I3: Tensor | None) -> tuple[int, ...]:
    """Patches of each frame, in order: h*w, t times for every row (t, h, w)."""
    if grid_I3 is None:
        return ()
    return tuple(torch.repeat_interleave(grid_I3[:, 1] * grid_I3[:, 2], grid_I3[:, 0]).tolist())


def visual_places(token_T: Tensor, config: ModelConfig) -> Tensor:
    """Places of the image and video placeholders, ascending."""
    return torch.where((token_T == config.image_token_id) | (token_T == config.video_token_id))[0]
