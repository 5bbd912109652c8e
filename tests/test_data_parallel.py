"""Two ranks are one: the same losses and weights, also when one rank never sees a picture."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvl.core.log import read_jsonl
from qvl.data.deal import deal
from qvl.train.checkpoint import newest
from qvl.train.optimizer import shared_out

HERE = Path(__file__).parent


def run(
    out: Path,
    ranks: int,
    steps: int,
    *,
    replicates: bool = False,
    muon: bool = False,
    every: int = 0,
    taught: bool = False,
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [
            *command,
            str(HERE / "ranks.py"),
            *map(str, (out, steps, every, 0, 0, int(replicates), int(muon), int(taught))),
        ],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run(one, 1, 3)
    run(two, 2, 3)
    return one, two


def test_a_rank_without_pictures_does_not_hang_and_the_losses_are_those_of_one_rank(
    outcomes: tuple[Path, Path],
) -> None:
    losses = [[row["loss"] for row in read_jsonl(out / "log.jsonl")] for out in outcomes]
    norms = [[row["grad_norm"] for row in read_jsonl(out / "log.jsonl")] for out in outcomes]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_the_weights_after_three_sharded_steps_are_those_of_one_rank(outcomes: tuple[Path, Path]) -> None:
    one, two = (newest(out) for out in outcomes)
    assert one is not None
    assert two is not None
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, atol=2e-5, rtol=1e-4, msg=name)


def test_a_frozen_teacher_that_sees_is_sharded_and_no_rank_waits_for_an_image(tmp_path: Path) -> None:
    """The second rank never sees an image, and its teacher has a vision encoder as its student has."""
    logs = []
    for ranks in (1, 2):
        run(tmp_path / str(ranks), ranks, 2, taught=True)
        logs.append(read_jsonl(tmp_path / str(ranks) / "log.jsonl"))
    for name, rel in (("loss", 1e-6), ("grad_norm", 1e-4)):
        assert [row[name] for row in logs[1]] == pytest.approx([row[name] for row in logs[0]], rel=rel)
    assert logs[0][0]["loss"] != logs[0][1]["loss"]
    one, two = newest(tmp_path / "1"), newest(tmp_path / "2")
    assert one is not None and two is not None
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, atol=2e-5, rtol=1e-4, msg=name)


def test_replicas_begin_with_rank_0s_weights_and_stay_one_model(outcomes: tuple[Path, Path], tmp_path: Path) -> None:
    """Each rank draws other weights first; the second never sees a picture, so its tower has no gradient of its own."""
    run(tmp_path, 2, 3, replicates=True)
    losses = [[row["loss"] for row in read_jsonl(out / "log.jsonl")] for out in (outcomes[0], tmp_path)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    one, two = newest(outcomes[0]), newest(tmp_path)
    assert one is not None and two is not None
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, atol=2e-5, rtol=1e-4, msg=name)


def test_replicas_share_out_muons_matrices_and_a_run_of_theirs_goes_on_alone(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, 1, 2, muon=True)
    run(two, 2, 2, replicates=True, muon=True)
    alone, shared = newest(one), newest(two)
    assert alone is not None and shared is not None
    assert shared.optimizer.keys() == alone.optimizer.keys()
    for name, moment in alone.optimizer.items():
        torch.testing.assert_close(shared.optimizer[name], moment, atol=1e-5, rtol=1e-3, msg=name)
    run(one, 1, 3, muon=True)
    run(two, 1, 3, muon=True)
    losses = [[row["loss"] for row in read_jsonl(out / "log.jsonl")] for out in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@given(costs=st.lists(st.integers(1, 5000), min_size=1, max_size=40), ranks=st.integers(1, 5))
def test_every_piece_is_dealt_once_and_loads_differ_by_one_piece(costs: list[int], ranks: int) -> None:
    hands = deal(costs, ranks)
    assert sorted(i for hand in hands for i in hand) == list(range(len(costs)))
    loads = [sum(costs[i] for i in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(costs)


def test_muons_matrices_are_shared_by_what_they_cost() -> None:
    matrices = {"wide": torch.zeros(4, 8), "square": torch.zeros(4, 4), "long": torch.zeros(6, 4)}
    assert shared_out(matrices, 2) == {"wide": 0, "long": 1, "square": 1}


def test_a_checkpoint_of_two_ranks_resumes_on_one(outcomes: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = outcomes
    run(two, 1, 4)
    run(one, 1, 4)
    last = [read_jsonl(out / "log.jsonl")[-1] for out in (one, two)]
    assert last[0]["step"] == last[1]["step"] == 4
    assert last[1]["loss"] == pytest.approx(last[0]["loss"], rel=1e-4)
