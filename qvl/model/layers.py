"""The small parts that repeat: the linear map that may be packed for a CPU, RMSNorm, the gated MLP."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RunBlock = Callable[..., Any]
"""(block, *arguments) -> what the block gives. The decoder and the vision encoder alone loop over their blocks; whoever calls them hands
in how one block runs: plainly, recomputed in the backward pass (train/blocks.py), in tiles (engine/exact.py), or by kernels of its own
(engine/kernels.py, engine/tower.py). One that writes into what came in does so under inference mode only."""


def run_plainly(block: nn.Module, *arguments: Any) -> Any:
    return block(*arguments)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the blocks of both halves run in one call of the model."""

    vision: RunBlock = run_plainly
    decoder: RunBlock = run_plainly


PLAIN_BLOCKS = Blocks()


class Linear(nn.Linear):
    """nn.Linear that may carry its weight a second time in the order the CPU's matmul likes (made by engine.prepare, for inference).

    The packed product equals the plain one to the bit (tests/test_prepare.py); it saves reordering the weight at every call.
    """

    packed: "PackedWeight | None" = None
    pack_late: bool = False
    """Its first use may pack it and let the plain weight go (engine.tower does)."""

    def forward(self, input: Tensor) -> Tensor:
        """Any axes in front; the last is the width."""
        return linear(input, self.weight, self.bias, self.packed)


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight in oneDNN's own layout."""

    value: Tensor
    version: int
    """The plain weight's count of changes when it was packed."""

    def check(self, weight: Tensor) -> None:
        """Raises RuntimeError when the plain weight is no longer the one that was packed."""
        if self.version != weight._version:
            raise RuntimeError(
                "the weights changed after they were packed; call engine.prepare.refresh, or drop to train."
            )


@dataclass(frozen=True, kw_only=True)
class RoundedWeight(PackedWeight):
    """A weight in whole numbers from -127 to 127, int8 in the plain weight's shape (engine.prepare with weights="int8")."""

    scale: Tensor
    """fp32, one a row, each of them a bf16 number."""

    def product(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(rows) <= 16:
            return torch.ops.aten._weight_int8pack_mm(rows, self.value, self.scale.to(x.dtype)).unflatten(
                0, x.shape[:-1]
            )
        # Widened anew at each call, which many rows make up for.
        return F.linear(x, self.value.to(x.dtype) * self.scale.to(x.dtype)[:, None])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedWeight | None) -> Tensor:
    """x @ weight.T + bias. A packed weight has no gradient, so it is used only where none is wanted."""
    if packed is None or torch.is_grad_enabled():
        if weight.is_meta:  # torch would answer with whatever lies in memory
            raise RuntimeError(
                "the plain weights were freed for serving (engine.prepare); load the folder again to train or change them."
            )
        return F.linear(x, weight, bias)
    packed.check(weight)
    if isinstance(packed, RoundedWeight):
        return packed.product(x) if bias is None else packed.product(x) + bias
    return torch.ops.mkldnn._linear_pointwise(x, packed.value, bias, "none", [], "")


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, fp32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any axes in front; the last is `width`."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
