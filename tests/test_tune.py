"""The README's four commands: one's own conversations become shards, an index, a trained and exported model, an answer."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from media_files import encoded, gradient
from qvl.commands import cli
from qvl.commands.train import held_out_has_risen
from qvl.core.log import read_jsonl
from qvl.finetune.text_guard import Judgement
from qvl.finetune.tune import Tuned
from qvl.model.weights import load
from qvl.train.checkpoint import newest
from tiny_checkpoint import tiny_checkpoint

README = Path(__file__).parents[1] / "README.md"
SMALL = (
    "--steps 6 --lr 3e-3 --pack-tokens 512 --packs-per-step 1 --warmup-steps 1 --dtype float32 --checkpoint-every 3 "
    "--held-out-text prose.txt --max-text-loss 0"
)
ALONE = "--replay none"


def readme_commands() -> list[list[str]]:
    block = re.search(r"<!-- train -->\n```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return [shlex.split(line)[1:] for line in block[1].strip().splitlines()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README names: a model, conversations, a picture, a mixture."""
    tiny_checkpoint(tmp_path / "DIR", "instruct")
    (tmp_path / "cat.png").write_bytes(encoded(gradient(64, 96), "PNG"))
    picture = {"type": "image_url", "image_url": {"url": "cat.png"}}
    talks = [
        [picture, {"type": "text", "text": "What is this?"}, "A gradient."],
        [{"type": "text", "text": "Say yes."}, "Yes."],
    ]
    rows = [
        {"messages": [{"role": "user", "content": talk[:-1]}, {"role": "assistant", "content": talk[-1]}]}
        for talk in talks
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prose.txt").write_text("A text that is in no training data. " * 12)
    (tmp_path / "mine.yaml").write_text("sources:\n  - {path: shards, weight: 1.0}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_commands_train_export_and_answer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_import, data_index, train, generate = readme_commands()
    assert cli.main(data_import) == 0
    assert cli.main(data_index) == 0
    assert cli.main([*train, *SMALL.split()]) == 0
    rows = read_jsonl(here / "run" / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert "before and after" in capsys.readouterr().out
    report = json.loads((here / "run" / "report.json").read_text())
    assert [row["step"] for row in report["rows"]] == [0, 2, 4, 6]
    assert report["replay"][0]["share"] == 0.1, "a tenth is what the model wrote itself before the first step"
    assert report["exported_step"] == 6 and report["stopped"] is None
    assert cli.main([*generate, "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_input_tokens"] > 6

    ours = load(here / "run" / "export")
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(here / "run" / "export", dtype=torch.float32)
    trained = dict(theirs.named_parameters())
    for name, parameter in ours.language_model.named_parameters():
        assert torch.equal(trained[f"model.language_model.{name}"], parameter)


def test_s0_by_the_settings_that_qvl_plan_prints_changes_the_mergers_alone(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_import, data_index, train, _ = readme_commands()
    assert cli.main(data_import) == 0
    assert cli.main(data_index) == 0
    capsys.readouterr()
    assert cli.main(["plan", "--stage", "s0", "--yaml"]) == 0
    (here / "s0.yaml").write_text(capsys.readouterr().out)
    few = "--steps 2 --pack-tokens 512 --pack-patches 512 --packs-per-step 1 --warmup-steps 1 --dtype float32 --held-out 0"
    assert cli.main([*train, "--config", "s0.yaml", *few.split()]) == 0
    before, after = load(here / "DIR", dtype=torch.bfloat16), load(here / "run" / "export", dtype=torch.bfloat16)
    changed = {
        n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed and all("merger" in name for name in changed)


def test_lora_leaves_the_base_alone_and_writes_an_adapter_peft_can_read(here: Path) -> None:
    data_import, data_index, train, _ = readme_commands()
    assert cli.main(data_import) == 0
    assert cli.main(data_index) == 0
    assert cli.main([*train, *SMALL.split(), *ALONE.split(), "--lora-rank", "4"]) == 0
    assert json.loads((here / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    before, after = load(here / "DIR", dtype=torch.bfloat16), load(here / "run" / "export", dtype=torch.bfloat16)
    changed = {
        n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed and all("language_model.layers" in name and name.endswith("_proj.weight") for name in changed)


@pytest.mark.parametrize("extra", [(), pytest.param(("--lora-rank", "4"), marks=pytest.mark.slow)])
def test_two_ranks_export_what_they_trained(here: Path, extra: tuple[str, ...]) -> None:
    data_import, data_index, train, _ = readme_commands()
    assert cli.main(data_import) == 0
    assert cli.main(data_index) == 0
    short = (
        SMALL.replace("--steps 6", "--steps 2").replace("--packs-per-step 1", "--packs-per-step 2").split()
        + ALONE.split()
    )
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    qvl = str(Path(sys.executable).with_name("qvl"))
    done = subprocess.run([*ranks, qvl, *train, *short, *extra], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    saved, ours = newest(here / "run"), load(here / "run" / "export")
    assert saved is not None
    assert (here / "run" / "adapter").exists() == bool(extra)
    for name, parameter in ours.named_parameters():
        if not extra:
            assert torch.equal(parameter, saved.weights[f"model.{name}"].bfloat16().float()), name


def test_ctrl_c_saves_and_the_same_command_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_import, data_index, train, _ = readme_commands()
    assert cli.main(data_import) == 0
    assert cli.main(data_index) == 0
    command = [sys.executable, "-m", "qvl", *train, *SMALL.replace("--steps 6", "--steps 400").split(), *ALONE.split()]
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = here / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert "the same command goes on from there" in out
    steps = len(read_jsonl(log))
    assert list((here / "run").glob(f"step-{steps:08d}"))
    assert cli.main([*train, *SMALL.replace("--steps 6", f"--steps {steps + 2}").split(), *ALONE.split()]) == 0
    assert [row["step"] for row in read_jsonl(log)] == list(range(1, steps + 3))


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({0: 3.0, 10: 2.0, 20: 1.5}, None),
        ({0: 3.0, 10: 2.0, 20: 2.01}, None),
        ({0: 3.0, 10: 2.0, 20: 2.5}, "lowest at step 10 (2.000) and has risen to 2.500 at step 20"),
        ({0: None, 10: None, 20: None}, None),
    ],
)
def test_a_held_out_loss_that_has_risen_is_reported(losses: dict[int, float | None], said: str | None) -> None:
    rows = tuple(Judgement(step=step, bits_per_byte=1.0, held_out_loss=loss) for step, loss in losses.items())
    sentence = held_out_has_risen(Tuned(step=20, export=None, lost=None, judgements=rows))
    assert sentence is None if said is None else sentence is not None and said in sentence
