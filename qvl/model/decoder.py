"""The Qwen3 decoder: pre-norm layers with QK-norm, grouped queries, and DeepStack added after the first ones."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvl.model.attention import Layout
from qvl.model.config import TextConfig
from qvl.model.layers import MLP, Linear, RMSNorm, RunBlock, run_plainly
from qvl.model.moe import Dispatch, MoE, RouterStats
from qvl.model.rope import Rotary, rotate


@dataclass(frozen=True)
class DeepStack:
    """Visual features for the first decoder layers: level l is added to layer l's output at the visual tokens, nothing elsewhere."""

    levels: tuple[Tensor, ...]
    """One (M, D) tensor for each level."""
    visual_M: Tensor
    """Places of the visual tokens."""


class Attention(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, heads, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_heads, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = Linear(heads, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x_TD: Tensor, cos_TH: Tensor, sin_TH: Tensor, layout: Layout) -> Tensor:
        q_TNH = self.q_norm(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        k_TKH = self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        v_TKH = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q_TNH, k_TKH = rotate(q_TNH, cos_TH, sin_TH), rotate(k_TKH, cos_TH, sin_TH)
        return self.o_proj(self.attend(q_TNH, k_TKH, v_TKH, layout).flatten(-2))

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: Layout) -> Tensor:
        """Apart, because a compiler must stop here: lengths change with every pack and the number with every layer."""
        return layout.attend(q_TNH, k_TKH, v_TKH, layer=self.layer)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        is_moe = config.moe is not None and config.moe.is_moe_layer(layer)
        self.mlp = MoE(config) if is_moe else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, cos_TH: Tensor, sin_TH: Tensor, layout: Layout, *, dispatch: Dispatch | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """`dispatch`: another way through a mixture's experts; None picks the local kernel."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos_TH, sin_TH, layout)
        inner_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, MoE):
            out_TD, stats = self.mlp(inner_TD, dispatch)
            return x_TD + out_TD, stats
        return x_TD + self.mlp(inner_TD), None


class Decoder(nn.Module):
    """Embedding, all layers, final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.rope, config.head_dim)

    def forward(
        self,
        x_TD: Tensor,
        *,
        position_3T: Tensor,
        layout: Layout,
        deepstack: DeepStack | None = None,
        router_out: list[RouterStats] | None = None,
        run_block: RunBlock = run_plainly,
    ) -> Tensor:
        """Hidden states before the final norm. `router_out` is filled with one entry for each MoE layer; `run_block` runs each layer."""
        cos_TH, sin_TH = self.rotary(position_3T, x_TD.dtype)
        levels = () if deepstack is None else deepstack.levels
        for number, layer in enumerate(self.layers):
            x_TD, stats = run_block(layer, x_TD, cos_TH, sin_TH, layout)
            if router_out is not None and stats is not None:
                router_out.append(stats)
            if deepstack is not None and number < len(levels):
                # Out of place: an in-place add on a checkpointed view is what broke elsewhere (transformers#41535).
                x_TD = x_TD.index_add(0, deepstack.visual_M, levels[number].to(x_TD.dtype))
        return x_TD


def embed(decoder: Decoder, token_T: Tensor, visual_M: Tensor | None, feature_MD: Tensor | None) -> Tensor:
    """Token rows, with the visual tokens' rows replaced by what the merger made."""
    x_TD = decoder.embed_tokens(token_T)
    if visual_M is None or feature_MD is None:
        return x_TD
    if feature_MD.shape[0] != visual_M.shape[0]:
        raise ValueError(f"{feature_MD.shape[0]} visual features came for {visual_M.shape[0]} placeholder tokens.")
    return torch.index_copy(x_TD, 0, visual_M, feature_MD.to(x_TD.dtype))
