"""What a run minimises. The loop knows objectives by one small interface."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from qvl.core.batch import Batch
from qvl.model.flops import forward_flops
from qvl.model.moe import RouterStats, load_balancing_loss
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.vision import VisualFeatures
from qvl.parallel.data_parallel import World
from qvl.train.liger import check_liger
from qvl.train.loss import LOSS_KERNELS, Denominator, LossKernel, Targets, targets


class Micro(Protocol):
    """One forward's worth of a step (qvl.data.loader.MicroBatch)."""

    @property
    def batch(self) -> Batch: ...
    @property
    def ids(self) -> tuple[str, ...]: ...
    @property
    def categories(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Outcome:
    """What a forward gave. `loss` has its gradient; the rest is for the log."""

    loss: Tensor
    sums: dict[str, tuple[float, float]]
    """name -> (sum, count), added up over packs and ranks and shown as a mean."""
    flops: int = 0
    """Of this pack, forward and backward, as if no part were frozen and nothing were computed twice; 0 where nobody counts them."""


class Objective(Protocol):
    """A module, so that sharding finds the model inside; its forward is the only one the loop calls."""

    model: Qwen3VL

    def measure(self, micro: Micro) -> float:
        """What this pack adds to the denominator; summed over packs and ranks before the first backward."""
        ...

    def __call__(self, micro: Micro, denominator: float, world: World) -> Outcome: ...


class NextToken(nn.Module):
    """Next-token prediction with weight n^-power for the n targets of a sample (report 3: square root, power 0.5)."""

    def __init__(
        self,
        model: Qwen3VL,
        *,
        power: float = 0.5,
        denominator: Denominator = "weights",
        see_always: bool = False,
        loss_kernel: LossKernel = "ours",
    ) -> None:
        """`see_always`: run the tower on one black patch block where a pack has no picture, weight zero, so that sharded ranks never
        wait for each other (transformers#37186 and many more hang there)."""
        super().__init__()
        self.model, self.power, self.see_always = model, power, see_always
        self.kind: Denominator = denominator
        if loss_kernel == "liger":
            check_liger(model.device)
        self.cross_entropy = LOSS_KERNELS[loss_kernel]
        self._measured: list[tuple[Micro, Targets]] = []

    def measure(self, micro: Micro) -> float:
        aim = targets(micro.batch, power=self.power)
        self._measured.append((micro, aim))
        return aim.denominator(self.kind)

    def _targets(self, micro: Micro) -> Targets:
        """Those that `measure` found, once; it is called for all packs of a step before the first forward."""
        found = [aim for measured, aim in self._measured if measured is micro]
        self._measured = [pair for pair in self._measured if pair[0] is not micro]
        return found[0] if found else targets(micro.batch, power=self.power)

    def forward(self, micro: Micro, denominator: float, world: World) -> Outcome:
        aim = self._targets(micro)
        device = self.model.head_weight.device
        batch, moved = micro.batch.to(device), aim.to(device)
        router: list[RouterStats] = []
        idle = self._black() if self.see_always and batch.patch_PX is None else None
        hidden_TD = self.model(batch, router_out=router)
        loss, nll_R = self.cross_entropy(
            hidden_TD[moved.row_R], self.model.head_weight, moved.label_R, moved.weight_R / denominator
        )
        sums = _by_category(nll_R.cpu(), aim.sequence_R, micro.categories)
        moe = self.model.config.text.moe
        if moe is not None and router:
            balance = load_balancing_loss(router, world.sum_tensor if world.size > 1 else None)
            # The mean over packs and ranks, each by its part of the denominator, as the main loss.
            part = aim.denominator(self.kind) / denominator
            loss = loss + moe.router_aux_loss_coef * part * balance
            sums["balance_loss"] = (float(balance.detach()), 1.0)
            sums |= _router_load(router)
        if idle is not None:
            loss = loss + idle * 0.0
        flops = forward_flops(
            self.model.config, micro.batch.lengths, micro.batch.frame_lengths, num_logits=len(aim.row_R)
        )
        return Outcome(loss, sums, flops.training)

    def _black(self) -> Tensor:
        """Zero-weight sum of the features of one merge block, DeepStack included."""
        vision = self.model.config.vision
        assert vision is not None
        device, side = self.model.head_weight.device, vision.spatial_merge_size
        patch_PX = torch.zeros(side * side, vision.patch_numbers, device=device)
        grid_I3 = torch.tensor([[1, side, side]], device=device)
        features: VisualFeatures = self.model.visual(patch_PX, grid_I3, (side * side,))
        return features.merged_MD.float().sum() + sum(level.float().sum() for level in features.deepstack)


def _router_load(router: Sequence[RouterStats]) -> dict[str, tuple[float, float]]:
    """Tokens of the busiest expert over the mean, in all layers together and in the worst layer, and the share of experts without any."""
    load_LE = torch.stack([stats.count_E for stats in router])
    load_E, busiest_L = load_LE.sum(0), load_LE.amax(1) / load_LE.mean(1)
    return {
        "router_max_over_mean": (float(load_E.max() / load_E.mean()), 1.0),
        "router_worst_layer": (float(busiest_L.max()), 1.0),
        "router_idle": (float((load_LE == 0).float().mean()), 1.0),
    }


def _by_category(nll_R: Tensor, sequence_R: Tensor, categories: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean loss a token: over all, and for each category."""
    sums: dict[str, tuple[float, float]] = {"loss": (float(nll_R.double().sum()), float(nll_R.numel()))}
    for name in sorted(set(categories)):
        is_here = torch.tensor([c == name for c in categories])[sequence_R]
        sums[f"loss/{name}"] = (float(nll_R[is_here].double().sum()), float(is_here.sum()))
    return sums
