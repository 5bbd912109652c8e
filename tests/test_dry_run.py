"""The dry run counts what a run would read, train and hold, and leaves --out alone; a run states what it expects."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import adapter_parameters
from data_files import processor, texts, write_shards
from qvl.commands import cli
from qvl.finetune.config import ComputeSettings, ForgettingSettings, LoraSettings, OptimizerSettings, PackSettings, Tune
from qvl.finetune.dry_run import dry_run
from qvl.finetune.tune import loop_config, lora_config
from qvl.model.lora import LoraConfig, add_adapter
from qvl.model.weights import load, save
from qvl.parallel.data_parallel import World
from qvl.parallel.memory import Stack, training_memory
from qvl.prompt.processor import Processor
from qvl.train.checkpoint import FROZEN, save_run
from qvl.train.objective import NextToken
from qvl.train.optimizer import Optimizer
from qvl.train.parameters import Rates, freeze, part_of
from qvl.train.run import Expect, judged
from tune_files import small_config, small_model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def here(small: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save(small_model(small), tmp_path / "model")
    small.save(tmp_path / "model")
    write_shards(tmp_path / "mine", texts(40), Processor.from_folder(tmp_path / "model"))
    (tmp_path / "mine.yaml").write_text("sources: [{path: mine}]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**more: object) -> Tune:
    packs = PackSettings(pack_tokens=128, pack_patches=64, packs_per_step=2)
    given = {"model": "model", "data": Path("mine.yaml"), "out": Path("run"), "steps": 10, "packs": packs} | more
    return Tune(**given)  # type: ignore[arg-type]


def test_the_flag_prints_the_plan_and_touches_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    flags = "--steps 10 --pack-tokens 128 --packs-per-step 2 --dtype float32 --device cpu --dry-run"
    assert cli.main(["train", "--model", "model", "--data", "mine.yaml", "--out", "run", *flags.split()]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for word in (
        "1 x cpu",
        "float32",
        "records",
        "10 of up to 256 tokens",
        "gradients",
        "optimizer",
        "activations",
        "at most 1.05",
        "GiB of checkpoints: 2 of",
        "frozen",
    ):
        assert word in told, word
    assert sorted(here.rglob("*")) == before


def test_it_counts_what_the_model_and_the_data_hold(small: Processor, here: Path) -> None:
    found = dry_run(settings(compute=ComputeSettings(dtype="float32", device="cpu")))
    model = small_model(small)
    assert sum(found.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert found.trained == found.parameters
    assert sum(found.records.values()) + found.held_out_records == 40 and found.held_out_records > 0
    assert found.memory_bytes["weights"] == found.memory_bytes["gradients"] == 4 * sum(found.parameters.values())
    assert found.memory_bytes["optimizer"] == 8 * sum(found.parameters.values()), (
        "two moments; the weights are the masters"
    )
    assert (found.step_tokens, found.epochs) == (256, 2560 / found.data_tokens)


def test_flops_are_about_six_a_weight_and_token_and_time_needs_a_peak(small: Processor, here: Path) -> None:
    found = dry_run(settings(compute=ComputeSettings(dtype="float32", device="cpu")))
    embeddings = small_config(small).text.vocab_size * small_config(small).text.hidden_size
    rule_of_thumb = 6 * (found.parameters["language"] - embeddings) * found.steps * found.step_tokens
    assert 0.8 * rule_of_thumb < found.flops < 2 * rule_of_thumb
    assert dry_run(settings(steps=20)).flops == pytest.approx(2 * found.flops)
    assert found.days is None


def test_frozen_parts_and_lora_train_less(small: Processor, here: Path) -> None:
    cpu = ComputeSettings(dtype="float32", device="cpu")
    frozen = dry_run(settings(compute=cpu, optimizer=OptimizerSettings(rates=Rates(vision=0, language=0))))
    model = small_model(small)
    mergers = sum(p.numel() for n, p in model.named_parameters() if part_of(n) == "mergers")
    assert frozen.trained == {"mergers": mergers}
    lora = dry_run(settings(compute=cpu, lora=LoraSettings(lora_rank=4)))
    add_adapter(model, LoraConfig(r=4))
    assert lora.trained == {"adapter": sum(p.numel() for p in adapter_parameters(model).values())}
    assert lora.memory_bytes["kept activations"] < dry_run(settings(compute=cpu)).memory_bytes["kept activations"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"lora": LoraSettings(lora_rank=4)},
        {"optimizer": OptimizerSettings(rates=Rates(vision=0, language=0))},
        {"optimizer": OptimizerSettings(optimizer="muon")},
    ],
    ids=["full", "lora", "mergers", "muon"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_planned_checkpoint_has_the_size_of_a_saved_one(here: Path, dtype: str, more: dict[str, Any]) -> None:
    run = settings(compute=ComputeSettings(dtype=dtype, device="cpu"), **more)
    planned = dry_run(run).checkpoint_bytes
    model, alone = load("model", dtype=getattr(torch, dtype)), World(0, 1, torch.device("cpu"))
    if (lora := lora_config(run)) is not None:
        add_adapter(model, lora)
    objective, loop = NextToken(model), loop_config(run)
    freeze(model, loop.optimizer.rates)
    optimizer = Optimizer(objective, loop.optimizer, alone)
    for step in (1, 2, 3):
        optimizer.step(1.0)  # with gradients of zero, which make moments too
        save_run(Path("run"), step, objective, optimizer, {}, alone, keep=loop.keep)
    steps = sorted(Path("run").glob("step-*"))
    assert len(steps) == planned.kept
    counters = 4 * sum(key.startswith("step/") for key in optimizer.state())
    assert tensor_bytes(steps[0] / "weights.safetensors") == planned.weights
    assert tensor_bytes(steps[0] / "optimizer.safetensors") == planned.optimizer + counters
    assert (tensor_bytes(Path("run") / FROZEN) if planned.frozen else 0) == planned.frozen
    files = sum(path.stat().st_size for path in Path("run").rglob("*.safetensors"))
    assert planned.total < files < planned.total + 150 * 4 * planned.kept * len(optimizer.parameters) + 20_000, (
        "headers and counters alone come on top"
    )


def tensor_bytes(path: Path) -> int:
    """A safetensors file without its header."""
    return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")


def test_what_the_run_would_refuse_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--model", "model", "--data", "none.yaml", "--out", "run", "--dry-run"]
    assert cli.main(command) == 2 and "none.yaml does not exist" in capsys.readouterr().err


def test_recomputation_keeps_only_each_layers_input() -> None:
    kept, recomputed = (Stack(rows=10, width=4, depth=3, inner=8, recomputes=r) for r in (False, True))
    assert kept.activation_bytes(2) == {"kept activations": 10 * (32 + 8) * 2 * 3}
    assert recomputed.activation_bytes(2) == {"kept activations": 240, "one layer's activations": 800}
    held = training_memory(1000, 500, (recomputed,), devices=2, last={"head": 7})
    assert held["weights"] == 1000 and held["gradients"] == 1000 and held["optimizer (masters, moments)"] == 3000
    assert held["head"] == 7 and held["one layer gathered"] == 4 * 200


def test_an_expectation_is_met_missed_or_not_measured() -> None:
    ratio, score = Expect(name="ratio", at_most=1.05), Expect(name="score", at_least=0.5)
    assert [row["is_met"] for row in judged((ratio, score), {"ratio": 1.05, "score": 0.4})] == [True, False]
    assert judged((score,), {}) == [{"expect": "score at least 0.5", "got": None, "is_met": False}]
    assert not score.is_met(float("nan"))
    with pytest.raises(ValueError, match="expect 'x' has no bound"):
        Expect(name="x")


def test_without_a_limit_on_text_nothing_is_expected(here: Path) -> None:
    assert dry_run(settings(forgetting=ForgettingSettings(max_text_loss=0))).expect == ()
