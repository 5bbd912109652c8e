"""A run: an objective, its stream, which parts learn at what rate for how many steps, and what must hold at its end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from qvl.parallel.data_parallel import World
from qvl.train.loop import LoopConfig, Stream, Watcher, fit
from qvl.train.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Expect:
    """One thing that a recipe says its run will reach."""

    name: str
    """Of a number that is measured at the end."""
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"expect {self.name!r} has no bound; give at_least, at_most or both.")

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "at most": self.at_most}
        return f"{self.name} {' and '.join(f'{word} {x:g}' for word, x in bounds.items() if x is not None)}"

    def is_met(self, value: float) -> bool:
        """A value that is no number (nan) meets nothing."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)


def judged(expect: Sequence[Expect], found: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each expectation, what was measured (None: nothing was), and whether it is met; as JSON."""
    return [
        {"expect": str(one), "got": found.get(one.name), "is_met": one.name in found and one.is_met(found[one.name])}
        for one in expect
    ]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Model x stream x objective x what is trainable, and its steps."""

    objective: Objective
    """Holds the model."""
    stream: Stream
    loop: LoopConfig
    """Its steps; its optimizer's rates say which parts learn."""
    out: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else decides the numbers: a resume under other ones is refused."""
    expect: tuple[Expect, ...] = ()

    def fit(
        self,
        world: World,
        watchers: Sequence[Watcher] = (),
        *,
        stop_after: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> int:
        """From the newest checkpoint in `out`, or from the start; the step that was reached. See `qvl.train.loop.fit`."""
        assert isinstance(self.objective, nn.Module)
        return fit(
            self.objective,
            self.stream,
            self.loop,
            self.out,
            world,
            watchers=watchers,
            stop_after=stop_after,
            should_stop=should_stop,
            settings=self.settings,
        )
