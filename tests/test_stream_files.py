"""A stream's own files in a checkpoint: they land with the weights, are compared when they are read, and resume a run to the bit."""

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvl.core.log import read_jsonl
from qvl.model.config import ModelConfig
from qvl.model.qwen3vl import new_model
from qvl.train.checkpoint import STREAM, newest, read_run
from qvl.train.checkpoint import _stage_files as stage_files
from test_train import Drawn, Pack, settings, small, trained

FILE = "numbers.safetensors"


class Remembering(Drawn):
    """Each step's patches are shifted by a megabyte of numbers that every step changes: JSON alone cannot bring them back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.number_N = torch.randn(262_144, generator=torch.Generator().manual_seed(7))

    def next_step(self) -> Sequence[Pack]:
        packs = super().next_step()
        self.number_N = (self.number_N * 1.01 + 0.1 * self.step).roll(1)
        shift = self.number_N[:8, None].sigmoid()
        return [
            replace(
                pack,
                batch=replace(
                    pack.batch,
                    patch_PX=pack.batch.patch_PX + shift.repeat(len(pack.ids), 1)[: len(pack.batch.patch_PX)],
                ),
            )
            if pack.batch.patch_PX is not None
            else pack
            for pack in packs
        ]

    def save_files(self, folder: Path) -> None:
        assert list(folder.iterdir()) == []
        save_file({"numbers": self.number_N}, folder / FILE)

    def restore_files(self, folder: Path) -> None:
        assert self.step > 0, "restored after the JSON"
        self.number_N = load_file(folder / FILE)["numbers"]


def run(out: Path, seed: int = 0, stream: type[Drawn] = Remembering, **changes: Any) -> list[dict[str, Any]]:
    model = new_model(small(), seed=seed)
    return trained(out, model, settings(6, checkpoint_every=2), stream=stream(model.config), **changes)


def damaged(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_run_resumes_to_the_bit_from_a_megabyte_in_a_file(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight")
    run(tmp_path / "halves", stop_after=4)
    file = tmp_path / "halves/step-00000004" / STREAM / FILE
    assert file.stat().st_size > 2**20
    resumed = run(tmp_path / "halves", seed=99)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in straight]
    assert [row["grad_norm"] for row in resumed] == [row["grad_norm"] for row in straight]
    saved = [read_run(tmp_path / name / "step-00000006") for name in ("straight", "halves")]
    assert saved[0].files is not None and saved[1].files is not None
    numbers = [load_file(one.files / FILE)["numbers"] for one in saved if one.files is not None]
    assert torch.equal(*numbers)


def test_the_file_matters(tmp_path: Path) -> None:
    """Else the test above would pass without it."""

    class Forgetting(Remembering):
        def restore_files(self, folder: Path) -> None:
            pass

    straight = run(tmp_path / "straight")
    run(tmp_path / "halves", stop_after=4)
    resumed = run(tmp_path / "halves", seed=99, stream=Forgetting)
    assert [row["loss"] for row in resumed] != [row["loss"] for row in straight]


def test_a_damaged_or_missing_file_is_refused_in_one_sentence_and_the_checkpoint_passed_over(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight")
    run(tmp_path / "halves", stop_after=4)
    broken = tmp_path / "halves/step-00000004"
    damaged(broken / STREAM / FILE)
    with pytest.raises(
        ValueError, match=r"stream/numbers\.safetensors differs from its manifest; the checkpoint is not wh"
    ):
        read_run(broken)
    saved = newest(tmp_path / "halves")
    assert saved is not None and saved.step == 2
    assert [row["loss"] for row in run(tmp_path / "halves", seed=99)] == [row["loss"] for row in straight]
    (tmp_path / "halves/step-00000006" / STREAM / FILE).unlink()
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        read_run(tmp_path / "halves/step-00000006")


def test_a_stream_of_json_alone_keeps_no_folder(tmp_path: Path) -> None:
    run(tmp_path, stream=Drawn, stop_after=2)
    folder = tmp_path / "step-00000002"
    names = ["manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert sorted(json.loads((folder / "manifest.json").read_text())["sha256"]) == names[1:]
    assert read_run(folder).files is None


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (Drawn, Remembering, "has no files of its stream, and this run's stream keeps some"),
        (Remembering, Drawn, "has files of its stream, and this run's stream keeps none"),
    ],
)
def test_a_run_is_not_resumed_by_another_kind_of_stream(tmp_path: Path, first, second, sentence: str) -> None:
    run(tmp_path, stream=first, stop_after=2)
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path, stream=second)


def test_a_killed_save_leaves_nothing_in_the_next_checkpoint(tmp_path: Path) -> None:
    left = tmp_path / f".{STREAM}.staged"
    left.mkdir()
    (left / "half").write_bytes(b"half")
    run(tmp_path, stop_after=2)
    assert [path.name for path in (tmp_path / "step-00000002" / STREAM).iterdir()] == [FILE]
    assert not left.exists()
    assert len(read_jsonl(tmp_path / "log.jsonl")) == 2


def test_every_rank_writes_into_the_same_folder(tmp_path: Path) -> None:
    barrier, found = threading.Barrier(2), list[list[str]]()

    def one(rank: int) -> None:
        world: Any = SimpleNamespace(rank=rank, size=2, barrier=barrier.wait)

        def save(folder: Path) -> None:
            (folder / f"{rank}.json").write_text("{}")

        folder = stage_files(tmp_path / "out", save, world)
        found.append(sorted(path.name for path in folder.iterdir()))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert found == [["0.json", "1.json"]] * 2
