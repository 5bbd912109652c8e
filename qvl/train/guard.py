"""Steps that must not be taken: losses or gradients that are not finite, or far outside what the run has shown so far."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class SpikeGuard:
    """Running mean and deviation of the log of the gradient norm; a step `sigmas` above the mean is refused.

    The first `warmup` steps are only watched. A refused step does not enter the statistics.
    """

    sigmas: float = 6.0
    warmup: int = 50
    decay: float = 0.98
    count: int = 0
    mean: float = 0.0
    square: float = 0.0
    in_a_row: int = 0

    def refuses(self, loss: float, norm: float) -> str | None:
        """Why the step must not be taken, or None; takes note of it either way."""
        reason = self._reason(loss, norm)
        self.in_a_row = 0 if reason is None else self.in_a_row + 1
        if reason is None and norm > 0:
            weight = max(1 - self.decay, 1 / (self.count + 1))
            value = math.log(norm)
            self.mean += weight * (value - self.mean)
            self.square += weight * (value * value - self.square)
            self.count += 1
        return reason

    def _reason(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        # A floor of 5% on the deviation: a run whose norm hardly moves must not trip over a ripple.
        deviation = max(0.05, math.sqrt(max(0.0, self.square - self.mean**2)))
        if self.count >= self.warmup and norm > 0 and math.log(norm) > self.mean + self.sigmas * deviation:
            usual = math.exp(self.mean)
            return f"the gradient norm is {norm:.3g}, {self.sigmas:g} deviations above the usual {usual:.3g}"
        return None

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "square": self.square, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        self.count, self.mean = state["count"], state["mean"]
        self.square, self.in_a_row = state["square"], state["in_a_row"]
