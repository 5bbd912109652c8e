"""Training packs made as they are needed, from worlds and plain text: step n follows from the seed and n alone."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qvl.core.batch import Sample
from qvl.data.deal import deal
from qvl.data.loader import MicroBatch, micro_batch
from qvl.model.config import ModelConfig
from qvl.parallel.data_parallel import World
from qvl.prompt.processor import Processor
from qvl.train.objective import Micro
from qvl.worlds import world as worlds
from qvl.worlds.world import Split

ALONE = World(0, 1, torch.device("cpu"))
Maker = Callable[[int], tuple[str, Any]]
"""Number of an example -> (its id, the sample or whatever `assemble` joins)."""
Assemble = Callable[[list[Any], tuple[str, ...], tuple[str, ...], ModelConfig], Micro]
"""(what the makers made, its ids, its categories, the model's config) -> one forward's worth."""


def num_tokens(sample: Sample) -> int:
    return sample.num_tokens


def packed(samples: list[Sample], ids: tuple[str, ...], categories: tuple[str, ...], config: ModelConfig) -> MicroBatch:
    """Equal lengths side by side: attention takes each run of them in one call."""
    order = sorted(range(len(samples)), key=lambda i: samples[i].num_tokens)
    return micro_batch([samples[i] for i in order], [ids[i] for i in order], [categories[i] for i in order], config)


class MadeStream:
    """Each step draws `samples` examples, their kind by weight, and joins them into one pack. The state is the step's number. Of several
    ranks each makes its share of the same draw, dealt so that all have about as much to do: a step waits for the slowest.

    Weights count samples, not tokens: the examples of a kind are about equally long. Files go through qvl.data.loader instead.
    """

    def __init__(
        self,
        makers: Mapping[str, tuple[Maker, float]],
        config: ModelConfig,
        *,
        samples: int,
        seed: int,
        ahead: int = 2,
        assemble: Assemble = packed,
        size_of: Callable[[Any], int] = num_tokens,
        ranks: World = ALONE,
    ) -> None:
        """`ahead` steps are made in a thread while the model trains; order and content do not depend on it. `size_of` measures what a
        maker makes; the first example of each kind is measured for all of them."""
        if samples < ranks.size:
            raise ValueError(
                f"{samples} samples a step cannot be shared by {ranks.size} ranks; give each at least one."
            )
        self.names = tuple(makers)
        self.makers = tuple(maker for maker, _ in makers.values())
        weights = [weight for _, weight in makers.values()]
        self.shares = np.cumsum(weights) / sum(weights)
        self.config, self.samples, self.seed, self.step = config, samples, seed, 0
        self._assemble, self._ahead, self._ranks = assemble, ahead, ranks
        self._sizes = [size_of(make(0)[1]) for make in self.makers] if ranks.size > 1 else [1] * len(makers)
        self._pool = ThreadPoolExecutor(1, initializer=_step_back)
        self._waiting: deque[Future[Micro]] = deque()

    def next_step(self) -> Sequence[Micro]:
        while len(self._waiting) <= self._ahead:
            self._waiting.append(self._pool.submit(self._make, self.step + len(self._waiting)))
        self.step += 1
        return [self._waiting.popleft().result()]

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "seed": self.seed}

    def restore(self, state: dict[str, Any]) -> None:
        if state["seed"] != self.seed:
            raise ValueError(f"the checkpoint's stream has seed {state['seed']}, this one {self.seed}; resume with it.")
        self.step = state["step"]
        self._waiting.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> Micro:
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64)))
        kinds = np.searchsorted(self.shares, random.random(self.samples), side="right").clip(max=len(self.names) - 1)
        mine = sorted(deal([self._sizes[kind] for kind in kinds], self._ranks.size)[self._ranks.rank])
        made = [self.makers[kinds[place]](step * self.samples + place) for place in mine]
        ids, categories = tuple(id for id, _ in made), tuple(self.names[kinds[place]] for place in mine)
        return self._assemble([thing for _, thing in made], ids, categories, self.config)


def _step_back() -> None:
    """The thread that makes the next steps takes what the training one leaves, where both share a core."""
    if sys.platform == "linux":  # where niceness is a thread's own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def of_world(world: worlds.World, processor: Processor, *, seed: int, split: Split = "train") -> Maker:
    """The world's examples as conversations; what the assistant says is trained."""

    def make(index: int) -> tuple[str, Sample]:
        example = world(seed, index, split)
        encoded = processor(example.messages, add_generation_prompt=False, targets="all")
        return example.id, encoded.sample

    return make


def of_text(text: Tensor, length: int, *, seed: int) -> Maker:
    """Windows of `length` tokens anywhere in one long text (its ids); every token is trained."""

    if len(text) < length:
        raise ValueError(f"the text has {len(text)} tokens, fewer than a window's {length}; give more text.")

    def make(index: int) -> tuple[str, Sample]:
        random = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
        start = int(random.integers(0, len(text) - length + 1))
        window_T = text[start : start + length].clone()
        return f"text/{start}", Sample(token_T=window_T, is_target_T=torch.ones(length, dtype=torch.bool))

    return make


def of_repeats(text: Tensor, length: int, *, seed: int) -> Maker:
    """Ids drawn one by one from a text, said twice: nothing but copying tells the second half, which is trained. Looking back for what
    followed an id (induction heads, arXiv 2209.11895) forms sooner with them."""

    def make(index: int) -> tuple[str, Sample]:
        random = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
        half = text[torch.from_numpy(random.integers(0, len(text), size=length // 2))]
        is_target_T = torch.arange(2 * len(half)) >= len(half)
        return f"repeats/{index}", Sample(token_T=torch.cat([half, half]), is_target_T=is_target_T)

    return make
