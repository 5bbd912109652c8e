"""The kernels of kernels.cpp: compiled at first use where the CPU multiplies bf16 itself, and their one caller."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvl.core.batch import Batch
from qvl.core.device import facts
from qvl.core.log import say_once
from qvl.engine.kv_cache import KVCache
from qvl.engine.sampling import Best
from qvl.model.attention import Paged
from qvl.model.layers import Linear, PackedWeight, RMSNorm, RoundedWeight
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.vision import VisualFeatures
from qvl.outside.compiler import NoLibraryError, shared_library

MOST_ROWS = 64
"""Answers in one call. Beyond, torch's matmuls win: the kernels' read a weight anew from cache for every four rows."""
FEWEST_QUERIES = 24
"""Fewer new tokens of a prompt are not worth laying out its keys."""
LINEARS = 7
"""Of a decoder layer."""
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp")


@cache
def library() -> ctypes.CDLL | None:
    """None where the CPU has no AVX512-BF16 or nothing compiles; torch's own kernels run then, and are said to."""
    if "avx512_bf16" not in facts().cpu_flags:
        return None
    try:
        return ctypes.CDLL(str(shared_library(Path(__file__).with_suffix(".cpp"), FLAGS)))
    except (NoLibraryError, OSError) as error:
        say_once(f"the engine's own CPU kernels are not used ({error}); torch's run instead, decoding is slower")
        return None


def fits(model: Qwen3VL) -> bool:
    """Whether the kernels can take this model's answers further: dense, bf16, on a CPU, plain weights, no adapter, widths they know."""
    text = model.config.text
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or text.moe is not None:
        return False
    if text.head_dim not in (64, 128) or text.vocab_size % 4:
        return False
    if any(w % 128 for w in (text.hidden_size, text.intermediate_size, text.num_attention_heads * text.head_dim)):
        return False
    # An adapter's modules are Linears of another kind.
    linears = [m for m in model.language_model.modules() if isinstance(m, nn.Linear)]
    if any(type(m) is not Linear or m.bias is not None for m in linears):
        return False
    return all(_is_readable(*pair) for pair in _weights(model)) and library() is not None


def _weights(model: Qwen3VL) -> list[tuple[Tensor, Tensor | None]]:
    """What a step reads, in the order of kernels.cpp's Layer, with the scales of what is rounded; the head last."""
    layers: Any = model.language_model.layers
    found: list[tuple[Tensor, Tensor | None]] = []
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        found += [_numbers(m.weight, m.packed) for m in (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        norms = (attention.q_norm, attention.k_norm, layer.input_layernorm, layer.post_attention_layernorm)
        found += [(norm.weight, None) for norm in norms]
    return [*found, _numbers(model.head_weight, model.packed_head)]


def _numbers(weight: Tensor, packed: PackedWeight | None) -> tuple[Tensor, Tensor | None]:
    if not isinstance(packed, RoundedWeight):
        return weight, None
    packed.check(weight)
    return packed.value, packed.scale


def _is_readable(weight: Tensor, scale: Tensor | None) -> bool:
    kind = torch.bfloat16 if scale is None else torch.int8
    return weight.device.type == "cpu" and weight.dtype == kind and weight.is_contiguous()


@dataclass(frozen=True)
class Next:
    """An answer's newest token: `context` tokens of the sequence are known, it is the last of them."""

    token: int
    position: int
    context: int
    blocks: Sequence[int]


class Kernels:
    """A model's answers, one token further in one call; the head; and what greedy draws want of its logits.

    Floor: a step reads every weight and every cached key and value once; at 0.6B that is 1.19 GB, and 29 MB for an answer of 256 tokens.
    Weights are read as they lie, so nothing is packed and memory holds them once.
    """

    def __init__(self, model: Qwen3VL, cache: KVCache) -> None:
        loaded = library()
        assert loaded is not None and fits(model)
        # (kv heads, blocks, slots) of a layer lie in this order (kv_cache.new_cache)
        assert cache.key_LBZKH[0].permute(2, 0, 1, 3).is_contiguous()
        self.library, self.model, self.cache = loaded, model, cache
        self._seen: list[int] = []

    def decode(self, news: Sequence[Next]) -> Tensor:
        """Hidden states after the final norm (S, D); keys and values of the new tokens go into the cache."""
        assert 0 < len(news) <= MOST_ROWS
        self._look()
        decoder, text, size = self.model.language_model, self.model.config.text, self.cache.block_size
        most = max(len(new.blocks) for new in news)
        blocks = torch.tensor([[*new.blocks, *[0] * (most - len(new.blocks))] for new in news])
        token_S = torch.tensor([new.token for new in news])
        context_S = torch.tensor([new.context for new in news])
        slot_S = blocks.gather(1, (context_S[:, None] - 1) // size)[:, 0] * size + (context_S - 1) % size
        x_SD = decoder.embed_tokens.weight[token_S]
        cos_SH, sin_SH = decoder.rotary(torch.tensor([new.position for new in news]).expand(3, -1), x_SD.dtype)
        heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
        scratch = torch.empty(len(news) * (text.hidden_size + heads + text.intermediate_size), dtype=x_SD.dtype)
        self._call(
            "decode",
            *(self._shape, self._layers, decoder.norm.weight, len(news), x_SD, cos_SH, sin_SH, slot_S, context_S),
            *(blocks, most, scratch),
        )
        return x_SD

    def forward(self, batch: Batch, layout: Paged, features: VisualFeatures | None) -> Tensor:
        """Prompts, as the model's own forward takes them; layers and the final norm by the kernels."""
        self._look()
        x_TD = self.model.token_states(batch, layout=layout, features=features, run_block=self._run_layer)
        return self._norm(x_TD, self.model.language_model.norm)

    def _run_layer(
        self, layer: Any, x_TD: Tensor, cos_TH: Tensor, sin_TH: Tensor, layout: Paged
    ) -> tuple[Tensor, None]:
        """A decoder layer (layers.RunBlock), written over `x_TD`: torch's matmuls, and between them one pass over memory instead of about
        thirty (at 512 tokens of 0.6B those take a fifth of the time)."""
        attention, mlp, number = layer.self_attn, layer.mlp, layer.self_attn.layer
        normed_TD = self._norm(x_TD, layer.input_layernorm)
        q, k, v = (project(normed_TD) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        pools = (layout.key_LBZKH[number], layout.value_LBZKH[number])
        rotation = (attention.q_norm.weight, attention.k_norm.weight, cos_TH, sin_TH, layout.slot_T)
        self._call("place_rows", self._shape, *rotation, q, k, v, *map(_at, pools), len(x_TD))
        mixed_TNH = layout.attend_past(q.unflatten(-1, (-1, attention.head_dim)), layer=number)
        x_TD = x_TD.add_(attention.o_proj(mixed_TNH.flatten(-2)))
        normed_TD = self._norm(x_TD, layer.post_attention_layernorm)
        inner_TF = mlp.gate_proj(normed_TD)
        self._call("gate_rows", inner_TF, mlp.up_proj(normed_TD), *inner_TF.shape)
        return x_TD.add_(mlp.down_proj(inner_TF)), None

    def _norm(self, x_TD: Tensor, norm: RMSNorm) -> Tensor:
        out_TD = torch.empty_like(x_TD)
        self._call("norm_rows", x_TD, norm.weight, out_TD, *x_TD.shape, norm.eps)
        return out_TD

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """(S, V), bf16."""
        weight, scale = _numbers(self.model.head_weight, self.model.packed_head)
        out_SV = torch.empty(len(hidden_SD), len(weight), dtype=hidden_SD.dtype)
        self._call("project", weight, scale, hidden_SD, out_SV, *hidden_SD.shape, len(weight))
        return out_SV

    def best(self, logits_SV: Tensor) -> list[Best]:
        token_S, logprob_S = torch.empty(len(logits_SV), dtype=torch.int64), torch.empty(len(logits_SV))
        self._call("best", logits_SV, *logits_SV.shape, token_S, logprob_S)
        return [Best(*pair) for pair in zip(token_S.tolist(), logprob_S.tolist(), strict=True)]

    def _call(self, name: str, *arguments: Any) -> None:
        call(self.library, name, *arguments)

    def _look(self) -> None:
        """Takes down where the weights lie, which changes when somebody puts others in their place."""
        weights = _weights(self.model)[:-1]
        where = [0 if x is None else x.data_ptr() for pair in weights for x in pair]
        if where == self._seen:
            return
        text, cache = self.model.config.text, self.cache
        per_layer = len(weights) // text.num_hidden_layers
        pointers: list[int | None] = []
        for number in range(text.num_hidden_layers):
            own = weights[number * per_layer : (number + 1) * per_layer]
            for weight, scale in own[:LINEARS]:
                pointers += [weight.data_ptr(), None if scale is None else scale.data_ptr()]
            pointers += [norm.data_ptr() for norm, _ in own[LINEARS:]]
            pointers += [cache.key_LBZKH[number].data_ptr(), cache.value_LBZKH[number].data_ptr()]
        self._layers = (ctypes.c_void_p * len(pointers))(*pointers)
        sizes = (text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.num_attention_heads)
        sizes += (
            text.num_key_value_heads,
            text.head_dim,
            self.cache.key_LBZKH.shape[1] * cache.block_size,
            cache.block_size,
        )
        self._shape = ctypes.byref(_Shape((ctypes.c_int64 * 8)(*sizes), text.rms_norm_eps))
        self._seen = where


class _Shape(ctypes.Structure):
    """kernels.cpp has the names of the sizes, in this order."""

    _fields_ = (("sizes", ctypes.c_int64 * 8), ("eps", ctypes.c_float))


def call(loaded: ctypes.CDLL, name: str, *arguments: Any) -> None:
    """Tensors go as pointers, whole numbers as int64, others as float; the number of threads comes last."""
    made = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            made.append(_at(argument))
        elif isinstance(argument, float):
            made.append(ctypes.c_float(argument))
        else:
            made.append(ctypes.c_int64(argument) if isinstance(argument, int) else argument)  # None is a null pointer
    loaded[name](*made, ctypes.c_int(torch.get_num_threads()))


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@dataclass(frozen=True)
class KernelPaged(Paged):
    """Paged, with prompts met by the kernel: scores stay in cache, sums are fp32."""

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        loaded = library()
        if loaded is None or len(q) < FEWEST_QUERIES:
            return super().attend_sequence(q, k, v, out)
        attend_many(loaded, q, k, v, out)


def attend_many(loaded: ctypes.CDLL, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, is_causal: bool = True) -> None:
    """One sequence: q, out (n, heads, H) over k, v (m, kv heads, H), m >= n; under causality the last query sees all keys."""
    (count, heads, width), (total, kv_heads, _) = q.shape, k.shape
    assert k.stride() == v.stride() and k.stride(2) == q.stride(2) == 1 and width in (64, 128)
    assert q.stride(1) == width and out.is_contiguous()
    if not count:
        return
    scratch = torch.empty(2 * width * -(-total // 64) * 64, dtype=q.dtype)
    sizes = (count, total, heads, kv_heads, width, q.stride(0), k.stride(0), k.stride(1), int(is_causal))
    call(loaded, "attend_many", _at(q), _at(k), _at(v), out, *sizes, scratch)
