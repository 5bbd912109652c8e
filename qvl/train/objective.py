"""What a run minimises. The loop knows objectives by one small interface."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qvl.core.batch import Batch
from qvl.model.flops import forward_flops
from qvl.model.layers import PLAIN_BLOCKS, Blocks
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
class Prepared:
    """A pack of a step, and what its objective found in it before the step's first forward."""

    micro: Micro
    denominator: float
    """What the pack adds to the step's denominator, which is summed over packs and ranks."""
    targets: Targets | None = None
    """Of objectives that predict tokens."""


@dataclass(frozen=True)
class Outcome:
    """What a forward gave. `loss` has its gradient; the rest is for the log."""

    loss: Tensor
    sums: dict[str, tuple[Tensor | float, float]]
    """name -> (sum, count), added up over packs and ranks and shown as a mean. A sum that was computed on the device stays there as a
    0-d tensor until the step's end: reading it would make each pack wait for the device."""
    flops: int = 0
    """Of this pack, forward and backward, as if no part were frozen and nothing were computed twice; 0 where nobody counts them."""


class Objective(Protocol):
    """A module, so that sharding finds the model inside; its forward is the only one the loop calls."""

    model: Qwen3VL
    """What is trained, as far as the rates of its parts say."""
    helpers: tuple[str, ...]
    """Names of its modules that are frozen helpers, a teacher or a reference: sharded like the rest, neither trained nor saved. One with
    a vision encoder is run by `hidden_states` with `see_always`, as the model itself is."""

    def prepare(self, micro: Micro) -> Prepared:
        """Looks at a pack before the first forward of its step."""
        ...

    def __call__(self, prepared: Prepared, denominator: float, world: World, blocks: Blocks = ...) -> Outcome:
        """`blocks` says how the model's blocks run: as they are, or recomputed in the backward pass."""
        ...


Forward = Callable[..., Tensor]
"""(batch, router_out=list, blocks=Blocks) -> hidden_TD: the model itself, or what shards the layout or knows features already."""


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
        forward: Forward | None = None,
    ) -> None:
        """`forward` makes the hidden states in the model's place; None: the model does. `see_always`: for sharded ranks (hidden_states)."""
        super().__init__()
        self.model, self.power, self.see_always = model, power, see_always
        self.kind: Denominator = denominator
        if loss_kernel == "liger":
            check_liger(model.device)
        self.cross_entropy = LOSS_KERNELS[loss_kernel]
        self._forward = forward
        self.helpers: tuple[str, ...] = ()

    def prepare(self, micro: Micro) -> Prepared:
        aim = targets(micro.batch, power=self.power)
        return Prepared(micro, aim.denominator(self.kind), aim)

    def forward(self, prepared: Prepared, denominator: float, world: World, blocks: Blocks = PLAIN_BLOCKS) -> Outcome:
        micro, aim = prepared.micro, prepared.targets
        assert aim is not None
        device = self.model.head_weight.device
        batch, moved = micro.batch.to(device), aim.to(device)
        router: list[RouterStats] = []
        hidden_TD, idle = hidden_states(
            self.model, batch, see_always=self.see_always, forward=self._forward, blocks=blocks, router_out=router
        )
        loss, nll_R = self.cross_entropy(
            hidden_TD[moved.row_R], self.model.head_weight, moved.label_R, moved.weight_R / denominator
        )
        sums = by_category(nll_R, aim.sequence_R, micro.categories)
        moe = self.model.config.text.moe
        if moe is not None and router:
            balance = load_balancing_loss(router, world.sum_tensor if world.size > 1 else None)
            # The mean over packs and ranks, each by its part of the denominator, as the main loss.
            part = prepared.denominator / denominator
            loss = loss + moe.router_aux_loss_coef * part * balance
            sums["balance_loss"] = (balance.detach(), 1.0)
            sums |= _router_load(router)
        if idle is not None:
            loss = loss + idle
        flops = forward_flops(
            self.model.config, micro.batch.lengths, micro.batch.frame_lengths, num_logits=len(aim.row_R)
        )
        return Outcome(loss, sums, flops.training)


def hidden_states(
    model: Qwen3VL, batch: Batch, *, see_always: bool, forward: Forward | None = None, blocks: Blocks, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """(hidden_TD, what to add to the loss): one forward of a model of an objective, its own or a frozen helper.

    `see_always`: where the batch has no image, the vision encoder runs on one black merge block, and the second value is a zero that holds
    its gradient. Sharded ranks gather a block's weights together, so one that skips the encoder leaves the others waiting for ever
    (transformers#37186 and many more hang there); this goes for every model that a forward runs, with gradient or without.
    """
    idle = None
    if see_always and batch.patch_PX is None:
        vision = model.config.vision
        assert vision is not None
        device, side = model.head_weight.device, vision.spatial_merge_size
        patch_PX = torch.zeros(side * side, vision.patch_numbers, device=device)
        grid_I3 = torch.tensor([[1, side, side]], device=device)
        features: VisualFeatures = model.visual(patch_PX, grid_I3, (side * side,), run_block=blocks.vision)
        idle = features.merged_MD.float().sum() + sum(level.float().sum() for level in features.deepstack)
        idle = idle * 0.0
    return (forward or model.__call__)(batch, blocks=blocks, **more), idle


def _router_load(router: Sequence[RouterStats]) -> dict[str, tuple[Tensor | float, float]]:
    """Tokens of the busiest expert over the mean, in all layers together and in the worst layer, and the share of experts without any."""
    load_LE = torch.stack([stats.count_E for stats in router])
    load_E, busiest_L = load_LE.sum(0), load_LE.amax(1) / load_LE.mean(1)
    return {
        "router_max_over_mean": (load_E.max() / load_E.mean(), 1.0),
        "router_worst_layer": (busiest_L.max(), 1.0),
        "router_idle": ((load_LE == 0).float().mean(), 1.0),
    }


def by_category(
    nll_R: Tensor, sequence_R: Tensor, categories: Sequence[str]
) -> dict[str, tuple[Tensor | float, float]]:
    """Mean loss a token: over all, and for each category. Which rows are whose is known on the CPU, so that nothing waits."""
    nll_R = nll_R.detach().double()
    sums: dict[str, tuple[Tensor | float, float]] = {"loss": (nll_R.sum(), float(nll_R.numel()))}
    for name in sorted(set(categories)):
        is_here = torch.tensor([c == name for c in categories])[sequence_R]
        place = torch.where(is_here)[0].to(nll_R.device, non_blocking=True)
        sums[f"loss/{name}"] = (nll_R[place].sum(), float(len(place)))
    return sums
