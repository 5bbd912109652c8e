"""liger-kernel's fused linear cross-entropy (Triton), for those who have it and a CUDA device; ours needs neither."""

from importlib import metadata

import torch
from torch import Tensor

OLDEST = (0, 8, 5)
"""Earlier ones multiply a sum over tokens by the first token's weight when tokens are weighted one by one."""


def check_liger(device: torch.device) -> None:
    """Raises ValueError where it cannot run."""
    if device.type != "cuda":
        raise ValueError(f"loss_kernel is liger, which needs a CUDA device, and this run is on {device}; take ours.")
    try:
        version = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        raise ValueError(
            "loss_kernel is liger, which is not installed; pip install liger-kernel, or take ours."
        ) from None
    if tuple(int(part) for part in version.split(".")[:3]) < OLDEST:
        raise ValueError(
            f"liger-kernel {version} weighs tokens wrongly; install {'.'.join(map(str, OLDEST))} or newer, or take ours."
        )


def liger_cross_entropy(hidden_RD: Tensor, head_VD: Tensor, label_R: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy`, but its chunks grow with the number of rows."""
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_fused_linear_cross_entropy,
    )

    nll_R = liger_fused_linear_cross_entropy(hidden_RD, head_VD, label_R, reduction="none", accum_dtype=torch.float32)
    return (nll_R * weight_R).sum(), nll_R.detach()
