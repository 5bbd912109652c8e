"""Losses of twenty steps and a list of answers, kept from before: a change of structure changes none of them.

`PYTHONPATH=tests:. python tests/test_golden.py` writes the files anew; two commits must write the same bytes on one machine. Between
machines rounding differs: the test compares tokens exactly, losses and log-probabilities within a tolerance.
"""

import json
import shutil
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from media_files import encoded, gradient, numbered_frame, pdf, write_video
from qvl.commands import cli
from tiny_checkpoint import read_tokenizer_once, tiny_checkpoint

LOSSES = Path(__file__).parent / "golden_losses.json"
ANSWERS = Path(__file__).parent / "golden_answers.json"

ASKED: dict[str, list[str]] = {
    "text": ["--prompt", "Name a colour."],
    "system": ["--system", "Be brief.", "--prompt", "Name a colour."],
    "image": ["--image", "wide.png", "--prompt", "What is it?"],
    "two images": ["--image", "wide.png", "--prompt", "Compare it with", "--image", "tall.png", "--prompt", "this."],
    "video": ["--video", "clip.mp4", "--fps", "2", "--prompt", "When?"],
    "pages": ["--pdf", "two.pdf", "--prompt", "Read."],
    "sampled": ["--image", "tall.png", "--prompt", "Say.", "--temperature", "1", "--top-p", "0.9", "--seed", "7"],
}
RUNS: dict[str, list[str]] = {
    "full": [],
    "lora": ["--lora-rank", "4", "--lr", "1e-3"],
}


def make(folder: Path) -> dict[str, str]:
    """The models, media and rows that everything here reads; style -> model."""
    (folder / "wide.png").write_bytes(encoded(gradient(64, 96), "PNG"))
    (folder / "tall.png").write_bytes(encoded(gradient(128, 64), "PNG"))
    (folder / "two.pdf").write_bytes(pdf([(100, 100), (100, 200)]))
    write_video(folder / "clip.mp4", [numbered_frame(i) for i in range(20)], fps="10", codec="ffv1", format="matroska")
    random = np.random.default_rng(5)
    words = ["red", "green", "blue", "circle", "square", "the", "a", "of", "one", "two", "three", "is", "not"]
    rows: list[dict[str, Any]] = []
    for i in range(40):
        said = " ".join(random.choice(words, size=int(random.integers(3, 30))))
        asked = [{"type": "text", "text": " ".join(random.choice(words, size=6))}]
        if i % 3 == 0:
            asked.insert(0, {"type": "image_url", "image_url": {"url": "wide.png" if i % 2 else "tall.png"}})
        if i % 10 == 4:
            asked.insert(0, {"type": "video_url", "video_url": {"url": "clip.mp4"}})
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        if i % 4 == 0:
            turns += [
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": said[::-1], "weight": i % 8 // 4},
            ]
        rows.append({"id": f"row-{i}", "messages": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held.txt").write_text("A text that is in no training data. " * 12)
    return {style: str(tiny_checkpoint(folder / style, style)) for style in ("instruct", "thinking")}  # type: ignore[arg-type]


def answers(folder: Path, models: dict[str, str]) -> dict[str, Any]:
    """What `qvl generate` says to each question: tokens, text and log-probabilities."""
    found: dict[str, Any] = {}
    for style, model in models.items():
        for name, flags in ASKED.items():
            given = [str(folder / flag) if (folder / flag).is_file() else flag for flag in flags]
            greedy = [] if "--temperature" in flags else ["--temperature", "0"]
            common = ["--model", model, "--dtype", "float32", "--device", "cpu", "--max-tokens", "12", "--json"]
            with redirect_stdout(StringIO()) as shown:
                assert cli.main(["generate", *common, *given, *greedy]) == 0
            answer = json.loads(shown.getvalue())
            found[f"{style}, {name}"] = {key: answer[key] for key in ("num_input_tokens", "tokens", "text", "logprobs")}
    return found


def losses(folder: Path, models: dict[str, str]) -> dict[str, list[float]]:
    """The loss of each of twenty steps of `qvl train`."""
    model = models["instruct"]
    shards, mixture = folder / "shards", folder / "mixture.yaml"
    with redirect_stdout(StringIO()):
        assert cli.main(["data", "import", str(folder / "rows.jsonl"), "--out", str(shards)]) == 0
        assert cli.main(["data", "index", str(shards), "--model", model]) == 0
    mixture.write_text(f"sources:\n  - {{path: {shards}, weight: 1.0}}\n")
    common = "--steps 20 --pack-tokens 320 --pack-patches 512 --packs-per-step 2 --replay none --held-out 0 --max-text-loss 0 --lr 3e-3 "
    common += f"--checkpoint-every 20 --held-out-text {folder / 'held.txt'}"
    found: dict[str, list[float]] = {}
    for name, flags in RUNS.items():
        out = folder / f"run-{name}"
        with redirect_stdout(StringIO()):
            words = ["train", "--model", model, "--data", str(mixture), "--out", str(out), *common.split(), *flags]
            assert cli.main([*words, "--dtype", "float32", "--device", "cpu"]) == 0
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        found[name] = [line["loss"] for line in lines if "loss" in line]
        assert len(found[name]) == 20
        shutil.rmtree(out)
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    read_tokenizer_once(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("golden")
    return folder, make(folder)


def test_answers_are_those_of_before(made: tuple[Path, dict[str, str]]) -> None:
    kept, now = json.loads(ANSWERS.read_text()), answers(*made)
    assert kept.keys() == now.keys()
    for name, answer in kept.items():
        assert now[name]["num_input_tokens"] == answer["num_input_tokens"], name
        assert (now[name]["tokens"], now[name]["text"]) == (answer["tokens"], answer["text"]), name
        assert now[name]["logprobs"] == pytest.approx(answer["logprobs"], abs=1e-4), name


def test_losses_of_twenty_steps_are_those_of_before(made: tuple[Path, dict[str, str]]) -> None:
    kept, now = json.loads(LOSSES.read_text()), losses(*made)
    assert kept.keys() == now.keys()
    for name, values in kept.items():
        assert now[name] == pytest.approx(values, rel=1e-5), name


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = make(folder)
        ANSWERS.write_text(json.dumps(answers(folder, models), indent=1) + "\n")
        LOSSES.write_text(json.dumps(losses(folder, models), indent=1) + "\n")


if __name__ == "__main__":
    main()
