"""Data parallelism: each rank sees its own packs and holds a shard of every parameter (FSDP2), or all of a small model."""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from qvl.core.device import place
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import Source, fill


@dataclass(frozen=True)
class World:
    """The ranks that train together; one rank without torchrun."""

    rank: int
    size: int
    device: torch.device
    replicates: bool = False
    """Each rank holds the whole model: for models so small that gathering their shards costs more than computing with them."""

    @property
    def has_replicas(self) -> bool:
        return self.replicates and self.size > 1

    def sum(self, value: float) -> float:
        """Over all ranks, in fp64."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def sum_tensor(self, value: Tensor) -> Tensor:
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def from_first(self, value: str | None) -> str | None:
        """What rank 0 gives, on all ranks."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, device=self.device)
        return held[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join_world(device: torch.device, *, replicates: bool = False) -> World:
    """Meet the other ranks that torchrun started; alone when it did not."""
    here = place()
    if here.world_size == 1:
        return World(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Ranks wait for the first one's disk: a checkpoint of hundreds of GB takes longer than NCCL's ten minutes.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return World(here.rank, here.world_size, device, replicates)


def leave_world(code: int = 0) -> None:
    """What a rank calls last: meet the others, part, and end this process with `code`. Without other ranks it does nothing.

    The process ends at once, past C++'s own clean-up: with gloo that aborts now and then after Python is gone ("terminate called without
    an active exception", 1 of 18 exits on a busy machine, torch 2.13), and torchrun then calls a finished run failed.
    """
    if not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def shard(models: Sequence[Qwen3VL], root: nn.Module, world: World) -> None:
    """Shard every block of the models, then `root`, the module whose forward is called. A lone rank stays as it is; replicas get rank 0's
    weights. What is sharded already stays so, and what an evaluation gathered is given up again.

    Gradients are summed in fp32, not averaged: the loss already has the global denominator.
    """
    if world.size == 1:
        return
    if world.replicates:
        for tensor in (*root.parameters(), *root.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        return
    if isinstance(root, FSDPModule):
        root.reshard()
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    blocks: list[nn.Module] = []
    for model in models:
        blocks += model.language_model.layers
        if model.config.vision is not None:
            blocks += [*model.visual.blocks, model.visual.merger, *model.visual.deepstack_merger_list]
    units = [fully_shard(block, mesh=mesh, mp_policy=policy) for block in blocks]
    units.append(fully_shard(root, mesh=mesh, mp_policy=policy))
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


@torch.no_grad()
def fill_shards(model: Qwen3VL, root: nn.Module, folder: Path, world: World) -> None:
    """Give a model that was sharded on the meta device its storage, and read the rows that this rank holds from the folder it was opened
    from. What else `root` holds (an adapter) keeps its values."""
    others = {name: part.clone() for name, p in root.named_parameters() if not (part := own_part(p)).is_meta}
    root.to_empty(device=world.device)
    for name, parameter in root.named_parameters():
        if name in others:
            own_part(parameter).copy_(others[name])
    fill(model, Source(folder), own=lambda parameter: (own_part(parameter), own_rows(parameter)))


def sum_over_replicas(masters: Iterable[Tensor], world: World) -> None:
    """Add the ranks' fp32 gradients in one message; where a rank did not reach a parameter it counts as zero. Shards are summed already."""
    if not world.has_replicas:
        return
    masters = list(masters)
    flat = torch.cat([(torch.zeros_like(m) if m.grad is None else m.grad).flatten() for m in masters])
    dist.all_reduce(flat)
    for master, part in zip(masters, flat.split([m.numel() for m in masters]), strict=True):
        master.grad = part.view_as(master)


def from_owners(tensors: Sequence[Tensor], owners: Sequence[int], world: World) -> list[Tensor]:
    """Each tensor as the rank that owns it holds it, to the bit, in one message: the other ranks add zeros."""
    flat = torch.cat(
        [
            (t if owner == world.rank else torch.zeros_like(t)).flatten()
            for t, owner in zip(tensors, owners, strict=True)
        ]
    )
    dist.all_reduce(flat)
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def whole(x: Tensor) -> Tensor:
    """The unsharded tensor (every rank must call this together)."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_rows(x: Tensor) -> slice | None:
    """The rows of a sharded tensor that this rank holds, by FSDP2's rule; None where it holds all of them.

    N ranks get ceil(rows / N) each, the last ones what is left, which may be fewer or none.
    """
    if not isinstance(x, DTensor):
        return None
    assert x.placements == (Shard(0),), f"expected a tensor sharded by rows, got {x.placements}"
    each = -(-x.shape[0] // x.device_mesh.size())
    first = min(x.device_mesh.get_local_rank() * each, x.shape[0])
    return slice(first, min(first + each, x.shape[0]))


def own_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, with the same memory and without gradient."""
    return x.to_local().detach() if isinstance(x, DTensor) else x.detach()


def from_part(part: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded as `like` is, of which this rank holds `part`; `part` itself where nothing is sharded. On the device of `like`."""
    part = part.to(like.device)
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def total_norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm over all parameters and ranks, fp32, 0-d."""
    return whole(torch.nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())
