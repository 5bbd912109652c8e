"""Dealing: pieces of work of known cost to ranks, so that all have about as much to do."""

from collections.abc import Sequence


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The pieces (by number) of each rank: the costliest first, each to the rank that has least to do.

    Not equally many, as `qvl.data.deal` does. Of equal costs the first goes first, of equal ranks the first is chosen, so that every
    rank finds the same.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        hands[rank].append(i)
        loads[rank] += costs[i]
    return hands
