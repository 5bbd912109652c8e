"""What a run says of itself: one JSON line a step, averages over packs and ranks, speed against the machine's limit."""

import resource
from collections.abc import Sequence
from typing import Any

import torch

from qvl.model.config import ModelConfig
from qvl.model.flops import forward_flops
from qvl.parallel.data_parallel import World
from qvl.train.objective import Micro, Outcome

# Dense bf16 matrix peak in FLOP/s, from the makers' data sheets (no sparsity).
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def averages(outcomes: Sequence[Outcome], world: World) -> dict[str, float]:
    """sum / count of every named quantity, over the step's packs on all ranks."""
    sums: dict[str, tuple[float, float]] = {}
    for outcome in outcomes:
        for name, (total, count) in outcome.sums.items():
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


def step_flops(micros: Sequence[Micro], config: ModelConfig) -> int:
    """FLOPs of this rank's step: vision tower, decoder and head, forward and backward, as if no part were frozen."""
    total = 0
    for micro in micros:
        targets = None if micro.batch.is_target_T is None else int(micro.batch.is_target_T.sum())
        total += forward_flops(config, micro.batch.lengths, micro.batch.frame_lengths, num_logits=targets).training
    return total


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
