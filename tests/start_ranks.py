"""Run by test_shards under torchrun: opens folders without storage, shards, reads this rank's rows, and compares with a whole load."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qvl.model.lora import LoraConfig, add_adapter
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import Source, load, load_empty
from qvl.parallel.data_parallel import World, fill_shards, join_world, leave_world, own_part, own_rows, shard
from qvl.train.objective import NextToken
from qvl.train.parameters import Rates, freeze
from test_train import Pack, pack, sample


def adapted(model: Qwen3VL) -> NextToken:
    add_adapter(model, LoraConfig(r=3))
    freeze(model, Rates())
    return NextToken(model)


def loss(objective: NextToken, world: World) -> float:
    tokens = sample(torch.Generator().manual_seed(1), 9, picture=False)
    micro = Pack(pack([tokens], objective.model.config), ("",), ("",))
    with torch.no_grad():
        return float(objective.eval()(objective.prepare(micro), 1.0, world).loss)


def compared(folder: Path, world: World) -> dict[str, Any]:
    whole = adapted(load(folder))
    read, get = dict[str, int](), Source.get

    def counted(self: Source, name: str, rows: slice | None = None) -> Tensor:
        tensor = get(self, name, rows)
        read[name] = read.get(name, 0) + tensor.nbytes
        return tensor

    Source.get = counted  # type: ignore[method-assign]
    try:
        objective = adapted(load_empty(folder))
        read_before = sum(read.values())
        shard([objective.model], objective, world)
        fill_shards(objective.model, objective, folder, world)
    finally:
        Source.get = get  # type: ignore[method-assign]
    parts = dict(objective.named_parameters())
    expected = {name: p.detach()[own_rows(parts[name]) or slice(None)] for name, p in whole.named_parameters()}
    found = {
        "read_before": read_before,
        "read": sum(read.values()),
        "held": sum(own_part(p).nbytes for name, p in parts.items() if ".lora_" not in name),
        "differ": [name for name, p in parts.items() if not torch.equal(own_part(p), expected[name])],
        "losses": [loss(whole, world), loss(objective, world)],
    }
    shard([objective.model], objective, world)
    found["is_sharded"] = all(isinstance(p, DTensor) for p in objective.parameters())
    return found


def main(out: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    world = join_world(torch.device("cpu"))
    found = [compared(folder, world) for folder in folders]
    (out / f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(map(Path, sys.argv[2:])))
    leave_world()
