"""Dealing: pieces of work of known cost to ranks, so that all have about as much to do."""

from collections.abc import Sequence


def deal(costs: Sequence[float], ranks: int, *, most: int | None = None) -> list[list[int]]:
    """The pieces (by number) of each rank: the costliest first, each to the rank that has least to do, but no more than `most` to one.

    Equal costs keep their order, and equal ranks the lower number, so that every rank finds the same.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if most is None or len(hands[r]) < most), key=lambda r: (loads[r], r))
        hands[rank].append(i)
        loads[rank] += costs[i]
    return hands
