"""The stages are the report's Table 1; their costs are arithmetic that can be checked by hand."""

import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from qvl.commands import cli
from qvl.commands.plan import Plan
from qvl.finetune.pre_stage import text_tower_config
from qvl.model.config import preset
from qvl.recipes.pretrain import STAGES, cost, count_parameters, pack_flops, s0, s1, v0
from qvl.train.contrastive import pre_stage_flops


def test_budgets_and_lengths_are_those_of_table_1() -> None:
    table = {name: (stage().tokens, stage().pack_tokens) for name, stage in STAGES.items()}
    assert table.pop("v0")[0] == 2 * 10**9 * (256 + 64), "ours: the report gives V0 no budget"
    assert table == {
        "s0": (67 * 10**9, 8192),
        "s1": (10**12, 8192),
        "s2": (10**12, 32768),
        "s3": (100 * 10**9, 262144),
    }


def test_s0_trains_the_mergers_and_nothing_else() -> None:
    made = cost(s0(), "8B", devices=64, peak=1e15, mfu=0.4)
    assert made.trained == made.parameters["mergers"]
    # four mergers (one and three of DeepStack) from 4 x 1152 to 4096: two matrices, their biases, a norm
    matrices = 4608 * 4608 + 4608 + 4608 * 4096 + 4096
    assert made.trained == 4 * matrices + 2 * 1152 + 3 * 2 * 4608


def test_v0_trains_the_tower_and_its_helpers_and_counts_the_text_tower() -> None:
    made = cost(v0(), "8B", devices=256, peak=1e15, mfu=0.4)
    assert made.parameters.keys() == {"vision", "helpers"}
    assert made.trained == sum(made.parameters.values())
    # Gemma's 256,000 tokens at width 1152, 27 blocks as wide as the tower's: SigLIP-2's text half has more weights than its vision half
    assert (
        made.parameters["helpers"] > 256_000 * 1152 + 27 * (4 * 1152**2 + 2 * 1152 * 4304) > made.parameters["vision"]
    )
    stage = v0()
    assert (stage.pictures, stage.steps, stage.packs_per_step) == (2 * 10**9, 61036, 256)
    # six operations for each weight of a block and patch, or caption token; attention, pool and pair scores come on top
    block = 27 * (4 * 1152**2 + 2 * 1152 * 4304)
    rule_of_thumb = 6 * block * 128 * (1024 + 64)
    assert rule_of_thumb < pack_flops(stage, preset("8B")) < 1.4 * rule_of_thumb


@pytest.mark.parametrize("size", ["2B", "8B"])
def test_v0_costs_what_a_run_of_it_counts_and_the_scores_of_the_steps_pairs(size: str) -> None:
    stage, config = v0(), preset(size)
    assert config.vision is not None
    text = text_tower_config(config.vision, 256_000, 64)
    counted = pre_stage_flops(config, text, (1024,) * 128, 128)
    # 128 images of a pack with 32,768 captions of a step, at 2 operations a number, three times
    assert pack_flops(stage, config) - counted == 3 * 2 * 128 * 32768 * config.vision.hidden_size


@pytest.mark.parametrize("size", get_args(get_type_hints(Plan)["size"]))
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_plan_at_every_published_size(size: str, name: str) -> None:
    stage = STAGES[name]()
    made = cost(stage, size, devices=1024, peak=989e12, mfu=0.4)
    assert stage.packs_per_step * stage.pack_tokens == stage.tokens_per_step
    assert (stage.steps - 1) * stage.tokens_per_step < stage.tokens <= stage.steps * stage.tokens_per_step
    assert made.flops > 0 and made.days > 0 and min(made.memory_bytes.values()) > 0


def test_the_flops_of_s1_are_about_six_for_each_active_weight_and_token() -> None:
    stage, config = s1(), preset("8B")
    decoder = count_parameters(config)["language"] - config.text.vocab_size * config.text.hidden_size
    rule_of_thumb = 6 * decoder * stage.pack_tokens
    assert rule_of_thumb < pack_flops(stage, config) < 1.6 * rule_of_thumb


def test_twice_the_devices_take_half_the_days_and_hold_half_the_weights() -> None:
    one, two = (cost(s1(), "2B", devices=n, peak=1e15, mfu=0.5) for n in (8, 16))
    assert one.days == pytest.approx(2 * two.days)
    assert one.memory_bytes["weights"] == pytest.approx(2 * two.memory_bytes["weights"], abs=2)


def test_a_checkpoint_holds_what_trains_at_each_step_and_the_frozen_rest_once() -> None:
    s0_made, s1_made = (cost(stage(), "8B", devices=8, peak=1e15, mfu=0.5) for stage in (s0, s1))
    everything = sum(s1_made.parameters.values())
    # bf16 weights, fp32 masters and two fp32 moments
    assert s1_made.checkpoint_bytes.total == 2 * 14 * everything
    mergers = s0_made.parameters["mergers"]
    assert s0_made.checkpoint_bytes.frozen == 2 * (everything - mergers)
    assert s0_made.checkpoint_bytes.total == 2 * 14 * mergers + 2 * (everything - mergers)


def test_a_stage_becomes_settings_of_qvl_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--stage", "s0", "--yaml"]) == 0
    (tmp_path / "s0.yaml").write_text(capsys.readouterr().out)
    given = ["train", "--config", str(tmp_path / "s0.yaml"), "--model", "M", "--data", "d.yaml", "--out", "o"]
    assert cli.main([*given, "--steps", "7", "--print-config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["rates"] == {"vision": 0, "mergers": 1, "language": 0} and settings["lr"] == 1e-3
    assert settings["pack_tokens"] * settings["packs_per_step"] == 4 * 2**20 and settings["steps"] == 7, "flags win"
    assert cli.main(["plan", "--stage", "v0", "--yaml"]) == 0
    (tmp_path / "v0.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["train", "--config", str(tmp_path / "v0.yaml"), *given[3:], "--print-config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert (settings["stage"], settings["caption_tokens"], settings["replay"]) == ("v0", 64, "none")
    assert settings["rates"] == {"vision": 1, "mergers": 0, "language": 0} and settings["packs_per_step"] == 256
    assert cli.main(["plan", "--yaml"]) == 2 and "--stage" in capsys.readouterr().err


def test_the_command_prints_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--size", "2B", "--stage", "s3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["stage"]["pack_tokens"] == 262144
    assert told["steps"] == 23842
    assert told["cost"]["checkpoint_bytes"]["frozen"] == 0 < told["cost"]["checkpoint_bytes"]["weights"]
