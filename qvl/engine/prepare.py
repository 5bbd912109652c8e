"""Weights as a CPU likes them for answering: in oneDNN's order, or in whole numbers of 8 bits; made once instead of at every call."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qvl.core.log import say_once
from qvl.engine import kernels
from qvl.model.layers import Linear, PackedWeight, RoundedWeight
from qvl.model.qwen3vl import Qwen3VL

Weights = Literal["plain", "int8"]


def prepare(model: Qwen3VL, *, free: bool = False, weights: Weights = "plain", pack: bool | None = None) -> bool:
    """Pack every Linear and the head of a bf16 model on a CPU; False where there is nothing to gain: other devices, fp32, and (`pack` None)
    models that the engine's own kernels take further, which read plain weights (exact mode does not use them: give `pack` True).

    Floor: a decoding step reads every weight once. Plain bf16 linears read 16 GB/s of a core's 38 because oneDNN reorders the weight at
    each call; packed ones read 30. `free` drops the plain copy where packing replaces it (all but the embedding), for serving alone:
    such a model can no longer be trained or saved. Where the engine's kernels run it lets the tower's blocks be packed by the first
    picture, which keeps them out of the time to load (0.24 s for 0.3 B weights, one picture's 2 %).

    `weights` int8 rounds the decoder's linears and the head (not the vision tower, whose time is arithmetic): half the bytes of a step, and
    answers that differ a little. What that costs is measured by `python -m bench.rounding`.
    """
    _refuse_freed(model)
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        if weights == "int8":
            raise ValueError(
                f"int8 weights are for bfloat16 on a CPU; the model is {model.dtype} on {model.device.type}. "
                "Give --dtype bfloat16 --device cpu."
            )
        return False
    if weights == "int8":
        _round(model)
    elif pack is None and kernels.fits(model):
        for module in _linears(model.visual.blocks) if free and model.config.vision is not None else ():
            module.pack_late = True
        return False
    elif not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not torch.backends.mkldnn.is_available():
        say_once("this torch cannot pack linear weights for the CPU; plain matmuls run instead")
        return False
    else:
        _pack(model)
    if free:
        _free(model)
    return True


@torch.no_grad()
def _pack(model: Qwen3VL) -> None:
    for module in _linears(model):
        module.packed = packed(module.weight)
    model.packed_head = packed(model.head_weight) if model.config.tie_word_embeddings else model.lm_head.packed  # type: ignore[assignment]


@torch.no_grad()
def _round(model: Qwen3VL) -> None:
    for module in _linears(model.language_model):
        module.packed = rounded(module.weight)
    model.packed_head = rounded(model.head_weight)
    if not model.config.tie_word_embeddings:
        model.lm_head.packed = model.packed_head  # type: ignore[assignment]


def _free(model: Qwen3VL) -> None:
    for module in _linears(model):
        if module.packed is not None:
            _free_one(module)
    if not model.config.tie_word_embeddings:
        model.packed_head = model.lm_head.packed  # type: ignore[assignment]


def _free_one(linear: Linear) -> None:
    assert linear.packed is not None
    linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
    linear.packed = replace(linear.packed, version=linear.weight._version)


@torch.inference_mode(False)  # inside it no tensor made there would count its changes
@torch.no_grad()
def pack_late(linear: Linear) -> None:
    """What `free` put off: packs, and lets the plain weight go."""
    linear.packed = packed(linear.weight)
    _free_one(linear)


def _linears(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def packed(weight: Tensor) -> PackedWeight:
    return PackedWeight(value=torch.ops.mkldnn._reorder_linear_weight(weight, None), version=weight._version)


def rounded(weight: Tensor) -> RoundedWeight:
    """To the nearest of 255 steps between a row's largest magnitude and its negative."""
    # The scale is a bf16 number, rounded up, so that every kernel can use it as it is and no value leaves the range.
    scale = (weight.abs().amax(dim=1).float() / 127).clamp(min=1e-30)
    scale = (scale.view(torch.int32) + 0xFFFF).bitwise_and(-0x10000).view(torch.float32)
    value = (weight.float() / scale[:, None]).round().to(torch.int8)
    return RoundedWeight(value=value, scale=scale, version=weight._version)


def _refuse_freed(model: Qwen3VL) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model's plain weights were freed for serving; load its folder again.")


def refresh(model: Qwen3VL) -> None:
    """Pack or round anew after the weights changed (between two rollouts)."""
    _refuse_freed(model)
    if isinstance(model.packed_head, RoundedWeight):
        prepare(model, weights="int8")
    elif model.packed_head is not None:
        prepare(model, pack=True)


@torch.inference_mode(False)
@torch.no_grad()
def sync_weights(model: Qwen3VL, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of a model in training (its `named_parameters`) into this one, which answers with them from the next step on.

    This model keeps its dtype, its device and the form of its weights: what is packed or rounded is so anew, and what `prepare` freed
    stays freed. Sharded tensors are gathered one at a time, which is a collective: every rank must call. Raises ValueError before
    anything is changed where names or shapes differ.
    """
    own = dict(model.named_parameters())
    if own.keys() != weights.keys():
        name = min(own.keys() ^ weights.keys())
        raise ValueError(
            f"the weights that came and the model's differ by {name}; expected the same model, with an adapter merged first."
        )
    for name, parameter in own.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(
                f"{name} came with shape {tuple(weights[name].shape)}, and the model's is {tuple(parameter.shape)}."
            )
    for name, parameter in own.items():
        given = weights[name]
        whole = given.full_tensor() if isinstance(given, DTensor) else given
        if not parameter.is_meta:
            parameter.copy_(whole)
            continue
        linear = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(linear, Linear) and linear.packed is not None
        linear.packed = _anew(linear.packed, whole.to(linear.packed.value.device, model.dtype), linear.weight._version)
    for linear in _linears(model):
        if linear.packed is not None and not linear.weight.is_meta:
            linear.packed = _anew(linear.packed, linear.weight, linear.weight._version)
    if model.packed_head is not None:
        if model.config.tie_word_embeddings:
            model.packed_head = _anew(model.packed_head, model.head_weight, model.head_weight._version)
        else:
            model.packed_head = model.lm_head.packed  # type: ignore[assignment]


def _anew(before: PackedWeight, weight: Tensor, version: int) -> PackedWeight:
    """The weight in the form of the one before."""
    return replace(rounded(weight) if isinstance(before, RoundedWeight) else packed(weight), version=version)


def drop(model: Qwen3VL) -> None:
    """Back to plain weights alone, for training."""
    _refuse_freed(model)
    for module in _linears(model):
        module.packed = None
    model.packed_head = None
