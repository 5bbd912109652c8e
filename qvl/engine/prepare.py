"""Weights in the order the CPU's bf16 matmul likes, made once instead of at every call."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from qvl.core.log import say_once
from qvl.model.layers import Linear, PackedWeight
from qvl.model.qwen3vl import Qwen3VL


def prepare(model: Qwen3VL, *, free: bool = False) -> bool:
    """Pack every Linear and the head of a bf16 model on a CPU; False where there is nothing to gain (other devices, fp32).

    Floor: a decoding step reads every weight once. Plain bf16 linears read 16 GB/s of a core's 38 because oneDNN reorders the weight at
    each call; packed ones read 30. `free` drops the plain copy where packing replaces it (all but the embedding), for serving alone:
    such a model can no longer be trained or saved.
    """
    _refuse_freed(model)
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not torch.backends.mkldnn.is_available():
        say_once("this torch cannot pack linear weights for the CPU; plain matmuls run instead")
        return False
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Linear):
                module.packed = _packed(module.weight)
        tied = model.config.tie_word_embeddings
        head = _packed(model.head_weight) if tied else model.lm_head.packed
        model.packed_head = head  # type: ignore[assignment]
        if free:
            for module in model.modules():
                if isinstance(module, Linear):
                    module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
                    if module.packed is not None:
                        module.packed = replace(module.packed, version=module.weight._version)
            if not tied:
                model.packed_head = model.lm_head.packed  # type: ignore[assignment]
    return True


def _packed(weight: Tensor) -> PackedWeight:
    return PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight, None), weight._version)


def _refuse_freed(model: Qwen3VL) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model's plain weights were freed for serving; load its folder again.")


def refresh(model: Qwen3VL) -> None:
    """Pack anew after the weights changed (between two rollouts)."""
    _refuse_freed(model)
    if model.packed_head is not None:
        prepare(model)


def drop(model: Qwen3VL) -> None:
    """Back to plain weights alone, for training."""
    _refuse_freed(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.packed = None
    model.packed_head = None
