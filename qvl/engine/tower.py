"""The vision tower's blocks through kernels.cpp and oneDNN, for prompts with pictures on a CPU that multiplies bf16 itself."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvl.engine.kernels import attend_many, call, library
from qvl.engine.prepare import pack_late, packed
from qvl.model.attention import Packed
from qvl.model.layers import Linear, RoundedWeight, RunBlock, run_plainly
from qvl.model.qwen3vl import Qwen3VL

PART = 512
"""Patches whose MLP is computed together: its inner numbers, four times as many, stay in cache."""


def vision_block(model: Qwen3VL) -> RunBlock:
    """Takes the place of a block's own forward; `run_plainly` where this CPU does not run the kernels, or they do not know the heads.

    Floor: a picture of 1024 x 1024 through the tower of 0.6B (24 blocks of width 1024) is 4.3 TFLOP, two fifths of them attention. So
    nothing else may cost: bias, GELU and the sum with what came in are done by the matmul whose numbers they change, and queries and
    keys are turned where they lie.
    """
    vision, loaded = model.config.vision, library()
    if loaded is None or vision is None or vision.head_dim not in (64, 128):
        return run_plainly
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return run_plainly

    def run(block: Any, x_PC: Tensor, cos_PH: Tensor, sin_PH: Tensor, layout: Packed) -> Tensor:
        attention, mlp = block.attn, block.mlp
        qkv = _Product(attention.qkv)(block.norm1(x_PC))
        heads, width = attention.num_heads, cos_PH.shape[1]
        call(loaded, "turn_rows", qkv, cos_PH, sin_PH, *qkv.shape, 2 * heads, width)
        mixed_PC = torch.empty_like(x_PC)
        frames = qkv.unflatten(1, (3, heads, width)).split(layout.lengths)
        for frame, mixed in zip(frames, mixed_PC.unflatten(1, (heads, width)).split(layout.lengths), strict=True):
            q, k, v = frame.unbind(1)
            attend_many(loaded, q, k, v, mixed, is_causal=False)
        x_PC = _Product(attention.proj)(mixed_PC, plus=x_PC)
        first, second = _Product(mlp.linear_fc1), _Product(mlp.linear_fc2)
        for part in x_PC.split(PART):
            part.copy_(second(first(block.norm2(part), gelu=True), plus=part))
        return x_PC

    return run


class _Product:
    """x weight^T + bias, then GELU (tanh) or the sum with `plus`, rounded once. The weight is brought into oneDNN's order beforehand, which
    its many rows repay, and stays there where nobody else wants it (engine.prepare with `free`)."""

    def __init__(self, linear: nn.Module) -> None:
        self.linear, self.weight = linear, _ordered(linear)

    def __call__(self, x: Tensor, *, gelu: bool = False, plus: Tensor | None = None) -> Tensor:
        if self.weight is None:
            out = self.linear(x)
            out = F.gelu(out, approximate="tanh") if gelu else out
            return out if plus is None else out + plus
        if plus is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, plus, self.weight, self.linear.bias, "add")
        after = ("gelu", [], "tanh") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.linear.bias, *after)


def _ordered(linear: nn.Module) -> Tensor | None:
    """None for a linear of another kind: an adapter's, or one whose weight is rounded."""
    if type(linear) is not Linear or isinstance(linear.packed, RoundedWeight):
        return None
    if linear.packed is None and linear.pack_late:
        pack_late(linear)
    if linear.packed is None:
        return packed(linear.weight).value
    linear.packed.check(linear.weight)
    return linear.packed.value
