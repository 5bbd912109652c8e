"""The settings of qvl train are groups in the code, and single names of one level in flags and YAML."""

from pathlib import Path

import pytest
import yaml

from qvl.commands import cli
from qvl.commands.train import Train
from qvl.core.config import from_dict, keys_of, to_dict
from qvl.finetune.config import Tune

NAMES = (
    *(
        "model",
        "data",
        "out",
        "steps",
        "pack_tokens",
        "pack_patches",
        "packs_per_step",
        "replay",
        "replay_share",
        "replay_samples",
    ),
    *("held_out", "held_out_text", "max_text_loss", "lr", "rates", "lora_rank", "power", "denominator", "optimizer"),
    *(
        "weight_decay",
        "warmup_steps",
        "schedule",
        "checkpoint_every",
        "export_every",
        "checkpoint_vision",
        "checkpoint_decoder",
    ),
    *("compile", "loss_kernel", "seed", "workers", "dtype", "device"),
)
"""What flags and YAML keys were called when they stood in one flat list."""
GIVEN = ["--model", "M", "--data", "d.yaml", "--out", "o"]


def printed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["train", *argv, "--print-config"]) == 0
    return capsys.readouterr().out


def test_every_name_of_before_is_still_a_flag_and_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(NAMES) <= {*keys_of(Tune)}
    assert (
        cli.main(["train", *GIVEN, "--lr", "2e-5", "--rates.vision", "0.5", "--pack-tokens", "64", "--print-config"])
        == 0
    )
    settings = yaml.safe_load(capsys.readouterr().out)
    assert set(NAMES) <= set(settings)
    assert (settings["lr"], settings["rates"]["vision"], settings["pack_tokens"]) == (2e-5, 0.5, 64)


def test_a_yaml_file_of_before_fills_the_groups_and_flags_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: M\ndata: d.yaml\nout: o\nlr: 0.001\nrates: {vision: 0}\nlora_rank: 8\nheld_out: 0\nseed: 3\n"
    )
    built = from_dict(
        Tune, yaml.safe_load(printed(["--config", str(file), "--seed", "4"], capsys).replace("dry_run: false\n", ""))
    )
    assert (built.optimizer.lr, built.optimizer.rates.vision, built.lora.lora_rank) == (0.001, 0, 8)
    assert (built.forgetting.held_out, built.seed, built.packs.pack_tokens) == (0, 4, 8192)


def test_what_is_printed_makes_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = printed(
        [*GIVEN, "--power", "0", "--schedule", "wsd", "--checkpoint-every", "7", "--rates.language", "0"], capsys
    )
    (tmp_path / "run.yaml").write_text(first)
    assert printed(["--config", str(tmp_path / "run.yaml")], capsys) == first
    assert to_dict(from_dict(Train, yaml.safe_load(first))) == yaml.safe_load(first)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lora_rnak: 8", "unknown key 'lora_rnak' in FILE; did you mean 'lora_rank'?"),
        ("replay_share: 1.5", "replay_share is 1.5 and replay_samples 512; expected a share between 0 and 1"),
        ("held_out: 1.0", "held_out is 1.0; expected a part of at least 0 and below 1"),
        ("checkpoint_every: 0", "checkpoint_every is 0; expected at least 1"),
        ("steps: 0", "steps is 0; expected at least 1"),
    ],
)
def test_mistakes_are_answered_by_the_name_that_was_written(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{line}\n")
    try:
        assert cli.main(["train", "--config", str(file), *GIVEN, "--print-config"]) == 2
    except SystemExit as ended:  # by tyro, which builds the run as a whole
        assert ended.code == 2
    assert said.replace("FILE", str(file)) in " ".join(capsys.readouterr().err.split())
