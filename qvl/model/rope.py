"""Rotary angles: which axis turns which frequency, YaRN, always in fp32."""

import math

import torch
from torch import Tensor

from qvl.model.config import RopeConfig, Yarn


def axis_of_frequency(rope: RopeConfig) -> list[int]:
    """For each of the H/2 frequencies, fast to slow, the axis it turns: 0 time, 1 height, 2 width.

    Interleaved (report 2): T H W T H W ..., so each axis sees fast and slow angles; what height and width do not claim is
    time's (for [24, 20, 20] also the slowest four). Chunked (Qwen2-VL): three blocks, so time gets only fast ones and width only slow.
    """
    time, height, width = rope.section
    count = time + height + width
    if rope.scheme == "plain":
        return [0] * count
    if rope.scheme == "interleaved":
        return [1 if j % 3 == 1 and j < 3 * height else 2 if j % 3 == 2 and j < 3 * width else 0 for j in range(count)]
    return [0] * time + [1] * height + [2] * width


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[list[float], float]:
    """The H/2 inverse frequencies and the factor on cos and sin (1 without YaRN).

    Python floats, not a buffer: `.to(bfloat16)` on a module rounds buffers, which damages rotary angles without a word.
    """
    # fp32 as the reference, so that angles agree to the bit; on the CPU also while a model is built on the meta device.
    freq_H = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if rope.yarn is None:
        return (1.0 / freq_H).tolist(), 1.0
    return _yarn(rope.yarn, rope.theta, freq_H, head_dim)


def _yarn(yarn: Yarn, theta: float, freq_H: Tensor, head_dim: int) -> tuple[list[float], float]:
    """arXiv 2309.00071: frequencies that turn often inside the original length stay, those that turn less than once are stretched."""

    def dim_that_turns(times: float) -> float:
        return (
            head_dim * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(dim_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_that_turns(yarn.beta_slow)), head_dim - 1)
    span = (high - low) or 0.001
    stretched_H = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    inv_H = (1.0 / (yarn.factor * freq_H)) * stretched_H + (1.0 / freq_H) * (1 - stretched_H)
    factor = yarn.attention_factor
    if factor is None:
        factor = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return inv_H.tolist(), factor


class Rotary:
    """Turns positions into the (cos, sin) that every decoder layer shares. Holds no tensors of the module tree."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self.inverse, self.factor = inverse_frequencies(rope, head_dim)
        self.axes = axis_of_frequency(rope)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, position_3T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos_TH, sin_TH) in `dtype`; the second half repeats the first (rotate-half form)."""
        device = position_3T.device
        if device not in self._on_device:
            inverse = torch.tensor(self.inverse, dtype=torch.float32, device=device)
            self._on_device[device] = inverse, torch.tensor(self.axes, device=device)
        inverse, axes = self._on_device[device]
        angle_TH = position_3T.float()[axes].T * inverse
        angle_TH = torch.cat((angle_TH, angle_TH), dim=-1)
        return (angle_TH.cos() * self.factor).to(dtype), (angle_TH.sin() * self.factor).to(dtype)


def rotate(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate-half: (a, b) -> (a cos - b sin, b cos + a sin), the same angle for all heads of a token."""
    a, b = x_TNH.chunk(2, dim=-1)
    turned_TNH = torch.cat((-b, a), dim=-1)
    return x_TNH * cos_TH[:, None] + turned_TNH * sin_TH[:, None]
