"""Watchers of a run: every so many steps an evaluation, or a whole checkpoint folder to load elsewhere."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from qvl.core.files import writing
from qvl.core.log import JsonlWriter, log, read_jsonl
from qvl.model.lora import LoraLinear
from qvl.model.qwen3vl import Qwen3VL, empty_model
from qvl.model.weights import save
from qvl.parallel.data_parallel import World, whole
from qvl.train.loop import StepReport, Watcher


def evaluate_every(
    steps: int, model: Qwen3VL, evaluate: Callable[[Qwen3VL], Mapping[str, float]], out: Path, world: World
) -> Watcher:
    """Every `steps` steps and after the last one, `evaluate(model)` in eval mode: a line in out/eval.jsonl, and each number as
    eval/NAME for the watchers after this one.

    With several ranks rank 0 judges a whole copy while the others wait, so `evaluate` needs to know nothing of ranks.
    """
    _check(steps, "evaluations")

    def watch(report: StepReport) -> dict[str, float]:
        if not _is_due(report, steps):
            return {}
        judged = snapshot(model, world) if world.size > 1 else model
        found: dict[str, float] = {}
        if judged is not None:
            was_training = judged.training
            judged.eval()
            with torch.no_grad():
                found = {f"eval/{name}": float(value) for name, value in evaluate(judged).items()}
            judged.train(was_training)
            _write(out / "eval.jsonl", report.step, found)
        world.barrier()
        return found

    return watch


def export_every(
    steps: int,
    model: Qwen3VL,
    out: Path,
    world: World,
    *,
    companions: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Watcher:
    """Every `steps` steps `out/export-STEP`, a folder that transformers loads, adapters merged in. After the last step the caller writes
    its own. The newest stays, older ones stay too: they are for looking at what a run went through."""
    _check(steps, "exports")

    def watch(report: StepReport) -> None:
        if report.step % steps or report.step == report.steps:
            return
        folder = out / f"export-{report.step:08d}"
        copy = snapshot(model, world, dtype=dtype, device="cpu")
        if copy is not None:
            save(copy, folder, companions=companions)
            log.info("wrote %s", folder)
        world.barrier()

    return watch


@torch.no_grad()
def snapshot(
    model: Qwen3VL, world: World, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Qwen3VL | None:
    """A copy with whole weights and any adapter merged, on the world's device unless told otherwise; None on all ranks but the first,
    which must call this too.

    The model that trains stays as it is.
    """
    is_first = world.rank == 0
    copy = empty_model(model.config, dtype=dtype or model.dtype, device=device or world.device) if is_first else None
    targets = {} if copy is None else dict(copy.named_parameters())
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("lora_down", "lora_up"):
                continue
            full = whole(parameter.detach())
            if name == "weight" and isinstance(module, LoraLinear):
                full = _merged(module, full)
            if is_first:
                targets[f"{path}.{name}"].copy_(full)
    return None if copy is None else copy.eval()


def _merged(layer: LoraLinear, weight: torch.Tensor) -> torch.Tensor:
    """As `lora.merge` computes it."""
    if layer.merged is not None:
        return weight
    delta = (whole(layer.lora_up.detach()) @ whole(layer.lora_down.detach())) * layer.scale
    return (weight.to(delta.dtype) + delta).to(weight.dtype)


def _is_due(report: StepReport, steps: int) -> bool:
    return report.step % steps == 0 or report.step == report.steps


def _write(path: Path, step: int, found: Mapping[str, float]) -> None:
    """One line a step: lines of steps that are taken again, after a kill or a roll-back, give way."""
    kept = [row for row in read_jsonl(path) if row["step"] < step]
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as new, JsonlWriter(new) as rows:
        for row in (*kept, {"step": step, **found}):
            rows.write(row)


def _check(steps: int, what: str) -> None:
    if steps < 1:
        raise ValueError(f"{steps} steps between {what}; expected 1 or more, or leave the watcher out.")
