"""A rank reads its own shards: of every sharded tensor the rows that it holds, and each file is hashed once, by rank 0."""

import json
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl.parallel.data_parallel import own_rows
from qvl.train.checkpoint import newest
from shard_ranks import TABLE, TRAINED
from test_data_parallel import run

HERE = Path(__file__).parent
TABLE_BYTES = 4 * prod(TABLE)


def told(out: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank wrote down."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(HERE / "shard_ranks.py"), str(out)], cwd=HERE, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_reads_the_rows_it_holds_and_no_more(tmp_path: Path, ranks: int) -> None:
    found = told(tmp_path, ranks)
    assert all(one["is_same"] for one in found)
    for one in found:
        assert one["read"] == one["held"]
        # The rows that were read are mapped beside the parameter; a whole table would be more.
        assert one["rise"] < 0.75 * TABLE_BYTES, f"{one['rise']:,} bytes for a part of {TABLE_BYTES:,}"
    assert sum(one["read"]["table"] for one in found) == TABLE_BYTES
    rows = [one["read"]["fewer_rows_than_ranks"] // (4 * TRAINED["fewer_rows_than_ranks"][1]) for one in found]
    assert rows == [1, 1, 0][:ranks]
    assert [one["read"]["exp_avg/one_number"] for one in found] == [4, 0, 0][:ranks]

    files = ["frozen.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors"]
    assert sorted(found[0]["hashed"]) == files, "each file once"
    assert not any(one["hashed"] for one in found[1:]), "the others take rank 0's word"

    for one in found:
        assert one["back"]["read"] == sorted(TRAINED) and one["back"]["is_same"], "what is frozen is not read again"
        assert one["back"]["is_other_frozen_refused"]
    assert sorted(found[0]["back"]["hashed"]) == files[1:]


def test_what_is_not_sharded_is_read_whole() -> None:
    assert own_rows(torch.zeros(4, 2)) is None


def tensors(out: Path) -> dict[str, Tensor]:
    saved = newest(out)
    assert saved is not None
    return {**saved.weights, **saved.optimizer}


def test_two_ranks_that_resume_end_to_the_bit_where_two_that_never_stopped_do(tmp_path: Path) -> None:
    run(tmp_path / "straight", 2, 3, every=2)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "step-00000003")
    run(tmp_path / "resumed", 2, 3, every=2)
    straight, resumed = tensors(tmp_path / "straight"), tensors(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_a_checkpoint_of_one_rank_goes_on_in_two_and_back_in_one(tmp_path: Path) -> None:
    run(tmp_path / "straight", 1, 3, every=1)
    run(tmp_path / "moved", 1, 3, every=1)
    for ranks in (2, 1):
        shutil.rmtree(tmp_path / "moved" / "step-00000003")
        run(tmp_path / "moved", ranks, 3, every=1)
    straight, moved = tensors(tmp_path / "straight"), tensors(tmp_path / "moved")
    for name, tensor in straight.items():
        torch.testing.assert_close(moved[name], tensor, atol=2e-5, rtol=1e-4, msg=name)
