"""The mixture-of-experts layer: fp32 router, top-k, grouped matmuls, and what balancing needs to know."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvl.core.device import grouped_mm_runs
from qvl.model.config import TextConfig


@dataclass(frozen=True)
class RouterStats:
    """One MoE layer's routing of one pack, as sums, so that layers, packs and ranks add up."""

    count_E: Tensor
    """Times each expert was chosen (float, no gradient)."""
    probability_E: Tensor
    """Sum over tokens of the router's softmax (float, carries the gradient)."""
    num_tokens: int


class Experts(nn.Module):
    """All experts' weights, in F.linear orientation. The hub's files hold the transpose of both (see weights.py)."""

    def __init__(self, num_experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))


Dispatch = Callable[[Tensor, Tensor, Tensor, Experts], Tensor]
"""(x_TD, expert_TA, weight_TA, experts) -> sum over the A chosen experts of weight * expert(x), (T, D)."""


class MoE(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe = config.moe
        self.gate = nn.Linear(config.hidden_size, config.moe.num_experts, bias=False)
        self.experts = Experts(config.moe.num_experts, config.hidden_size, config.moe.intermediate_size)

    def forward(self, x_TD: Tensor, dispatch: Dispatch | None = None) -> tuple[Tensor, RouterStats]:
        """`dispatch` is another way through the experts (exact mode's, a trainer's); None picks the local kernel."""
        # The softmax runs in fp32; the logits come from a matmul in the model's dtype, as in the reference.
        probability_TE = self.gate(x_TD).softmax(dim=-1, dtype=torch.float32)
        weight_TA, expert_TA = probability_TE.topk(self.moe.num_experts_per_tok, dim=-1)
        if self.moe.norm_topk_prob:
            weight_TA = weight_TA / weight_TA.sum(dim=-1, keepdim=True)
        dispatch = dispatch or pick_dispatch(x_TD.device.type, x_TD.dtype)
        out_TD = dispatch(x_TD, expert_TA, weight_TA.to(x_TD.dtype), self.experts)
        count_E = torch.bincount(expert_TA.flatten(), minlength=self.moe.num_experts).float()
        return out_TD, RouterStats(count_E, probability_TE.sum(dim=0), x_TD.shape[0])


def by_loop(x_TD: Tensor, expert_TA: Tensor, weight_TA: Tensor, experts: Experts) -> Tensor:
    """The oracle: one expert after another."""
    out_TD = torch.zeros_like(x_TD)
    for expert in expert_TA.unique().tolist():
        token, choice = torch.where(expert_TA == expert)
        gate, up = F.linear(x_TD[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, experts.down_proj[expert])
        out_TD = out_TD.index_add(0, token, out * weight_TA[token, choice, None])
    return out_TD


def by_grouped_mm(x_TD: Tensor, expert_TA: Tensor, weight_TA: Tensor, experts: Experts) -> Tensor:
    """Tokens sorted by expert, then two grouped matmuls instead of a loop."""
    num_chosen = expert_TA.shape[1]
    order = expert_TA.flatten().argsort(stable=True)
    token = order // num_chosen
    counts = torch.bincount(expert_TA.flatten(), minlength=experts.down_proj.shape[0])
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x_TD[token], experts.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, experts.down_proj.transpose(1, 2), offs=ends)
    return torch.zeros_like(x_TD).index_add(0, token, out * weight_TA.flatten()[order, None])


def pick_dispatch(device: str, dtype: torch.dtype) -> Dispatch:
    return by_grouped_mm if grouped_mm_runs(dtype, device) else by_loop


def load_balancing_loss(
    stats: Sequence[RouterStats], sum_over_ranks: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """num_experts * sum_e (mean count_e) * (mean probability_e), means over all tokens and layers; 1 times A when balanced.

    `sum_over_ranks` adds the counts of all ranks, which makes it the global-batch loss (Qwen3 report): experts may then specialise inside
    one sample. It must not need a gradient; the probabilities stay local and the mean over ranks is the gradient all-reduce's business.
    Source: Switch Transformer (arXiv 2101.03961) eq. 4-6, coefficient `router_aux_loss_coef`.
    """
    if not stats:
        raise ValueError(
            "load_balancing_loss needs the router statistics of at least one MoE layer; pass router_out to the model."
        )
    count_E = torch.stack([s.count_E for s in stats]).sum(0)
    num_rows = torch.tensor(float(sum(s.num_tokens for s in stats)), device=count_E.device)
    local_rows = num_rows
    if sum_over_ranks is not None:
        count_E, num_rows = sum_over_ranks(count_E), sum_over_ranks(num_rows)
    probability_E = torch.stack([s.probability_E for s in stats]).sum(0)
    return count_E.numel() * ((count_E / num_rows) * (probability_E / local_rows)).sum()
