"""Training packs made as they are needed, from worlds and plain text: step n follows from the seed and n alone."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qvl.core.batch import Batch, Sample
from qvl.model.config import ModelConfig
from qvl.model.pack import pack
from qvl.prompt.processor import Processor
from qvl.worlds.world import World

Maker = Callable[[int], tuple[str, Sample]]
"""Number of an example -> (its id, the sample)."""


@dataclass(frozen=True)
class MadePack:
    batch: Batch
    ids: tuple[str, ...]
    categories: tuple[str, ...]


class MadeStream:
    """Each step draws `samples` examples, their kind by weight, and packs them into one Batch. The state is the step's number.

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
    ) -> None:
        """`ahead` steps are made in a thread while the model trains; order and content do not depend on it."""
        self.names = tuple(makers)
        self.makers = tuple(maker for maker, _ in makers.values())
        weights = [weight for _, weight in makers.values()]
        self.shares = np.cumsum(weights) / sum(weights)
        self.config, self.samples, self.seed, self.step = config, samples, seed, 0
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[MadePack]] = deque()

    def next_step(self) -> Sequence[MadePack]:
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

    def _make(self, step: int) -> MadePack:
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64)))
        kinds = np.searchsorted(self.shares, random.random(self.samples), side="right").clip(max=len(self.names) - 1)
        made = [self.makers[kind](step * self.samples + place) for place, kind in enumerate(kinds)]
        batch = pack([sample for _, sample in made], self.config)
        return MadePack(batch, tuple(id for id, _ in made), tuple(self.names[kind] for kind in kinds))


def of_world(world: World, processor: Processor, *, seed: int) -> Maker:
    """The world's training split as conversations; what the assistant says is trained."""

    def make(index: int) -> tuple[str, Sample]:
        example = world(seed, index, "train")
        encoded = processor(example.messages, add_generation_prompt=False, targets="all")
        return example.id, encoded.sample

    return make


def of_text(token_T: Tensor, length: int, *, seed: int) -> Maker:
    """Windows of `length` tokens anywhere in one long text; every token is trained."""

    if len(token_T) < length:
        raise ValueError(f"the text has {len(token_T)} tokens, fewer than a window's {length}; give more text.")

    def make(index: int) -> tuple[str, Sample]:
        random = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
        start = int(random.integers(0, len(token_T) - length + 1))
        window_T = token_T[start : start + length].clone()
        return f"text/{start}", Sample(token_T=window_T, is_target_T=torch.ones(length, dtype=torch.bool))

    return make
