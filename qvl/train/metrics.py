"""What a run says of itself: one JSON line a step, averages over packs and ranks, speed against the machine's limit."""

import resource
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qvl.parallel.data_parallel import World
from qvl.train.objective import Micro, Outcome

# Dense bf16 matrix peak in FLOP/s, from the makers' data sheets (no sparsity).
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def averages(outcomes: Sequence[Outcome], world: World) -> dict[str, float]:
    """sum / count of every named quantity, over the step's packs on all ranks."""
    sums: dict[str, tuple[float, float]] = {}
    for found in _on_cpu(outcomes):
        for name, (total, count) in found.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + count)
    if world.size > 1:
        gathered: list[Any] = [None] * world.size
        torch.distributed.all_gather_object(gathered, sums)
        sums = {}
        for part in gathered:
            for name, (total, count) in part.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + total, before[1] + count)
    return {name: total / count for name, (total, count) in sorted(sums.items()) if count}


def _on_cpu(outcomes: Sequence[Outcome]) -> list[dict[str, tuple[float, float]]]:
    """The sums as numbers, those that lie on the device brought over in one message."""
    kept = [total for outcome in outcomes for total, _ in outcome.sums.values() if isinstance(total, Tensor)]
    read = iter(torch.stack([total.double() for total in kept]).tolist() if kept else ())
    return [
        {
            name: (next(read) if isinstance(total, Tensor) else total, count)
            for name, (total, count) in outcome.sums.items()
        }
        for outcome in outcomes
    ]


def work(micros: Sequence[Micro], seconds: float, pack_tokens: int | None, world: World) -> dict[str, float]:
    """What all ranks read in a step. The vision pre-stage has pictures and patches alone, language has tokens alone."""
    batches = [micro.batch for micro in micros]
    counts = (
        len(batches),
        sum(batch.num_tokens for batch in batches),
        sum(len(batch.frame_lengths) for batch in batches),
        sum(sum(batch.frame_lengths) for batch in batches),
    )
    total = world.sum_tensor(torch.tensor(counts, dtype=torch.float64, device=world.device))
    packs, tokens, frames, patches = total.tolist()
    values = {"tokens": tokens, "frames": frames, "patches": patches}
    values |= {"tokens_per_second": tokens / seconds, "patches_per_second": patches / seconds}
    if pack_tokens is not None:
        values["fill"] = tokens / (packs * pack_tokens)
    return values


def peak_flops(device: torch.device) -> float | None:
    """The denominator of MFU; None on a CPU or an unknown GPU, whose peak must be given."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def memory_bytes(device: torch.device) -> int:
    """Highest memory held so far: the device's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
