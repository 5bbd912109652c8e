"""Keys and values of all running sequences, in blocks of one preallocated pool."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qvl.model.attention import Paged
from qvl.model.config import TextConfig


@dataclass
class KVCache:
    """The pool and its free blocks. `layout` makes the Paged that one forward needs."""

    key_LBZKH: Tensor
    value_LBZKH: Tensor
    free: list[int] = field(default_factory=list)
    """Blocks in nobody's hands, highest first, so that `take` gives neighbours in ascending order."""

    @property
    def block_size(self) -> int:
        return self.key_LBZKH.shape[2]

    def num_blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def take(self, count: int) -> tuple[int, ...]:
        """`count` blocks; raises ValueError when fewer are free."""
        if count > len(self.free):
            raise ValueError(
                f"{count} cache blocks are needed, {len(self.free)} are free; run fewer or shorter requests at once."
            )
        return tuple(self.free.pop() for _ in range(count))

    def give_back(self, blocks: Sequence[int]) -> None:
        assert len(set(blocks).union(self.free)) == len(blocks) + len(self.free), "a block came back twice"
        self.free.extend(blocks)
        self.free.sort(reverse=True)

    def slots(self, blocks: Sequence[int], count: int) -> Tensor:
        """Where the first `count` tokens of a sequence lie among the pool's B*Z slots."""
        device, size = self.key_LBZKH.device, self.block_size
        first = torch.tensor(blocks[: self.num_blocks_for(count)], device=device) * size
        return (first[:, None] + torch.arange(size, device=device)).flatten()[:count]

    def layout(self, news: Sequence["NewTokens"], kind: type[Paged] = Paged) -> Paged:
        slots = [b * self.block_size + i for new in news for b, i in new.places(self.block_size)]
        return kind(
            key_LBZKH=self.key_LBZKH,
            value_LBZKH=self.value_LBZKH,
            slot_T=torch.tensor(slots, device=self.key_LBZKH.device),
            query_lengths=tuple(new.count for new in news),
            context_lengths=tuple(new.past + new.count for new in news),
            blocks=tuple(new.blocks[: self.num_blocks_for(new.past + new.count)] for new in news),
        )


@dataclass(frozen=True)
class NewTokens:
    """`count` tokens that follow `past` cached ones, in a sequence that owns `blocks`."""

    blocks: tuple[int, ...]
    past: int
    count: int

    def places(self, block_size: int) -> list[tuple[int, int]]:
        """(block, slot inside it) of each new token."""
        return [(self.blocks[i // block_size], i % block_size) for i in range(self.past, self.past + self.count)]


def bytes_per_block(config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
    """Keys and values of one block in all layers."""
    return 2 * config.num_hidden_layers * block_size * config.num_key_value_heads * config.head_dim * dtype.itemsize


def new_cache(
    config: TextConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
) -> KVCache:
    """2 * L * B * Z * K * H numbers. On a CPU each kv head's slots lie together, so that a sequence's keys are one matrix to the matmul."""
    layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim

    def pool() -> Tensor:
        if torch.device(device).type == "cpu":
            return torch.empty(layers, heads, num_blocks, block_size, width, dtype=dtype).permute(0, 2, 3, 1, 4)
        return torch.empty(layers, num_blocks, block_size, heads, width, dtype=dtype, device=device)

    return KVCache(pool(), pool(), list(range(num_blocks - 1, -1, -1)))
