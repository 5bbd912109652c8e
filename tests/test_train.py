"""The loop: what it minimises, that it resumes to the bit, that it refuses bad steps, that splits do not matter."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qvl.core.batch import Batch, Sample
from qvl.core.log import read_jsonl
from qvl.model.config import ModelConfig, preset
from qvl.model.layers import PLAIN_BLOCKS, Blocks
from qvl.model.lora import LoraConfig, add_adapter
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.parallel.data_parallel import World
from qvl.train.checkpoint import FROZEN, newest, read_run
from qvl.train.guard import SpikeGuard
from qvl.train.loop import LoopConfig, fit
from qvl.train.objective import NextToken, Outcome, Prepared, by_category, hidden_states
from qvl.train.optimizer import Optimizer, OptimizerConfig
from qvl.train.parameters import Rates, freeze, groups, part_of
from qvl.train.row_loss import divergence_loss
from qvl.train.schedule import Schedule

ALONE = World(0, 1, torch.device("cpu"))


def small(experts: bool = False) -> ModelConfig:
    config = preset("nano-moe" if experts else "nano")
    assert config.vision is not None
    text = replace(config.text, vocab_size=96, num_hidden_layers=3, hidden_size=64, intermediate_size=96)
    if text.moe is not None:
        text = replace(text, moe=replace(text.moe, intermediate_size=32))
    vision = replace(config.vision, deepstack_visual_indexes=(0, 1), depth=2, num_position_embeddings=16)
    vision = replace(vision, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64)
    return replace(
        config,
        text=text,
        vision=vision,
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )


@dataclass(frozen=True)
class Pack:
    batch: Batch
    ids: tuple[str, ...]
    categories: tuple[str, ...]


def sample(g: torch.Generator, length: int, picture: bool) -> Sample:
    tokens = torch.randint(0, 80, (length,), generator=g)
    if not picture:
        return Sample(token_T=tokens, is_target_T=torch.ones(length, dtype=torch.bool))
    token_T = torch.cat((tokens[:2], torch.tensor([92, 90, 90, 93]), tokens[2:]))
    is_target_T = torch.cat((torch.zeros(6, dtype=torch.bool), torch.ones(length - 2, dtype=torch.bool)))
    patches = torch.randn(8, 1536, generator=g) * 0.5
    return Sample(token_T=token_T, patch_PX=patches, grid_I3=torch.tensor([[1, 2, 4]]), is_target_T=is_target_T)


class Drawn:
    """Step n's samples follow from n alone; dealt into `packs` packs."""

    def __init__(self, config: ModelConfig, packs: int = 2, poison: frozenset[int] = frozenset()) -> None:
        self.config, self.packs, self.poison, self.step = config, packs, poison, 0

    def next_step(self) -> Sequence[Pack]:
        g = torch.Generator().manual_seed(1000 + self.step)
        samples = [sample(g, 5 + i, picture=i % 2 == 0) for i in range(4)]
        if self.step in self.poison:
            assert samples[0].patch_PX is not None
            samples[0].patch_PX.fill_(float("nan"))
        self.step += 1
        size = len(samples) // self.packs
        return [
            Pack(
                pack(part, self.config),
                tuple(f"{self.step}-{i}" for i in range(size)),
                ("a", "b") * (size // 2) or ("a",),
            )
            for part in (samples[i : i + size] for i in range(0, len(samples), size))
        ]

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def settings(steps: int, **changes: Any) -> LoopConfig:
    optimizer = OptimizerConfig(**{"lr": 1e-3, **changes.pop("optimizer", {})})
    return LoopConfig(steps=steps, optimizer=optimizer, schedule=Schedule(warmup_steps=2), **changes)


def trained(out: Path, model: Qwen3VL, config: LoopConfig, **changes: Any) -> list[dict[str, Any]]:
    stream = changes.pop("stream", None) or Drawn(model.config)
    fit(NextToken(model), stream, config, out, ALONE, **changes)
    return read_jsonl(out / "log.jsonl")


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_on_the_same_few_samples_falls(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    class Same(Drawn):
        def next_step(self) -> Sequence[Pack]:
            self.step = 0
            return super().next_step()

    model = new_model(small(), dtype=dtype)
    config = settings(25, optimizer={"lr": 1e-2, "name": name})
    rows = trained(tmp_path, model, config, stream=Same(model.config))
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_paused_and_resumed_is_to_the_bit_the_run_that_never_stopped(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    config = settings(7, optimizer={"name": name})
    straight, halves = new_model(small(), dtype=dtype), new_model(small(), dtype=dtype)
    rows = trained(tmp_path / "straight", straight, config)
    trained(tmp_path / "halves", halves, config, stop_after=3)
    again = new_model(small(), seed=99, dtype=dtype)  # other weights: all must come from the checkpoint
    resumed = trained(tmp_path / "halves", again, config)
    assert [r["loss"] for r in resumed] == [r["loss"] for r in rows]
    assert [r["grad_norm"] for r in resumed] == [r["grad_norm"] for r in rows]
    for (n, a), (_, b) in zip(straight.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), n


def test_the_gradient_does_not_depend_on_how_samples_are_dealt_into_packs() -> None:
    def gradients(packs: int) -> dict[str, torch.Tensor]:
        model = new_model(small()).double()
        objective = NextToken(model)
        micros = Drawn(model.config, packs).next_step()
        micros = [replace(m, batch=replace(m.batch, patch_PX=_double(m.batch.patch_PX))) for m in micros]
        prepared = [objective.prepare(micro) for micro in micros]
        total = sum(one.denominator for one in prepared)
        for one in prepared:
            objective(one, total, ALONE).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    one, two, four = gradients(1), gradients(2), gradients(4)
    assert one.keys() == two.keys() == four.keys()
    for name, gradient in one.items():
        scale = float(gradient.abs().max())
        assert float((gradient - two[name]).abs().max()) <= 1e-6 * scale, name
        assert float((gradient - four[name]).abs().max()) <= 1e-6 * scale, name


def _double(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double()


def test_a_step_whose_loss_is_not_finite_changes_nothing_and_names_its_samples(tmp_path: Path) -> None:
    model = new_model(small())
    rows = trained(tmp_path, model, settings(4), stream=Drawn(model.config, poison=frozenset({2})))
    assert [("skipped" in r) for r in rows] == [False, False, True, False]
    skips = read_jsonl(tmp_path / "skipped.jsonl")
    assert skips[0]["step"] == 2
    assert "3-0" in skips[0]["ids"]
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_three_refused_steps_in_a_row_go_back_to_the_checkpoint_and_past_the_bad_data(tmp_path: Path) -> None:
    model = new_model(small())
    config = settings(6, checkpoint_every=2)
    rows = trained(tmp_path, model, config, stream=Drawn(model.config, poison=frozenset({2, 3, 4})))
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert ["skipped" in r for r in rows] == [False, False, True, True, True, False, False, False, False]


def test_a_spike_of_the_gradient_norm_is_refused_and_a_slow_drift_is_not() -> None:
    guard = SpikeGuard(warmup=10)
    assert all(guard.refuses(1.0, 1.0 + 0.01 * i) is None for i in range(100))
    assert guard.refuses(1.0, 50.0) is not None
    assert guard.refuses(1.0, 2.1) is None
    assert guard.refuses(float("nan"), 1.0) is not None


def test_s0_moves_the_mergers_alone_deepstack_included(tmp_path: Path) -> None:
    model = new_model(small())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained(tmp_path, model, settings(2, optimizer={"rates": Rates(vision=0, language=0)}))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if part_of(n) == "mergers"}
    assert any("deepstack" in n for n in moved)


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = new_model(small(experts=True))
    freeze(model, Rates())
    names = [n for g in groups(model) for n in g.names]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    matrices = {n for g in groups(model) if g.is_matrix for n in g.names}
    assert not any("embed_tokens" in n or "pos_embed" in n or "lm_head" in n or "norm" in n for n in matrices)


def test_freezing_everything_is_refused() -> None:
    model = new_model(small())
    freeze(model, Rates(vision=0, mergers=0, language=0))
    with pytest.raises(ValueError, match="nothing is trainable"):
        Optimizer(model, OptimizerConfig(), ALONE)


def test_a_broken_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    model = new_model(small())
    trained(tmp_path, model, settings(4, checkpoint_every=2))
    file = tmp_path / "step-00000004" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.step == 2


def test_log_lines_carry_the_loss_of_each_category(tmp_path: Path) -> None:
    row = trained(tmp_path, new_model(small()), settings(1))[0]
    assert {"loss", "loss/a", "loss/b", "grad_norm", "lr", "tokens_per_second", "memory_gb"} <= row.keys()
    assert json.dumps(row)


def test_a_moe_run_logs_its_router_and_trains(tmp_path: Path) -> None:
    rows = trained(tmp_path, new_model(small(experts=True)), settings(3))
    assert rows[-1]["balance_loss"] > 0
    assert rows[-1]["router_max_over_mean"] >= 1


def test_cosine_and_wsd_start_at_the_warm_up_and_end_at_the_final_part() -> None:
    cosine, wsd = Schedule(kind="cosine", warmup_steps=10), Schedule(kind="wsd", warmup_steps=10, decay_part=0.2)
    assert cosine.at(0, 100) == wsd.at(0, 100) == 0.1
    assert cosine.at(9, 100) == wsd.at(50, 100) == 1.0
    assert cosine.at(100, 100) == pytest.approx(0.1)
    assert wsd.at(79, 100) == 1.0
    assert wsd.at(100, 100) == pytest.approx(0.1)


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_run_is_not_resumed_in_another_dtype(tmp_path: Path, before: torch.dtype, after: torch.dtype) -> None:
    trained(tmp_path, new_model(small(), dtype=before), settings(3), stop_after=2)
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight as .*; resume with the same settings"):
        trained(tmp_path, new_model(small(), dtype=after), settings(3))


@pytest.mark.parametrize("rank", [1, 2])
def test_a_run_is_not_resumed_with_an_adapter_of_another_rank(tmp_path: Path, rank: int) -> None:
    def adapted(r: int) -> Qwen3VL:
        model = new_model(small())
        add_adapter(model, LoraConfig(r=r))
        return model

    trained(tmp_path, adapted(rank), settings(3), stop_after=2)
    with pytest.raises(ValueError, match="lora_down as"):
        trained(tmp_path, adapted(4), settings(3))


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_is_not_resumed_with_another_optimizer(tmp_path: Path, before: str, after: str) -> None:
    trained(tmp_path, new_model(small()), settings(3, optimizer={"name": before}), stop_after=2)
    with pytest.raises(ValueError, match=f"name.*{before}.*name.*{after}"):
        trained(tmp_path, new_model(small()), settings(3, optimizer={"name": after}))
    saved = newest(tmp_path)
    assert saved is not None
    other = Optimizer(
        NextToken(new_model(small())), OptimizerConfig(name="muon" if after == "muon" else "adamw"), ALONE
    )
    with pytest.raises(ValueError, match="resume with the same optimizer"):
        other.restore(saved.optimizer)


def test_a_run_with_dropout_resumes_to_the_bit_too(tmp_path: Path) -> None:
    def adapted() -> Qwen3VL:
        model = new_model(small())
        add_adapter(model, LoraConfig(r=4, dropout=0.3))
        return model

    straight = trained(tmp_path / "straight", adapted(), settings(4))
    trained(tmp_path / "halves", adapted(), settings(4), stop_after=2)
    resumed = trained(tmp_path / "halves", adapted(), settings(4))
    assert [r["grad_norm"] for r in resumed] == [r["grad_norm"] for r in straight]


def test_a_pause_amid_refused_steps_changes_nothing(tmp_path: Path) -> None:
    def steps(out: Path, stop_after: int | None = None) -> list[int]:
        model, config = new_model(small()), settings(6, checkpoint_every=2)
        stream = Drawn(model.config, poison=frozenset({2, 3, 4}))
        return [r["step"] for r in trained(out, model, config, stream=stream, stop_after=stop_after)]

    # Steps 3 and 4 are refused, so the pause leaves no checkpoint of its own: they are met, and refused, once more.
    assert steps(tmp_path / "halves", stop_after=4) == [1, 2, 3, 4]
    assert steps(tmp_path / "halves") == steps(tmp_path / "straight") == [1, 2, 3, 4, 5, 3, 4, 5, 6]


def test_a_run_that_keeps_going_back_to_the_same_checkpoint_ends(tmp_path: Path) -> None:
    model = new_model(small())
    stream = Drawn(model.config, poison=frozenset(range(2, 30)))
    with pytest.raises(ValueError, match="went back to the checkpoint of step 2 three times"):
        trained(tmp_path, model, settings(6, checkpoint_every=2), stream=stream)


def test_the_end_of_the_data_is_said_and_the_run_saved(tmp_path: Path) -> None:
    class Short(Drawn):
        def next_step(self) -> Sequence[Pack]:
            return [] if self.step == 3 else super().next_step()

    model = new_model(small())
    with pytest.raises(ValueError, match="the data is over after 3 of 6 steps"):
        trained(tmp_path, model, settings(6), stream=Short(model.config))
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.step == 3


def test_a_new_checkpoint_stays_where_later_ones_are_broken(tmp_path: Path) -> None:
    for broken in ("step-00000006", "step-00000008"):
        (tmp_path / broken).mkdir()
        (tmp_path / broken / "manifest.json").write_text("[]")
    (tmp_path / ".step-00000001.partial").mkdir()
    trained(tmp_path, new_model(small()), settings(2))
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.step == 2
    assert not list(tmp_path.glob(".step-*"))


def test_float16_is_not_trained() -> None:
    with pytest.raises(ValueError, match="float16"):
        Optimizer(new_model(small(), dtype=torch.float16), OptimizerConfig(), ALONE)


def test_a_run_asked_to_stop_finishes_its_step_saves_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    config = settings(6)
    straight = new_model(small())
    rows = trained(tmp_path / "straight", straight, config)
    asked = iter([False, False, True])
    reached = fit(
        NextToken(new_model(small())),
        Drawn(small()),
        config,
        tmp_path / "stopped",
        ALONE,
        should_stop=lambda: next(asked),
    )
    assert reached == 3
    again = new_model(small(), seed=99)
    assert [r["loss"] for r in trained(tmp_path / "stopped", again, config)] == [r["loss"] for r in rows]
    for (name, a), (_, b) in zip(straight.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_stop_asked_for_at_a_refused_step_waits_for_one_that_is_taken_and_saves(tmp_path: Path) -> None:
    model = new_model(small())
    stream = Drawn(model.config, poison=frozenset({2}))
    asked, seen = iter([False, False, True, True]), []
    reached = fit(
        NextToken(model),
        stream,
        settings(9),
        tmp_path,
        ALONE,
        should_stop=lambda: next(asked),
        watchers=[lambda report: seen.append((report.step, report.skipped is None, report.is_saved))],
    )
    assert seen == [(1, True, False), (2, True, False), (3, False, False), (4, True, True)]
    saved = newest(tmp_path)
    assert reached == 4 and saved is not None and saved.step == 4


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"optimizer": {"lr": 2e-3}}, "optimizer was"),
        ({"clip_norm": 0.5}, "clip_norm was 1.0 and is now 0.5"),
    ],
)
def test_a_resume_under_other_settings_is_refused_by_name(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    trained(tmp_path, new_model(small()), settings(4), stop_after=2)
    with pytest.raises(ValueError, match=named):
        trained(tmp_path, new_model(small()), settings(4, **changed))


def test_a_run_may_be_made_longer_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, new_model(small()), settings(2))
    rows = trained(tmp_path, new_model(small()), settings(4))
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert "steps was 2 and is now 4" in caplog.text


def test_ranks_that_find_other_checkpoints_do_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts that share no folder: one goes on, the other would begin."""
    monkeypatch.setattr(World, "sum", lambda self, value: value + 2.0)
    with pytest.raises(
        ValueError, match=r"rank 0 finds step 0 in .*, other ranks another; give a folder that all hosts share"
    ):
        trained(tmp_path, new_model(small()), settings(1))


class Taught(NextToken):
    """A student's divergence from a teacher, which is a frozen helper with a vision encoder of its own."""

    def __init__(self, model: Qwen3VL, teacher: Qwen3VL, *, see_always: bool = False) -> None:
        super().__init__(model, see_always=see_always)
        self.teacher, self.helpers = teacher, ("teacher",)

    def forward(self, prepared: Prepared, denominator: float, world: World, blocks: Blocks = PLAIN_BLOCKS) -> Outcome:
        batch, aim = prepared.micro.batch, prepared.targets
        assert aim is not None
        hidden_TD, idle = hidden_states(self.model, batch, see_always=self.see_always, blocks=blocks)
        with torch.no_grad():
            told_TD, _ = hidden_states(self.teacher, batch, see_always=self.see_always, blocks=PLAIN_BLOCKS)
        row_R = aim.row_R
        heads = self.model.head_weight, self.teacher.head_weight
        loss, each_R = divergence_loss(
            hidden_TD[row_R], heads[0], told_TD[row_R], heads[1], aim.weight_R / denominator, beta=0.5
        )
        return Outcome(
            loss if idle is None else loss + idle, by_category(each_R, aim.sequence_R, prepared.micro.categories)
        )


def test_a_frozen_helper_is_neither_trained_nor_saved_nor_asked_for_at_a_resume(tmp_path: Path) -> None:
    objective = Taught(new_model(small()), new_model(small(), seed=9))
    before = {name: p.detach().clone() for name, p in objective.teacher.named_parameters()}
    config = LoopConfig(steps=4, optimizer=OptimizerConfig(lr=1e-3), checkpoint_every=2)
    fit(objective, Drawn(small()), config, tmp_path, ALONE, stop_after=2)
    saved = newest(tmp_path)
    assert saved is not None and not any(name.startswith("teacher.") for name in (*saved.weights, *saved.optimizer))
    again = Taught(new_model(small(), seed=5), objective.teacher)
    assert fit(again, Drawn(small()), config, tmp_path, ALONE) == 4
    assert not again.teacher.training
    assert all(torch.equal(p, before[name]) for name, p in again.teacher.named_parameters())


def test_what_makes_the_hidden_states_may_be_handed_in(tmp_path: Path) -> None:
    """Here the model itself, counted; its losses and weights are those of a run without."""
    calls: list[int] = []
    model, other = new_model(small()), new_model(small())

    def forward(batch: Batch, **more: Any) -> torch.Tensor:
        calls.append(batch.num_tokens)
        return model(batch, **more)

    config = LoopConfig(steps=2, optimizer=OptimizerConfig(lr=1e-3))
    fit(NextToken(model, forward=forward), Drawn(small()), config, tmp_path / "handed", ALONE)
    fit(NextToken(other), Drawn(small()), config, tmp_path / "own", ALONE)
    assert len(calls) == 2 * len(Drawn(small()).next_step())
    logs = [[row["loss"] for row in read_jsonl(tmp_path / name / "log.jsonl")] for name in ("handed", "own")]
    assert logs[0] == logs[1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_what_is_frozen_is_written_once(tmp_path: Path) -> None:
    rates = Rates(vision=0.0, mergers=0.0)
    config = LoopConfig(steps=4, optimizer=OptimizerConfig(lr=1e-3, rates=rates), checkpoint_every=1, keep=4)
    model = new_model(small())
    fit(NextToken(model), Drawn(small()), config, tmp_path, ALONE, stop_after=2)
    frozen = tmp_path / FROZEN
    written = frozen.stat().st_mtime_ns
    held = load_file(tmp_path / "step-00000001" / "weights.safetensors")
    assert held and not any(".visual." in name for name in held)
    assert all(".visual." in name for name in load_file(frozen))
    other = new_model(small(), seed=5)
    fit(NextToken(other), Drawn(small()), config, tmp_path, ALONE)
    assert frozen.stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(other.visual.parameters(), model.visual.parameters(), strict=True)), (
        "the frozen rest came back"
    )


def test_frozen_weights_that_were_altered_are_not_taken(tmp_path: Path) -> None:
    config = LoopConfig(steps=1, optimizer=OptimizerConfig(lr=1e-3, rates=Rates(vision=0.0, mergers=0.0)))
    fit(NextToken(new_model(small())), Drawn(small()), config, tmp_path, ALONE)
    data = bytearray((tmp_path / FROZEN).read_bytes())
    data[-1] ^= 1
    (tmp_path / FROZEN).write_bytes(data)
    with pytest.raises(ValueError, match=r"frozen\.safetensors differs from the manifest of step-00000001"):
        read_run(tmp_path / "step-00000001")
    assert newest(tmp_path) is None
