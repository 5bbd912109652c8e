"""The small parts that repeat: the linear map that may be packed for a CPU, RMSNorm, the gated MLP."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RunBlock = Callable[..., Any]
"""(block, *arguments) -> what the block gives. A trainer hands in another one to throw activations away (train/blocks.py)."""


def run_plainly(block: nn.Module, *arguments: Any) -> Any:
    return block(*arguments)


class Linear(nn.Linear):
    """nn.Linear that may carry its weight a second time in the order the CPU's matmul likes (made by engine.prepare, for inference).

    The packed product equals the plain one to the bit (tests/test_prepare.py); it saves reordering the weight at every call.
    """

    packed: "PackedWeight | None" = None

    def forward(self, input: Tensor) -> Tensor:
        """Any axes in front; the last is the width."""
        return linear(input, self.weight, self.bias, self.packed)


@dataclass(frozen=True)
class PackedWeight:
    value: Tensor
    """In oneDNN's own layout."""
    version: int
    """The plain weight's count of changes when it was packed."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedWeight | None) -> Tensor:
    """x @ weight.T + bias. A packed weight has no gradient, so it is used only where none is wanted."""
    if packed is None or torch.is_grad_enabled():
        if weight.is_meta:  # torch would answer with whatever lies in memory
            raise RuntimeError(
                "the plain weights were freed for serving (engine.prepare); load the folder again to train or change them."
            )
        return F.linear(x, weight, bias)
    if packed.version != weight._version:
        raise RuntimeError("the weights changed after they were packed; call engine.prepare.refresh, or drop to train.")
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
