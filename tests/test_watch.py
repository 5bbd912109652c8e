"""Watchers of a run: what they see and may do, folders on the way, and what the log says of a step."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from contrastive_ranks import captioned, drawn_pictures, tiny
from qvl.core.log import read_jsonl
from qvl.model.flops import forward_flops, pool_flops, text_tower_flops, vision_flops
from qvl.model.lora import LoraConfig, add_adapter, merge
from qvl.model.qwen3vl import new_model
from qvl.model.weights import load
from qvl.train import objective as objective_module
from qvl.train.checkpoint import newest
from qvl.train.contrastive import V0_RATES
from qvl.train.loop import LoopConfig, StepReport, Watcher, fit
from qvl.train.objective import NextToken
from qvl.train.optimizer import OptimizerConfig
from qvl.train.watch import export_every, snapshot
from test_contrastive import Fixed
from test_train import ALONE, Drawn, settings, small, trained

HERE = Path(__file__).parent


def test_what_a_watcher_returns_is_seen_by_later_ones_and_not_in_the_log(tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []
    watchers: list[Watcher] = [
        lambda report: {"eval/norm": 1.0} if report.step % 2 == 0 else None,
        lambda report: seen.append((report.step, "eval/norm" in report.values)),
    ]
    trained(tmp_path, new_model(small()), settings(3), watchers=watchers)
    assert seen == [(1, False), (2, True), (3, False)]
    assert all("eval/norm" not in row for row in read_jsonl(tmp_path / "log.jsonl"))


def test_a_watcher_that_takes_random_numbers_changes_nothing_in_the_run(tmp_path: Path) -> None:
    def run(name: str, *watchers: Watcher, **changes: Any) -> list[dict[str, Any]]:
        model = new_model(small())
        add_adapter(model, LoraConfig(r=4, dropout=0.3))
        return trained(tmp_path / name, model, settings(4, checkpoint_every=2), watchers=watchers, **changes)

    def watch(report: StepReport) -> None:
        torch.rand(3)  # from the same generator as dropout

    plain = run("plain")
    run("watched", watch, stop_after=3)
    rows = run("watched", watch)
    assert [row["grad_norm"] for row in rows] == [row["grad_norm"] for row in plain]


def test_folders_on_the_way_hold_the_weights_of_their_step_with_the_adapter_merged(tmp_path: Path) -> None:
    model = new_model(small())
    add_adapter(model, LoraConfig(r=4, target_modules="all-linear"))
    watchers = [export_every(2, model, tmp_path, ALONE, dtype=torch.float32)]
    trained(tmp_path, model, settings(4, checkpoint_every=2), watchers=watchers, stop_after=2)
    assert sorted(p.name for p in tmp_path.glob("export-*")) == ["export-00000002"]
    exported = dict(load(tmp_path / "export-00000002", dtype=torch.float32).named_parameters())
    merge(model, keep_base=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(exported[name], parameter), name


def test_the_last_step_has_no_folder_on_the_way_because_the_run_writes_its_own(tmp_path: Path) -> None:
    model = new_model(small())
    trained(tmp_path, model, settings(4), watchers=[export_every(2, model, tmp_path, ALONE)])
    assert sorted(p.name for p in tmp_path.glob("export-*")) == ["export-00000002"]


def test_a_snapshot_is_a_copy_of_its_own_in_the_dtype_asked_for() -> None:
    model = new_model(small())
    copy = snapshot(model, ALONE, dtype=torch.bfloat16)
    assert copy is not None
    assert copy.dtype == torch.bfloat16
    for (name, a), (_, b) in zip(model.named_parameters(), copy.named_parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


def test_two_checkpointed_ranks_export_what_one_plain_rank_exports(tmp_path: Path) -> None:
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [str(HERE / "ranks.py"), str(tmp_path / str(ranks)), "3", "0", str(int(ranks == 2)), "2"]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=480)
        assert done.returncode == 0, done.stderr[-3000:]
    for key, rel in (("loss", 1e-6), ("grad_norm", 1e-4), ("tokens", 0), ("patches", 0)):
        one, two = ([row[key] for row in read_jsonl(tmp_path / str(r) / "log.jsonl")] for r in (1, 2))
        assert two == pytest.approx(one, rel=rel), key
    one, two = (dict(load(tmp_path / str(r) / "export-00000002").named_parameters()) for r in (1, 2))
    for name, parameter in one.items():
        torch.testing.assert_close(two[name], parameter, atol=2e-4, rtol=1e-2, msg=name)


def test_no_steps_between_two_exports_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0 steps between exports; expected 1 or more"):
        export_every(0, new_model(small()), tmp_path, ALONE)


def test_a_line_says_what_the_step_read_and_how_full_its_packs_were(tmp_path: Path) -> None:
    row = trained(tmp_path, new_model(small()), settings(1, pack_tokens=20))[0]
    assert row["tokens"] == 34  # 5 + 6 + 7 + 8, and four for each of two pictures
    assert row["frames"] == 2
    assert row["patches"] == 16
    assert row["fill"] == pytest.approx(34 / 40)


def test_v0_counts_pictures_and_patches_and_its_mfu_the_text_tower(tmp_path: Path) -> None:
    objective = tiny()
    pack = captioned(drawn_pictures(5, seed=3), range(5))
    config = LoopConfig(steps=1, optimizer=OptimizerConfig(rates=V0_RATES), peak_flops=1e9)
    seen: list[StepReport] = []
    fit(objective, Fixed([pack]), config, tmp_path, ALONE, watchers=[seen.append])
    values = seen[0].values
    assert (values["tokens"], values["frames"], values["patches"]) == (0, 5, sum(pack.batch.frame_lengths))
    assert values["patches_per_second"] == pytest.approx(values["patches"] / values["seconds"])
    qwen, frames = objective.model.config, pack.batch.frame_lengths
    assert qwen.vision is not None
    tower = vision_flops(qwen, frames, with_mergers=False)
    pool = pool_flops(qwen.vision.hidden_size, qwen.vision.intermediate_size, frames)
    text = text_tower_flops(objective.text.config, 5)
    assert values["mfu"] == pytest.approx(3 * (tower + pool + text) / values["seconds"] / 1e9)
    # One block of width 32 and MLP 48 over six tokens a caption, then the projection.
    assert text == 2 * 30 * (4 * 32 * 32 + 2 * 32 * 48) + 5 * 4 * 36 * 32 + 5 * 2 * 32 * 32
    assert vision_flops(qwen, frames) > tower


def test_mfu_of_language_counts_tower_decoder_and_the_rows_that_are_trained(tmp_path: Path) -> None:
    model = new_model(small())
    seen: list[StepReport] = []
    fit(NextToken(model), Drawn(small()), settings(1, peak_flops=1e9), tmp_path, ALONE, watchers=[seen.append])
    # The pictures' samples train 3 and 5 tokens, the others all but their first: 3 + 5, and 5 + 7.
    total = sum(
        forward_flops(model.config, lengths, (8,), num_logits=rows).training
        for lengths, rows in (((9, 6), 8), ((11, 8), 12))
    )
    assert seen[0].values["mfu"] == pytest.approx(total / seen[0].values["seconds"] / 1e9)


def test_targets_are_found_once_a_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = objective_module.targets

    def counted(batch: Any, *, power: float) -> Any:
        calls.append(1)
        return plain(batch, power=power)

    monkeypatch.setattr(objective_module, "targets", counted)
    model = new_model(small())
    objective = NextToken(model)
    fit(objective, Drawn(small(), packs=2), settings(3), tmp_path, ALONE)
    assert len(calls) == 6


def test_a_moe_run_tells_its_worst_layer_and_its_idle_experts(tmp_path: Path) -> None:
    row = trained(tmp_path, new_model(small(experts=True)), settings(1))[0]
    assert row["router_worst_layer"] >= row["router_max_over_mean"] >= 1
    assert 0 <= row["router_idle"] < 1


def test_liger_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="loss_kernel is liger, which needs a CUDA device, and this run is on cpu"):
        NextToken(new_model(small()), loss_kernel="liger")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_loss_and_gradients_are_ours(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    found = []
    for kernel in ("ours", "liger"):
        model = new_model(replace(small(), text=replace(small().text, vocab_size=8192)), dtype=dtype, device="cuda")
        objective = NextToken(model, loss_kernel=kernel)
        [micro] = Drawn(model.config, 1).next_step()
        prepared = objective.prepare(micro)
        loss = objective(prepared, prepared.denominator, ALONE).loss
        loss.backward()
        found.append((loss.detach(), model.head_weight.grad))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, ligers in zip(*found, strict=True):
        torch.testing.assert_close(ligers, ours, atol=tolerance, rtol=tolerance)


def test_the_fused_optimizer_takes_the_step_of_the_plain_one(tmp_path: Path) -> None:
    model = new_model(small())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained(tmp_path, model, settings(3))
    saved = newest(tmp_path)
    assert saved is not None
    assert {key.split("/")[0] for key in saved.optimizer} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(float(v) == 3 for k, v in saved.optimizer.items() if k.startswith("step/"))
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
