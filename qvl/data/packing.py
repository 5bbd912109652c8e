"""Packing under two budgets: each pack begins with the sample that has waited longest, and the best fits fill it."""

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def tokens(self) -> int: ...

    @property
    def patches(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


@dataclass(frozen=True, kw_only=True)
class PackBudget:
    tokens: int
    """Tokens of one pack."""
    patches: int
    """Patches of one pack: what the vision tower sees at once."""
    buffer: int = 256
    """Samples to choose from. 256 fill 99.8 % of 8K packs on a mix of captions, text, documents and video; waiting is bounded because the
    oldest always goes first."""

    def __post_init__(self) -> None:
        for name in ("tokens", "patches", "buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"the pack budget has {name} {getattr(self, name)}; expected at least 1.")


class Packer(Generic[Item]):
    """Holds the samples that wait. `pop` gives one pack; what it gives depends on the buffer alone."""

    def __init__(self, budget: PackBudget, waiting: Iterable[Item] = ()) -> None:
        self.budget = budget
        self._waiting: dict[int, Item] = {}
        self._sorted: list[tuple[int, int]] = []  # (tokens, -arrival): among equals the oldest stands last
        self._next = 0
        for item in waiting:
            self.push(item)

    def push(self, item: Item) -> None:
        if item.tokens > self.budget.tokens or item.patches > self.budget.patches:
            raise ValueError(
                f"a sample of {item.tokens} tokens and {item.patches} patches is larger than a pack of {self.budget.tokens} "
                f"and {self.budget.patches}; fit it first."
            )
        self._waiting[self._next] = item
        bisect.insort(self._sorted, (item.tokens, -self._next))
        self._next += 1

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Item]:
        """Who waits, oldest first."""
        return iter(self._waiting.values())

    @property
    def is_full(self) -> bool:
        return len(self) >= self.budget.buffer

    def pop(self) -> list[Item]:
        """The oldest sample and the largest that fit beside it, in the order in which they are taken."""
        tokens, patches = self.budget.tokens, self.budget.patches
        pack: list[Item] = []
        arrival: int | None = next(iter(self._waiting), None)
        while arrival is not None:
            item = self._waiting.pop(arrival)
            self._sorted.pop(bisect.bisect_left(self._sorted, (item.tokens, -arrival)))
            pack.append(item)
            tokens, patches = tokens - item.tokens, patches - item.patches
            arrival = self._best(tokens, patches)
        return pack

    def _best(self, tokens: int, patches: int) -> int | None:
        for place in range(bisect.bisect_right(self._sorted, (tokens, 1)) - 1, -1, -1):
            arrival = -self._sorted[place][1]
            if self._waiting[arrival].patches <= patches:
                return arrival
        return None
