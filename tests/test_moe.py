"""Experts: the grouped matmul equals the plain loop, in value and gradient, also when experts stay idle."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qvl.core.device import grouped_mm_runs
from qvl.model.config import preset
from qvl.model.moe import Experts, MoE, RouterStats, by_grouped_mm, by_loop, load_balancing_loss
from qvl.model.vision import sincos_table

CPU_DTYPES = [d for d in (torch.float32, torch.bfloat16) if grouped_mm_runs(d)]


def experts(dtype: torch.dtype) -> Experts:
    torch.manual_seed(0)
    made = Experts(6, 32, 16)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2)
    return made.to(dtype)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("chosen", [[[0, 1], [2, 3], [4, 5]], [[3, 0], [3, 1], [3, 2]], [[5, 4]]])
def test_grouped_matmul_equals_the_loop(dtype: torch.dtype, chosen: list[list[int]]) -> None:
    expert_TA = torch.tensor(chosen * 5)
    weight_TA = torch.rand(expert_TA.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x_TD = torch.randn(len(expert_TA), 32, generator=torch.Generator().manual_seed(2)).to(dtype)

    def run(dispatch) -> list[Tensor]:
        own = experts(dtype)
        x = x_TD.clone().requires_grad_()
        out = dispatch(x, expert_TA, weight_TA, own)
        out.float().square().sum().backward()
        assert x.grad is not None and own.gate_up_proj.grad is not None and own.down_proj.grad is not None
        return [t.float() for t in (out.detach(), x.grad, own.gate_up_proj.grad, own.down_proj.grad)]

    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, loop in zip(run(by_grouped_mm), run(by_loop), strict=True):
        assert float((ours - loop).abs().max()) <= tolerance * float(loop.abs().max())


def test_the_balance_loss_is_the_number_chosen_when_routing_is_even_and_grows_to_the_number_of_experts() -> None:
    even = RouterStats(torch.full((4,), 5.0), torch.full((4,), 2.5), 10)  # 10 tokens, 2 of 4 experts each
    assert float(load_balancing_loss([even])) == pytest.approx(2.0)
    collapsed = RouterStats(torch.tensor([10.0, 0, 0, 0]), torch.tensor([10.0, 0, 0, 0]), 10)  # 1 of 4, always the same
    assert float(load_balancing_loss([collapsed])) == pytest.approx(4.0)


def test_the_global_balance_loss_uses_the_counts_of_all_ranks() -> None:
    """Two ranks, each collapsed on an expert of its own: unbalanced alone, balanced together."""
    mine = RouterStats(torch.tensor([10.0, 0.0]), torch.tensor([10.0, 0.0]), 10)
    other = {2: torch.tensor([0.0, 10.0]), 0: torch.tensor(10.0)}
    assert float(load_balancing_loss([mine])) == pytest.approx(2.0)
    assert float(load_balancing_loss([mine], lambda x: x + other[x.numel() if x.ndim else 0])) == pytest.approx(1.0)


def test_renormalised_weights_sum_to_one_and_raw_ones_do_not() -> None:
    text = preset("nano-moe").text
    assert text.moe is not None
    seen: list[Tensor] = []

    def watch(x_TD: Tensor, expert_TA: Tensor, weight_TA: Tensor, own: Experts) -> Tensor:
        seen.append(weight_TA)
        return x_TD

    for is_norm in (True, False):
        layer = MoE(replace(text, moe=replace(text.moe, norm_topk_prob=is_norm)))
        layer(torch.randn(7, text.hidden_size), watch)
    torch.testing.assert_close(seen[0].sum(1), torch.ones(7))
    assert float(seen[1].detach().sum(1).max()) < 1.0


def test_the_sine_cosine_table_tells_every_place_from_every_other() -> None:
    table = sincos_table(8, 96)
    assert table.shape == (64, 96)
    assert float(table.abs().max()) <= 1.0
    distance = torch.cdist(table, table) + 10 * torch.eye(64)
    assert float(distance.min()) > 0.5
