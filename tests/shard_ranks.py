"""Run by test_shards under torchrun: a rank saves a sharded model, reads its own part back into another, and tells what it read."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from memory_watch import MemoryWatch
from qvl.model.weights import Source
from qvl.parallel.data_parallel import World, join_world, leave_world, own_part
from qvl.train import checkpoint
from qvl.train.checkpoint import newest, restore_optimizer, restore_weights, save_run
from qvl.train.optimizer import Optimizer, OptimizerConfig

TABLE = (2**13, 2**12)
"""Of the frozen table: 128 MiB in fp32."""
TRAINED = {"even": (6, 4), "uneven": (7, 3), "fewer_rows_than_ranks": (2, 5), "one_number": (1,)}


class Parts(nn.Module):
    """A large frozen table, and trained parameters of every kind of split."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        rows = torch.arange(TABLE[0], dtype=torch.float32)[:, None]
        self.table = nn.Parameter((rows * factor).expand(TABLE).contiguous(), requires_grad=False)
        for number, (name, shape) in enumerate(TRAINED.items(), start=1):
            values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
            self.register_parameter(name, nn.Parameter(factor * (values + 100 * number)))


def sharded(factor: float, world: World) -> tuple[Parts, Optimizer]:
    model = Parts(factor)
    fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
    return model, Optimizer(model, OptimizerConfig(), world)


def parts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: own_part(x) for name, x in tensors.items()}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    world = join_world(torch.device("cpu"))
    model, optimizer = sharded(1.0, world)
    for master in optimizer.masters.values():
        master.grad = master.detach() * 0.01
    optimizer.step(1.0)
    frozen = save_run(out, 1, model, optimizer, {}, world, keep=1)
    weights, moments = parts(dict(model.named_parameters())), parts(optimizer.state())

    read, hashed, digest, get = dict[str, int](), list[str](), checkpoint._digest, Source.get

    def counted(self: Source, name: str, rows: slice | None = None) -> Tensor:
        tensor = get(self, name, rows)
        read[name] = read.get(name, 0) + tensor.nbytes
        return tensor

    def told(path: Path) -> str:
        hashed.append(path.name)
        return digest(path)

    Source.get, checkpoint._digest = counted, told  # type: ignore[method-assign]
    other, fresh = sharded(0.0, world)
    watch = MemoryWatch()
    with watch:
        saved = newest(out, world)
        assert saved is not None
        restore_weights(other, saved.weights)
    restore_optimizer(fresh, saved.optimizer)
    found: dict[str, Any] = {
        "rise": watch.rise,
        "read": dict(read),
        "held": {name: part.nbytes for name, part in (weights | moments).items()},
        "hashed": list(hashed),
        "is_same": all(torch.equal(part, weights[name]) for name, part in parts(dict(other.named_parameters())).items())
        and all(torch.equal(part, moments[name]) for name, part in parts(fresh.state()).items()),
    }

    # Back from a spike: what is frozen stays as it is in memory.
    read.clear()
    hashed.clear()
    with torch.no_grad():
        own_part(other.even).zero_()
        own_part(other.table).fill_(-1)
    again = newest(out, world, frozen=frozen)
    assert again is not None
    restore_weights(other, again.weights, only_trained=True)
    found["back"] = {
        "read": sorted(read),
        "hashed": list(hashed),
        "is_same": torch.equal(own_part(other.even), weights["even"]) and bool((own_part(other.table) == -1).all()),
        "is_other_frozen_refused": newest(out, world, frozen="another digest") is None,
    }
    (out / f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_world()
