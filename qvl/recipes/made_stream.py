"""Training packs straight from the worlds, without files: step n follows from the seed and n alone."""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from qvl.core.batch import Batch
from qvl.model.config import ModelConfig
from qvl.model.pack import pack
from qvl.prompt.processor import Processor
from qvl.worlds.world import Example, World


@dataclass(frozen=True)
class WorldPack:
    batch: Batch
    ids: tuple[str, ...]
    categories: tuple[str, ...]


class WorldStream:
    """Each step draws `samples` examples, world by weight, and packs them into one Batch. The state is the step's number."""

    def __init__(
        self,
        worlds: Mapping[str, tuple[World, float]],
        processor: Processor,
        config: ModelConfig,
        *,
        samples: int,
        seed: int,
        ahead: int = 2,
    ) -> None:
        """`ahead` steps are made in a thread while the model trains; order and content do not depend on it."""
        self.worlds = list(worlds.items())
        self.processor, self.config, self.samples, self.seed = processor, config, samples, seed
        total = sum(weight for _, (_, weight) in self.worlds)
        self.shares = np.cumsum([weight / total for _, (_, weight) in self.worlds])
        self.step = 0
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[WorldPack]] = deque()

    def next_step(self) -> Sequence[WorldPack]:
        while len(self._waiting) <= self._ahead:
            self._waiting.append(self._pool.submit(self._make, self.step + len(self._waiting)))
        self.step += 1
        return [self._waiting.popleft().result()]

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "seed": self.seed}

    def restore(self, state: dict[str, Any]) -> None:
        if state["seed"] != self.seed:
            raise ValueError(
                f"the checkpoint's stream has seed {state['seed']}, this one {self.seed}; resume with the same seed."
            )
        self.step = state["step"]
        self._waiting.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make(self, step: int) -> WorldPack:
        drawn = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64))).random(
            self.samples
        )
        examples: list[tuple[str, Example]] = []
        for place, number in enumerate(drawn):
            label, (world, _) = self.worlds[
                int(np.searchsorted(self.shares, number, side="right").clip(0, len(self.worlds) - 1))
            ]
            examples.append((label, world(self.seed, step * self.samples + place, "train")))
        samples = [
            self.processor(example.messages, add_generation_prompt=False, targets="all").sample
            for _, example in examples
        ]
        batch = pack(samples, self.config)
        return WorldPack(batch, tuple(e.id for _, e in examples), tuple(label for label, _ in examples))
