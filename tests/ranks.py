"""Run by test_data_parallel, test_watch (under torchrun) and test_kill: trains a small model on this rank's share of fixed packs."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from qvl.model.qwen3vl import new_model
from qvl.parallel.data_parallel import join_world, leave_world
from qvl.train.loop import fit
from qvl.train.objective import NextToken
from qvl.train.watch import export_every
from test_train import Drawn, Pack, Taught, settings, small


class Share(Drawn):
    """All packs of a step, dealt by rank; with `text_only`, samples are dealt so that the last rank never sees a picture."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(small(), packs=4)
        self.rank, self.size = rank, size

    def next_step(self) -> Sequence[Pack]:
        packs = super().next_step()  # pictures in packs 0 and 2, text alone in 1 and 3
        return packs[self.rank :: self.size]


def main(
    out: Path,
    steps: int,
    checkpoint_every: int = 0,
    is_checkpointed: int = 0,
    watch_every: int = 0,
    replicates: int = 0,
    is_muon: int = 0,
    is_taught: int = 0,
) -> None:
    """`is_checkpointed`: activations are made again in the backward pass. `watch_every`: steps between exports.
    `replicates`: each rank holds the whole model. `is_muon`: its matrices learn by Muon. `is_taught`: it learns
    from a frozen teacher, which sees its images too."""
    torch.set_num_threads(1)
    world = join_world(torch.device("cpu"), replicates=bool(replicates))
    model = new_model(small(), seed=world.rank if world.replicates else 0)
    stream = Share(world.rank, world.size)
    is_saving = bool(is_checkpointed)
    config = settings(
        steps,
        checkpoint_every=checkpoint_every,
        checkpoint_vision=is_saving,
        checkpoint_decoder=is_saving,
        optimizer={"name": "muon"} if is_muon else {},
    )
    watchers = []
    if watch_every:
        watchers = [export_every(watch_every, model, out, world)]
    see_always = world.size > 1 and not world.replicates
    objective = NextToken(model, see_always=see_always)
    if is_taught:
        objective = Taught(model, new_model(small(), seed=9), see_always=see_always)
    fit(
        objective,
        stream,
        config,
        out,
        world,
        watchers=watchers,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    leave_world()
