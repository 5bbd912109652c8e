"""Every seed trains every arm from the same weights on the same examples; finished runs are rows and are not trained again."""

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvl.core.log import JsonlWriter, log, read_jsonl
from qvl.model.qwen3vl import Qwen3VL
from qvl.recipes.ablate.ablation import Ablation, Material, Trained
from qvl.recipes.ablate.arm import Arm, config_of
from qvl.recipes.ablate.toy import toy_config, toy_model
from qvl.recipes.made_stream import ALONE, MadeStream
from qvl.train.loop import LoopConfig, StepReport, Watcher, fit
from qvl.train.objective import NextToken
from qvl.train.optimizer import OptimizerConfig
from qvl.train.parameters import Rates
from qvl.train.schedule import Schedule

Row = dict[str, Any]
Told = Callable[[str], None]


def run_ablation(ablation: Ablation, out: Path, *, seeds: int, steps: int, tell: Told = log.info) -> list[Row]:
    """The rows of all arms and seeds, in `out/rows.jsonl` too. A folder belongs to one ablation and one number of steps."""
    _keep_plan(out, {"ablation": ablation.name, "steps": steps, "samples": ablation.samples})
    path = out / "rows.jsonl"
    rows = [row for row in read_jsonl(path) if row["seed"] < seeds and row["arm"] in ablation.arms]
    done = {(row["arm"], row["seed"]) for row in rows}
    wanted = [(name, seed) for seed in range(seeds) for name in ablation.arms if (name, seed) not in done]
    if not wanted:
        return rows
    material = ablation.prepare()
    for number, (name, seed) in enumerate(wanted, 1):
        tell(f"run {number} of {len(wanted)}: {name}, seed {seed}")
        row = run_arm(ablation, name, material, out, seed=seed, steps=steps, tell=tell)
        with JsonlWriter(path) as file:
            file.write(row)
        for checkpoint in (out / f"{name}-{seed}").rglob("step-*"):  # the row is what stays
            shutil.rmtree(checkpoint)
        rows.append(row)
    return rows


def run_arm(
    ablation: Ablation, name: str, material: Material, out: Path, *, seed: int, steps: int, tell: Told = log.info
) -> Row:
    """Train one arm from the seed's weights and judge it by every probe."""
    folder, arm, start = out / f"{name}-{seed}", ablation.arms[name], time.perf_counter()
    model = trained(ablation, arm, material, folder, seed=seed, steps=steps, watchers=[_telling(tell)])
    seconds = time.perf_counter() - start
    run = Trained(model=model, material=material, arm=arm, seed=seed)
    probes = {label: probe.measure(run) for label, probe in ablation.probes.items()}
    tell("  " + ", ".join(f"{label} {value:.3f}" for label, value in probes.items()))
    losses = read_jsonl(folder / "log.jsonl")
    known = [row["loss"] for row in losses if row["loss"] is not None]  # null: a step refused for its loss
    return {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "loss": statistics.fmean(known[-10:]) if known else None,
        "skipped_steps": sum("skipped" in row for row in losses),
        "probes": probes,
    }


def trained(
    ablation: Ablation,
    arm: Arm,
    material: Material,
    folder: Path,
    *,
    seed: int,
    steps: int,
    watchers: list[Watcher] | None = None,
) -> Qwen3VL:
    """The arm's network after `steps` steps, those of its pre-stage included."""
    model = start(arm, material, seed=seed)
    left = steps
    if arm.pre_stage and ablation.pre_stage is not None:
        left -= ablation.pre_stage(model, material, seed, steps, folder / "pre_stage", ablation.samples)
    makers = ablation.learn(material, arm, seed)
    stream = MadeStream(makers, model.config, samples=ablation.samples, seed=seed)
    try:
        objective = NextToken(model, power=arm.power)
        fit(objective, stream, loop_config(left, ablation.lr, seed=seed), folder, ALONE, watchers=watchers or [])
    finally:
        stream.close()
    return model


def start(arm: Arm, material: Material, *, seed: int) -> Qwen3VL:
    """The seed's weights; two arms of a seed begin equal in all parameters that both have."""
    return toy_model(config_of(arm, toy_config(material.processor.tokenizer)), seed=seed)


def loop_config(steps: int, lr: float, *, seed: int, rates: Rates | None = None) -> LoopConfig:
    return LoopConfig(
        steps=steps,
        optimizer=OptimizerConfig(name="muon", lr=lr, weight_decay=0.02, rates=rates or Rates()),
        schedule=Schedule(kind="wsd", warmup_steps=min(20, max(1, steps // 10)), decay_part=0.4, final=0.05),
        seed=seed,
    )


def steps_within(ablation: Ablation, minutes: float, out: Path, *, tell: Told = log.info) -> int:
    """How many steps of the slowest arm fit into so many minutes here and now. Measured once; `out` then keeps the number."""
    plan = _plan(out)
    if plan is not None:
        return plan["steps"]
    material, folder = ablation.prepare(), out / "timing"
    slowest = 0.0
    for arm in ablation.arms.values():
        shutil.rmtree(folder, ignore_errors=True)
        seconds: list[float] = []
        watchers: list[Watcher] = [lambda report, kept=seconds: kept.append(report.values["seconds"])]
        trained(ablation, arm, material, folder, seed=0, steps=8, watchers=watchers)
        slowest = max(slowest, statistics.median(seconds[-4:]))
    shutil.rmtree(folder)
    steps = math.floor(60 * minutes / slowest)
    least = "; fewer than ten say nothing, so ten are taken" if steps < 10 else ""
    tell(f"a step takes {slowest:.3f} s, so {minutes:g} minutes a run are {steps} steps{least}")
    return max(10, steps)


def _plan(out: Path) -> dict[str, Any] | None:
    path = out / "plan.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _keep_plan(out: Path, plan: dict[str, Any]) -> None:
    before = _plan(out)
    if before not in (None, plan):
        raise ValueError(
            f"{out} holds runs of {before}, asked is {plan}; rows of the two cannot be compared. Give another folder."
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(plan) + "\n", encoding="utf-8")


def _telling(tell: Told) -> Watcher:
    def watch(report: StepReport) -> None:
        if report.step % 50 == 0 or report.step == report.steps:
            tell(f"  step {report.step}/{report.steps}, loss {report.values['loss']:.3f}")

    return watch
