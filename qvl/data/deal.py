"""Dealing: pieces of work of known cost to ranks, so that all have about as much to do; and what a pack costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from qvl.data.plan import Pack
from qvl.model.config import ModelConfig
from qvl.model.flops import forward_flops, vision_flops


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations of a pack: linear and squared in the tokens of each sequence, linear and squared in the patches of each frame."""

    token: float
    token_squared: float
    patch: float
    patch_squared: float

    def of(self, pack: Pack) -> float:
        return sum(
            self.token * item.tokens
            + self.token_squared * item.tokens**2
            + self.patch * item.patches
            + self.patch_squared * item.square
            for item in pack
        )


def deal(costs: Sequence[float], ranks: int, *, equally: bool = False) -> list[list[int]]:
    """The pieces (by number) of each rank: the costliest first, each to the rank that has least to do; `equally`: as many to each.

    A rank's pieces come in falling cost, so that ranks meet pieces of like cost at the same time. Of equal costs the first goes first, of
    equal ranks the first is chosen: every rank finds the same, and all hands together are the same set whatever the number of ranks.
    """
    if equally and len(costs) % ranks:
        raise ValueError(f"{len(costs)} packs a step cannot be dealt to {ranks} ranks; make it a multiple.")
    most = len(costs) // ranks if equally else len(costs)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(hands[r]) < most), key=lambda r: (loads[r], r))
        hands[rank].append(i)
        loads[rank] += costs[i]
    return hands


def cost_of(config: ModelConfig) -> Cost:
    """What tokens and patches cost, fitted to the operation counts of the model: both are a n + b n^2."""
    one, two = (forward_flops(config, (n,)).forward for n in (1, 2))
    area = 4 if config.vision is None else config.vision.merge_area
    small, large = (vision_flops(config, (n,)) for n in (area, 2 * area))
    squared = (two - 2 * one) / 2
    patch_squared = (large - 2 * small) / (2 * area * area)
    return Cost(
        token=one - squared,
        token_squared=squared,
        patch=small / area - patch_squared * area,
        patch_squared=patch_squared,
    )
