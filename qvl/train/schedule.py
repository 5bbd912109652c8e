"""The learning rate over a run: warm-up, then cosine, or warm-up, stay, decay."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    final: float = 0.1
    """Last rate, as a part of the highest."""
    decay_part: float = 0.2
    """Part of the run over which WSD decays, at its end."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.final <= 1 or not 0 < self.decay_part <= 1:
            raise ValueError(
                f"the schedule has warmup_steps {self.warmup_steps}, final {self.final}, decay_part {self.decay_part}; "
                "expected warmup_steps >= 0, final between 0 and 1, decay_part above 0 and at most 1."
            )

    def at(self, step: int, steps: int) -> float:
        """Factor on the rate at `step` of `steps`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.kind == "cosine":
            progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        decay_steps = max(1, round(steps * self.decay_part))
        left = max(0, steps - step)
        return self.final + (1 - self.final) * min(1.0, left / decay_steps)
