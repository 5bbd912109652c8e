"""Whose the cache blocks are: counted holders, full blocks found again by the name of their content, the oldest given away first."""

from collections import OrderedDict
from collections.abc import Sequence as Many
from typing import Protocol


class Pool(Protocol):
    """Blocks in nobody's hands (KVCache)."""

    free: list[int]

    def take(self, count: int) -> tuple[int, ...]: ...
    def give_back(self, blocks: Many[int]) -> None: ...


class BlockManager:
    """A block is free (the pool's), held by one or more sequences, or idle: nobody's, but its content has a name and may be wanted."""

    def __init__(self, pool: Pool, *, block_size: int, reuse: bool = True) -> None:
        self.pool, self.block_size, self.reuse = pool, block_size, reuse
        self.num_blocks = len(pool.free)
        self.holders: dict[int, int] = {}
        self.block_of: dict[bytes, int] = {}
        self.name_of: dict[int, bytes] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Least recently used first."""

    @property
    def num_available(self) -> int:
        return len(self.pool.free) + len(self.idle)

    def num_blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks for one holder, or None when fewer are to be had. Idle ones lose their content, the oldest first."""
        if count > self.num_available:
            return None
        blocks = list(self.pool.take(min(count, len(self.pool.free))))
        while len(blocks) < count:
            block, _ = self.idle.popitem(last=False)
            self._forget(block)
            blocks.append(block)
        for block in blocks:
            self.holders[block] = 1
        return blocks

    def find(self, names: Many[bytes]) -> list[int]:
        """Blocks that hold the longest known beginning of `names`. Nobody holds them yet: `hold` at once, or let them be."""
        found = []
        for name in names if self.reuse else ():
            block = self.block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Many[int]) -> None:
        """One holder more."""
        for block in blocks:
            self.idle.pop(block, None)
            self.holders[block] = self.holders.get(block, 0) + 1

    def let_go(self, blocks: Many[int]) -> None:
        """One holder less. Last blocks first, so that of two idle blocks of a prompt the one further back goes first."""
        freed = []
        for block in reversed(blocks):
            assert self.holders.get(block, 0) > 0, "a block came back twice"
            self.holders[block] -= 1
            if self.holders[block] == 0:
                del self.holders[block]
                if block in self.name_of:
                    self.idle[block] = None
                else:
                    freed.append(block)
        if freed:
            self.pool.give_back(freed)

    def name(self, block: int, name: bytes) -> None:
        """The block is full and holds what `name` says. Of two blocks with the same content the first keeps the name."""
        if self.reuse and name not in self.block_of and block not in self.name_of:
            self.block_of[name] = block
            self.name_of[block] = name

    def forget(self, blocks: Many[int]) -> None:
        """Held blocks whose content is not to be trusted."""
        for block in blocks:
            assert self.holders.get(block, 0) > 0, "only held blocks are forgotten"
            self._forget(block)

    def forget_all(self) -> None:
        """No content is found again; what is held stays held."""
        for block in list(self.name_of):
            self._forget(block)
        self.pool.give_back(list(self.idle))
        self.idle.clear()

    def _forget(self, block: int) -> None:
        name = self.name_of.pop(block, None)
        if name is not None:
            del self.block_of[name]
