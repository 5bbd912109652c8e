"""A watcher of a run: every so many steps a whole checkpoint folder to load elsewhere."""

from pathlib import Path

import torch

from qvl.core.log import log
from qvl.model.lora import LoraLinear
from qvl.model.qwen3vl import Qwen3VL, empty_model
from qvl.model.weights import save
from qvl.parallel.data_parallel import World, whole
from qvl.train.loop import StepReport, Watcher


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
    if steps < 1:
        raise ValueError(f"{steps} steps between exports; expected 1 or more, or leave the watcher out.")

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
