"""qvl ablate: one switch on and off, several seeds, the probe where it should show, and what these seeds could have seen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from qvl.recipes.ablate.catalogue import ABLATIONS
from qvl.recipes.ablate.report import show, write_report
from qvl.recipes.ablate.runner import run_ablation, steps_within


@dataclass(frozen=True, kw_only=True)
class Ablate:
    """Trains a toy from the same weights on the same examples once for each arm and seed, and compares the arms seed by seed.

    mrope: interleaved rotary axes against one block for each. timestamps: times as text against times in the rotary ids. deepstack: middle
    vision levels with and without. loss: weights n^-p with p = 0, .5, 1. v0: with and without a vision pre-stage.

    "No difference seen at this size" is a result: the report says which difference would have been seen. A stopped ablation goes on where
    it was when the same command is given again; more seeds may be added later.
    """

    name: Annotated[Literal["mrope", "timestamps", "deepstack", "loss", "v0"], tyro.conf.Positional]
    seeds: int = 3
    steps: int | None = None
    """Optimizer steps of a run; left out, each ablation's own. Runs are counted in steps so that they can be had again."""
    minutes_per_run: float | None = None
    """Instead of --steps: as many steps as fit on this machine now; measured once, kept in --out."""
    threads: int = 2
    out: Path | None = None
    """Where rows.jsonl, report.json and report.html go; left out, runs/ablate/NAME."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.threads < 1:
            raise ValueError(f"seeds is {self.seeds} and threads is {self.threads}; both are at least 1")
        if self.steps is not None and self.minutes_per_run is not None:
            raise ValueError("--steps and --minutes-per-run both say how long a run is; give one of them")
        if self.steps is not None and self.steps < 2:
            raise ValueError(f"steps is {self.steps}; give at least 2")
        if self.minutes_per_run is not None and self.minutes_per_run <= 0:
            raise ValueError(f"minutes_per_run is {self.minutes_per_run}; give more than 0")


def run(args: Ablate) -> None:
    console = Console()
    torch.set_num_threads(args.threads)
    ablation, out = ABLATIONS[args.name], args.out or Path("runs/ablate") / args.name

    def tell(line: str) -> None:
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    console.print(f"[bold]{ablation.question}[/bold]\n{ablation.expectation}")
    if args.minutes_per_run is not None:
        steps = steps_within(ablation, args.minutes_per_run, out, tell=tell)
    else:
        steps = args.steps or ablation.steps
    rows = run_ablation(ablation, out, seeds=args.seeds, steps=steps, tell=tell)
    show(write_report(ablation, rows, out), console)
    console.print(f"{out / 'report.html'} shows every seed")
