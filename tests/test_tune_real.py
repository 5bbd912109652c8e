"""The README's commands on a folder that transformers wrote: 50 steps, killed on the way, gone on with, exported, loaded there."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from media_files import encoded, gradient
from qvl.commands import cli
from qvl.core.log import read_jsonl
from qvl.engine.generate import generate
from qvl.engine.sampling import Sampling
from qvl.model.weights import load
from qvl.prompt.budget import ImageBudget
from qvl.prompt.processor import Processor
from qvl.train.checkpoint import newest
from real_tokenizer import real_tokenizer_folder
from test_tune import readme_commands

# Published 2B widths with 4 layers of 28 and of 24; nano keeps the vocabulary and the head width alone.
WIDTHS: dict[str, dict[str, Any]] = {
    "2B": {"hidden": 2048, "inner": 6144, "heads": 16, "vision": 1024, "vision_inner": 4096, "vision_heads": 16},
    "nano": {"hidden": 64, "inner": 128, "heads": 2, "vision": 32, "vision_inner": 64, "vision_heads": 2},
}
KINDS = {"LoRA": "--lora-rank 8 --lr 5e-3", "full": "--lr 3e-4"}
STEPS = 50
SHORT = (
    f"--steps {STEPS} --pack-tokens 96 --packs-per-step 1 --warmup-steps 2 --dtype bfloat16 --checkpoint-every 20 --workers 1 "
    "--held-out-text prose.txt --max-text-loss 0 --replay-samples 8"
)


def write_model(folder: Path, widths: dict[str, Any]) -> None:
    """Random weights from transformers' own class and `save_pretrained`, in bf16, with the processor's files beside them."""
    text = {
        "vocab_size": 151936,
        "hidden_size": widths["hidden"],
        "intermediate_size": widths["inner"],
        "num_hidden_layers": 4,
        "num_attention_heads": widths["heads"],
        "num_key_value_heads": widths["heads"] // 2,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 4,
        "hidden_size": widths["vision"],
        "intermediate_size": widths["vision_inner"],
        "num_heads": widths["vision_heads"],
        "out_hidden_size": widths["hidden"],
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    budget = ImageBudget(min_tokens=4, max_tokens=16)
    Processor.from_folder(real_tokenizer_folder(), template="instruct", image_budget=budget).save(folder)


def write_data(folder: Path) -> None:
    (folder / "cat.png").write_bytes(encoded(gradient(64, 96), "PNG"))
    picture = {"type": "image_url", "image_url": {"url": "cat.png"}}
    talks: list[list[Any]] = [[picture, {"type": "text", "text": "What is this?"}, "A gradient of colours."]]
    talks += [[{"type": "text", "text": f"What comes after {n}?"}, f"{n + 1} comes after {n}."] for n in range(39)]
    rows = [
        {"messages": [{"role": "user", "content": talk[:-1]}, {"role": "assistant", "content": talk[-1]}]}
        for talk in talks
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text("sources:\n  - {path: shards, weight: 1.0}\n")
    (folder / "prose.txt").write_text("Rivers carry sand to the sea, and the sea grinds it. " * 6)


def killed_at(command: list[str], here: Path, lines: int) -> None:
    """Start the command in a process of its own, and kill -9 it when so many steps are logged."""
    log = here / "run" / "log.jsonl"
    with (here / "killed.txt").open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "qvl", *command], cwd=here, stdout=out, stderr=out)
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
            time.sleep(0.02)
        assert process.poll() is None, (here / "killed.txt").read_text()
        process.kill()
        process.wait()


CASES = [
    pytest.param("nano", "LoRA", marks=pytest.mark.slow),
    ("nano", "full"),
    # In full, 2B widths would need 12 GB of masters and moments, and as much on disk for each checkpoint.
    pytest.param("2B", "LoRA", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("widths", "kind"), CASES)
def test_50_steps_killed_gone_on_with_exported_and_loaded_in_transformers(
    widths: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "DIR", WIDTHS[widths])
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    data_import, data_index, train, answer = readme_commands()
    train += [*SHORT.split(), *KINDS[kind].split()]
    assert cli.main(data_import) == 0
    assert cli.main(data_index) == 0

    killed_at(train, tmp_path, lines=19)
    saved = newest(tmp_path / "run")
    assert saved is not None and 0 < saved.step < 26
    before = {row["step"]: row["loss"] for row in read_jsonl(tmp_path / "run" / "log.jsonl")}
    assert cli.main(train) == 0
    rows = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # Steps that were taken again, or had been before the kill, have the loss that they had.
    assert {row["step"]: row["loss"] for row in rows[: len(before)]} == before
    assert sum(row["loss"] for row in rows[-5:]) < 0.98 * sum(row["loss"] for row in rows[:5])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["step"] for row in report["rows"]] == [0, 13, 26, 39, 50]
    assert report["rows"][-1]["held_out_loss"] < report["rows"][0]["held_out_loss"]

    if kind == "LoRA":
        assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 8
    same_in_transformers(tmp_path / "run" / "export", tmp_path / "cat.png")
    capsys.readouterr()
    assert cli.main([*answer, "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_input_tokens"] > 6


def same_in_transformers(export: Path, picture: Path) -> None:
    """The exported folder in both houses, fp32: the same logits on a picture and a question, and the same greedy answer."""
    ours, processor = load(export, dtype=torch.float32), Processor.from_folder(export)
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(export, dtype=torch.float32).eval()
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What comes after 7?"}]
    encoded_prompt = processor([{"role": "user", "content": content}])
    sample, visual = encoded_prompt.sample, encoded_prompt.visuals[0]
    (got,) = generate(ours, [sample], Sampling(temperature=0, max_tokens=6, ignore_eos=True, num_logprobs=5))
    # transformers' processor gives floats, ours bytes; the scale is -1..1 in both.
    floats = visual.patch_PX.float() / 127.5 - 1.0 if visual.patch_PX.dtype == torch.uint8 else visual.patch_PX
    ids = sample.token_T[None]
    is_image = (ids == theirs.config.image_token_id).int()
    with torch.no_grad():
        answer = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=is_image,
            pixel_values=floats,
            image_grid_thw=visual.grid_I3,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert answer.sequences[0, ids.shape[1] :].tolist() == list(got.tokens)
    for step, top in enumerate(got.top_logprobs):
        logprobs = answer.logits[step][0].log_softmax(-1)
        for token, logprob in top:
            assert float(logprobs[token]) == pytest.approx(logprob, abs=1e-3)
