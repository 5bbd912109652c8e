"""A rank reads its own shards: of every sharded tensor the rows that it holds, and each file is hashed once, by rank 0."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qvl.finetune.config import Tune
from qvl.finetune.tune import reads_shards
from qvl.model.config import ModelConfig
from qvl.model.qwen3vl import new_model
from qvl.model.weights import load, load_empty, save
from qvl.parallel.data_parallel import World, own_rows
from qvl.train.checkpoint import newest
from shard_ranks import TABLE, TRAINED
from test_data_parallel import run
from test_train import small
from tests.golden import LAYOUTS

HERE = Path(__file__).parent
TABLE_BYTES = 4 * prod(TABLE)


def told(out: Path, ranks: int, script: str, *more: Path) -> list[Any]:
    """What each rank wrote down."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(HERE / script), str(out), *map(str, more)], cwd=HERE, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_reads_the_rows_it_holds_and_no_more(tmp_path: Path, ranks: int) -> None:
    found = told(tmp_path, ranks, "shard_ranks.py")
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


def with_experts(num_experts: int) -> ModelConfig:
    """Expert matrices that are not square, so that their shape tells the layout."""
    config = small(experts=True)
    moe = config.text.moe
    assert moe is not None
    moe = replace(moe, num_experts=num_experts, intermediate_size=24)
    return replace(config, text=replace(config.text, moe=moe))


def test_a_start_from_a_folder_reads_the_rows_a_rank_holds_whatever_the_layout(tmp_path: Path) -> None:
    """Fused experts in both orientations, separate ones, a Conv3d kernel; an adapter that is there before the weights keeps its values."""
    for layout in LAYOUTS:
        save(new_model(with_experts(8)), tmp_path / layout, layout=layout)
    save(new_model(replace(with_experts(5), vision=None)), tmp_path / "text")
    folders = [tmp_path / name for name in ("text", *LAYOUTS)]
    ranks = told(tmp_path, 2, "start_ranks.py", *folders)
    for number, folder in enumerate(folders):
        stored = sum(p.nbytes for p in load(folder).parameters())
        for found in (rank[number] for rank in ranks):
            assert found["differ"] == [], folder.name
            assert found["read_before"] == 0, "the checks read no weights"
            assert found["read"] == found["held"] < 0.6 * stored
            assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-5)
            assert found["is_sharded"], "an evaluation's gathered weights are given up before the optimizer is made"
        assert sum(rank[number]["read"] for rank in ranks) == stored


def test_a_folder_is_refused_before_anything_is_read_as_a_whole_load_refuses_it(tmp_path: Path) -> None:
    save(new_model(small()), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.language_model.norm.weight"
    for changed, said in (
        ({name: torch.ones(3)}, "with shape"),
        ({name: torch.ones(64, dtype=torch.int32)}, "expected a floating-point type"),
        ({"odd": torch.ones(1)}, "does not know, the first odd"),
    ):
        save_file(tensors | changed, tmp_path / "model" / "model.safetensors")
        for opened in (load, load_empty):
            with pytest.raises(ValueError, match=said):
                opened(tmp_path / "model")


def test_ranks_read_shards_unless_whole_weights_are_asked_for() -> None:
    two = World(0, 2, torch.device("cpu"))
    two_replicas, alone = replace(two, replicates=True), World(0, 1, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "sum", lambda self, value: value)
        run = Tune(model="m", data=Path("d.yaml"), out=Path("o"))
        assert reads_shards(run, two, False)
        assert not reads_shards(run, two, True), "the model writes its replay first"
        assert not reads_shards(run, two_replicas, False) and not reads_shards(run, alone, False)
