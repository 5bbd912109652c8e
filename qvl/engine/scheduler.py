"""Who goes through the model in the next step, and with how many tokens: first come, first served, nobody waits for ever."""

import bisect
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from qvl.engine.blocks import BlockManager
from qvl.engine.sequence import Sequence


class QueueFull(ValueError):
    """Come again later: the queue is at its bound."""


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + count) of a sequence."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence's next token can be drawn after it."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def is_answer(self) -> bool:
        """An answer's newest token, after which the next can be drawn: most chunks are one."""
        return self.count == 1 and self.start >= self.sequence.num_prompt and self.is_last


class Scheduler:
    """Knows no tensors. A step is `schedule`, the model's work, `computed`.

    A sequence that is taken up gets blocks for all its tokens, then one more whenever it outgrows them. When none is to be had the youngest
    loses its own and waits again (its tokens are computed anew, its draws are kept). The oldest is never the victim of another, and every
    sequence that was let in fits alone, so the oldest comes to its end, and with it everyone.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_running: int,
        max_queue: int,
        max_step_tokens: int,
        prompt_names_only: bool = False,
    ) -> None:
        self.blocks = blocks
        self.max_running, self.max_queue, self.max_step_tokens = max_running, max_queue, max_step_tokens
        self.prompt_names_only = prompt_names_only
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        """Both in order of arrival."""
        self.num_preemptions = 0
        self.num_asked_tokens = 0
        self.num_found_tokens = 0

    @property
    def num_queued(self) -> int:
        """Requests that never ran."""
        return sum(not s.was_running for s in self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Into the queue. Raises ValueError when it can never fit, QueueFull when the queue is at its bound."""
        needed = self._most_blocks(sequence)
        if needed > self.blocks.num_blocks:
            room = self.blocks.num_blocks * self.blocks.block_size
            raise ValueError(
                f"the request needs a cache of {sequence.max_length} tokens ({sequence.num_prompt} of prompt, up to "
                f"{sequence.max_length - sequence.num_prompt} of answer), and all of the cache holds {room}; shorten the prompt, ask for "
                "fewer tokens, or give the cache more memory."
            )
        if self.num_queued >= self.max_queue:
            raise QueueFull(f"{self.max_queue} requests wait already; try again later.")
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def schedule(self) -> list[Chunk]:
        """Every running answer's next token, then prompts in chunks, `max_step_tokens` in all (but at least one token of a prompt)."""
        chunks: list[Chunk] = []
        num_answering = sum(s.missing == 1 for s in self.running)
        left = max(1, self.max_step_tokens - num_answering)
        num_before = self.num_preemptions
        for sequence in list(self.running):
            if not sequence.blocks:
                continue  # an older one has just taken them
            is_answering = sequence.missing == 1
            count = 1 if is_answering else min(sequence.missing, left)
            if count == 0 or not self._grow(sequence):
                continue
            chunks.append(Chunk(sequence, sequence.num_computed, count))
            left -= 0 if is_answering else count
        while left > 0 and self.num_preemptions == num_before and (sequence := self._take_up()) is not None:
            count = min(sequence.missing, left)
            chunks.append(Chunk(sequence, sequence.num_computed, count))
            left -= count
        return chunks

    def computed(self, chunks: Iterable[Chunk]) -> None:
        """The model has been through these chunks: their full blocks can be found from now on."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.start + chunk.count
            if not self.blocks.reuse:
                continue
            sequence.name_blocks(self.blocks.block_size, prompt_only=self.prompt_names_only)
            num_full = min(sequence.num_computed // self.blocks.block_size, len(sequence.names))
            for i in range(sequence.num_named, num_full):
                self.blocks.name(sequence.blocks[i], sequence.names[i])
            sequence.num_named = max(sequence.num_named, num_full)

    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        """Let another answer run beside `parent`, whose prompt is computed. Returns (block, its copy) where one must be copied.

        Full blocks of the prompt are shared. Without room the child waits and its prompt is found in the cache or computed again.
        """
        num_shared, rest = divmod(parent.num_prompt, self.blocks.block_size)
        own = self.blocks.take(1 if rest else 0) if len(self.running) < self.max_running else None
        if own is None:
            bisect.insort(self.waiting, child, key=lambda s: s.order)
            return None
        shared = parent.blocks[:num_shared]
        self.blocks.hold(shared)
        child.blocks = [*shared, *own]
        child.num_computed = child.num_prompt
        child.num_named = min(num_shared, len(child.names))
        bisect.insort(self.running, child, key=lambda s: s.order)
        return (parent.blocks[num_shared], own[0]) if rest else None

    def remove(self, sequence: Sequence, *, is_broken: bool = False) -> None:
        """The sequence is over: answered, cancelled, or failed (`is_broken`: nobody may find what it left in its blocks)."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if is_broken:
            self.blocks.forget(sequence.blocks)
        self._strip(sequence)

    def _most_blocks(self, sequence: Sequence) -> int:
        # The last token is drawn and never read, so it needs no slot.
        return self.blocks.num_blocks_for(sequence.max_length - 1)

    def _grow(self, sequence: Sequence) -> bool:
        """Room for all its tokens, at the cost of the youngest; False when it is the youngest itself and has to wait again."""
        while True:
            needed = self.blocks.num_blocks_for(len(sequence.tokens)) - len(sequence.blocks)
            more = self.blocks.take(max(0, needed))
            if more is not None:
                sequence.blocks += more
                return True
            youngest = self.running.pop()
            self._strip(youngest)
            self.num_preemptions += 1
            bisect.insort(self.waiting, youngest, key=lambda s: s.order)
            if youngest is sequence:
                return False

    def _take_up(self) -> Sequence | None:
        """The first of those who wait begins to run, if there is room for all it has so far and a little more for the others."""
        if not self.waiting or len(self.running) >= self.max_running:
            return None
        sequence = self.waiting[0]
        found = self._found(sequence)
        self.blocks.hold(found)
        needed = self.blocks.num_blocks_for(len(sequence.tokens)) - len(found)
        # A running answer that will outgrow its blocks wants one soon; without this it would push out at once whom it let in.
        spare = sum(len(s.blocks) < self._most_blocks(s) for s in self.running)
        own = self.blocks.take(needed) if needed + spare <= self.blocks.num_available else None
        if own is None:
            self.blocks.let_go(found)
            return None
        self.waiting.pop(0)
        bisect.insort(self.running, sequence, key=lambda s: s.order)
        sequence.blocks = [*found, *own]
        sequence.num_computed = len(found) * self.blocks.block_size
        sequence.num_named = len(found)
        if not sequence.was_running:
            sequence.was_running = True
            sequence.num_found = sequence.num_computed
            self.num_asked_tokens += sequence.num_prompt
            self.num_found_tokens += sequence.num_found
        return sequence

    def _found(self, sequence: Sequence) -> Many[int]:
        """Cached blocks of its beginning, up to the last but one token (one must go through the model) and to no cut inside a visual."""
        if not self.blocks.reuse:
            return []
        sequence.name_blocks(self.blocks.block_size, prompt_only=self.prompt_names_only)
        size = self.blocks.block_size
        found = self.blocks.find(sequence.names)
        end = min(len(found), (len(sequence.tokens) - 1) // size) * size
        return found[: sequence.outside_spans(end, size) // size]

    def _strip(self, sequence: Sequence) -> None:
        self.blocks.let_go(sequence.blocks)
        sequence.blocks, sequence.num_computed, sequence.num_named = [], 0, 0
