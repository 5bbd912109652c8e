"""qvl train --stage v0: a vision encoder learns from images and captions, goes on to the bit after a stop, and scores higher."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from data_files import chat, document, picture, processor, texts, write_shards
from media_files import encoded
from qvl.commands import cli
from qvl.core.log import read_jsonl
from qvl.data.record import Record, record_from_dict
from qvl.finetune.captions import caption_of, siglip_encoding
from qvl.finetune.config import (
    ComputeSettings,
    ForgettingSettings,
    OptimizerSettings,
    PackSettings,
    SavingSettings,
    Tune,
)
from qvl.finetune.dry_run import dry_run
from qvl.finetune.pre_stage import SCORE, check_vision, text_tower_config, train_pre_stage
from qvl.model.qwen3vl import new_model
from qvl.model.siglip import Tower, fill_tower
from qvl.model.weights import load, save
from qvl.prompt.processor import Processor
from qvl.train.checkpoint import newest
from qvl.train.contrastive import V0_RATES, new_contrastive
from qvl.train.parameters import freeze, groups, part_of
from test_contrastive import siglip
from test_start import SIDE
from tune_files import small_config

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (220, 210, 30)}


def coloured(number: int) -> tuple[Record, dict[str, bytes]]:
    """A square of one colour anywhere on grey noise, and its caption: every second pair a document, the others a chat."""
    rng = np.random.default_rng(number)
    name, colour = list(COLOURS.items())[number % len(COLOURS)]
    pixels = rng.integers(90, 160, (64, 64, 3)).astype(np.uint8)
    row, column = rng.integers(0, 32, 2)
    pixels[row : row + 32, column : column + 32] = colour
    caption, id = f"a {name} square", f"pair-{number}"
    if number % 8 < 4:
        content = [{"type": "image", "image": "0.png"}, {"type": "text", "text": caption}]
        messages = [{"role": "document", "content": content}]
        record = record_from_dict(
            {"id": id, "kind": "pretrain", "media": {"0.png": {"w": 64, "h": 64}}, "messages": messages}
        )
    else:
        record = chat(id, "What is this?", caption, height=64, width=64)
    return record, {"0.png": encoded(pixels, "PNG")}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def made(small: Processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and 96 pairs."""
    folder = tmp_path_factory.mktemp("v0")
    config = small_config(small)
    assert config.vision is not None
    vision = replace(config.vision, pos_embed_init="sincos", initializer_range=0.1)
    save(new_model(replace(config, vision=vision), seed=0, dtype=torch.float32), folder / "model")
    small.save(folder / "model")
    write_shards(folder / "pairs", [coloured(i) for i in range(96)], Processor.from_folder(folder / "model"))
    (folder / "pairs.yaml").write_text("sources: [{path: pairs}]")
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def settings(out: Path, **more: Any) -> Tune:
    given = {
        "model": "model",
        "data": Path("pairs.yaml"),
        "out": out,
        "stage": "v0",
        "packs": PackSettings(pack_tokens=512, pack_patches=1024, packs_per_step=1, workers=0),
        "forgetting": ForgettingSettings(held_out=0.25),
        "optimizer": OptimizerSettings(lr=3e-3, warmup_steps=1),
        "saving": SavingSettings(checkpoint_every=100),
        "compute": ComputeSettings(dtype="float32", device="cpu"),
    }
    return Tune(**(given | more))


def test_the_command_raises_the_score_of_images_it_never_saw(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = "--steps 50 --lr 3e-3 --warmup-steps 1 --pack-tokens 512 --pack-patches 1024 --packs-per-step 1 --held-out 0.25 --workers 0"
    command = ["train", "--stage", "v0", "--model", "model", "--data", "pairs.yaml", "--out", str(out), *flags.split()]
    assert cli.main([*command, "--caption-tokens", "20", "--dtype", "float32", "--device", "cpu"]) == 0
    report = json.loads((out / "report.json").read_text())
    zero = report["zero_shot"]
    assert (zero["captions"], zero["chance"]) == (4, 0.25) and zero["images"] >= 12
    assert zero["before"] < 0.6 and zero["after"] > 0.8, zero
    assert report["exported_step"] == 50
    assert report["expect"] == [
        {"expect": f"{SCORE} at least {zero['before']:g}", "got": zero["after"], "is_met": True}
    ]
    told = capsys.readouterr().out
    assert (
        f"{zero['images']} held-out images among 4 captions: {zero['before']:.3f} before, {zero['after']:.3f} after"
        in told
    )
    assert [row["step"] for row in read_jsonl(out / "log.jsonl")] == list(range(1, 51))

    before, after = load(here / "model", dtype=torch.bfloat16), load(out / "export", dtype=torch.bfloat16)
    changed = {
        n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)
    }
    norm = {n for n in changed if n.startswith("visual.merger.norm.")}
    assert norm, "the trained last norm is handed over to the merger"
    assert {part_of(n) for n in changed - norm} == {"vision"}


def test_a_stopped_run_goes_on_to_the_bit(here: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished = train_pre_stage(settings(whole, steps=6))
    assert train_pre_stage(settings(parts, steps=6), stop_after=2) is None
    assert [path.name for path in parts.glob("step-*")] == ["step-00000002"] and not (parts / "export").exists()
    went_on = train_pre_stage(settings(parts, steps=6))
    assert finished is not None and went_on is not None and went_on.zero_shot == finished.zero_shot
    shown = ("step", "loss", "retrieval", "grad_norm", "lr")
    rows = [[{key: row[key] for key in shown} for row in read_jsonl(out / "log.jsonl")] for out in (whole, parts)]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    first, second = newest(whole), newest(parts)
    assert first is not None and second is not None
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert all(torch.equal(first.optimizer[name], second.optimizer[name]) for name in first.optimizer)
    assert first.state["stream"] == second.state["stream"]
    with pytest.raises(ValueError, match="caption_tokens was 64 and is now 20"):
        train_pre_stage(
            replace(settings(parts, steps=6), pre_stage=replace(settings(parts).pre_stage, caption_tokens=20))
        )


def test_data_without_a_pair_and_models_without_eyes_are_refused(
    small: Processor, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Processor.from_folder(here / "model")
    write_shards(tmp_path / "texts", texts(5), own)
    images = [{"type": "image", "image": name} for name in ("0.png", "1.png")]
    media = {name: {"w": 96, "h": 64} for name in ("0.png", "1.png")}
    messages = [{"role": "document", "content": [*images, {"type": "text", "text": "both"}]}]
    two = record_from_dict({"id": "two", "kind": "pretrain", "media": media, "messages": messages})
    write_shards(tmp_path / "two", [(two, {"0.png": picture(0), "1.png": picture(1)})], own)
    for name, reason in (("texts", "no record shows an image"), ("two", "record 'two' shows image, image")):
        mixture = tmp_path / f"{name}.yaml"
        mixture.write_text(f"sources: [{{path: {tmp_path / name}}}]")
        with pytest.raises(ValueError, match=f"holds no image-caption pair .*{reason}"):
            train_pre_stage(settings(tmp_path / "run", data=mixture, steps=1))
    blind = replace(small_config(small), vision=None)
    save(new_model(blind, seed=0, dtype=torch.float32), tmp_path / "blind")
    small.save(tmp_path / "blind")
    with pytest.raises(ValueError, match="is a text-only model; --stage v0 trains a vision encoder"):
        train_pre_stage(settings(tmp_path / "run", model=str(tmp_path / "blind"), steps=1))
    assert not (tmp_path / "run").exists()
    for more, said in (
        (["--lora-rank", "4"], "--lora-rank adapts the decoder"),
        (["--replay", "self"], "replay is self"),
    ):
        command = ["train", "--stage", "v0", "--model", "model", "--data", "pairs.yaml", "--out", "run", *more]
        try:
            assert cli.main(command) == 2
        except SystemExit as ended:
            assert ended.code == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_records_that_are_no_pair_are_rejected_among_those_that_are(here: Path, tmp_path: Path) -> None:
    long = replace(coloured(4)[0], id="long", messages=(*coloured(4)[0].messages, *coloured(4)[0].messages))
    entries = [*(coloured(i) for i in range(24)), *texts(6), (long, coloured(4)[1])]
    write_shards(tmp_path / "mixed", entries, Processor.from_folder(here / "model"))
    write_shards(tmp_path / "texts", texts(9), Processor.from_folder(here / "model"))
    both = f"[{{path: {tmp_path / 'texts'}}}, {{path: {tmp_path / 'mixed'}}}]"
    (tmp_path / "mixed.yaml").write_text(f"sources: {both}")
    run = settings(tmp_path / "run", data=tmp_path / "mixed.yaml", steps=6, forgetting=ForgettingSettings(held_out=0))
    made = train_pre_stage(run)
    assert made is not None and made.zero_shot is None and made.step == 6
    assert "record 'long' shows image, image" in (tmp_path / "run" / "quarantine.jsonl").read_text()


def test_what_a_caption_is() -> None:
    assert caption_of(coloured(0)[0]) == "a red square"
    assert caption_of(coloured(5)[0]) == "a green square"
    assert caption_of(chat("a", "What?", "two\n\nlines ")) == "two lines"
    with pytest.raises(ValueError, match="record 'd' shows no media; an image-caption pair shows one image"):
        caption_of(document("d", "text alone"))
    with pytest.raises(ValueError, match="record 'e' has no text beside its image"):
        caption_of(chat("e", "What?", " "))


def test_a_dry_run_counts_the_vision_encoder_and_its_helpers(here: Path, tmp_path: Path) -> None:
    found = dry_run(settings(tmp_path / "run", steps=3))
    model = load(here / "model")
    objective = new_contrastive(model, text_tower_config(check_vision(settings(tmp_path), model.config), 282, 64))
    counts: dict[str, int] = {}
    for name, parameter in objective.named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    assert found.parameters == counts
    assert found.trained == {part: counts[part] for part in ("vision", "helpers")}
    assert sum(found.records.values()) + found.held_out_records == 96
    assert "head, one chunk" not in found.memory_bytes and found.memory_bytes["kept activations"] > 0
    assert found.expect == (f"{SCORE} at least what it is before",)
    assert found.flops > 0 and dry_run(settings(tmp_path / "run", steps=6)).flops == pytest.approx(2 * found.flops)
    muon = dry_run(settings(tmp_path / "run", optimizer=OptimizerSettings(optimizer="muon")))
    freeze(objective, V0_RATES)
    sizes = {name: parameter.numel() for name, parameter in objective.named_parameters()}
    matrices = sum(sizes[name] for group in groups(objective) if group.is_matrix for name in group.names)
    assert found.checkpoint_bytes.optimizer - muon.checkpoint_bytes.optimizer == 4 * matrices > 0
    assert not (tmp_path / "run").exists()


def test_two_ranks_learn_from_each_others_captions_and_export_what_they_trained(here: Path, tmp_path: Path) -> None:
    flags = "--steps 3 --lr 3e-3 --warmup-steps 1 --pack-tokens 512 --pack-patches 1024 --packs-per-step 2 --held-out 0.25 --workers 0"
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = ["train", "--stage", "v0", "--model", "model", "--data", "pairs.yaml", "--out", str(tmp_path / "run")]
    end = ["--caption-tokens", "20", "--dtype", "float32", "--device", "cpu"]
    qvl = str(Path(sys.executable).with_name("qvl"))
    done = subprocess.run([*ranks, qvl, *command, *flags.split(), *end], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    saved, ours = newest(tmp_path / "run"), load(tmp_path / "run" / "export")
    assert saved is not None and "before" in done.stdout
    for name, parameter in ours.named_parameters():
        if part_of(name) == "vision":
            assert torch.equal(parameter, saved.weights[f"model.{name}"].bfloat16().float()), name
    assert json.loads((tmp_path / "run" / "report.json").read_text())["zero_shot"]["after"] is not None


def test_from_a_siglip_folder_its_text_half_and_its_tokenizer_go_on(
    small: Processor, here: Path, tmp_path: Path
) -> None:
    theirs = siglip()
    theirs.save_pretrained(tmp_path / "siglip")
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", "a", *COLOURS, "square"])}
    spaced = tokenizers.Tokenizer(WordLevel(words, unk_token="<unk>"))
    spaced.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    config = small_config(small)
    assert config.vision is not None
    vision = replace(
        config.vision, depth=3, hidden_size=48, num_heads=4, intermediate_size=80, num_position_embeddings=SIDE**2
    )
    model = new_model(replace(config, vision=vision), seed=0, dtype=torch.float32)
    with torch.no_grad():
        fill_tower(model.visual, Tower.open(tmp_path / "siglip"))
    save(model, tmp_path / "model")
    Processor.from_folder(here / "model").save(tmp_path / "model")
    run = settings(tmp_path / "run", model=str(tmp_path / "model"), steps=2)
    run = replace(run, pre_stage=replace(run.pre_stage, siglip=tmp_path / "siglip"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing; the text tower of --siglip needs"):
        train_pre_stage(run)
    spaced.save(str(tmp_path / "siglip" / "tokenizer.json"))
    assert siglip_encoding(tmp_path / "siglip", 8)(["A Red square"]).tolist() == [[3, 4, 8, 1, 0, 0, 0, 0]]
    made = train_pre_stage(run)
    assert made is not None and made.zero_shot is not None and made.zero_shot.after is not None
    first = read_jsonl(tmp_path / "run" / "log.jsonl")[0]
    assert first["bias"] == pytest.approx(-6.0, abs=0.01), "scale and bias are SigLIP's"
    assert dry_run(run).trained["helpers"] > sum(p.numel() for p in theirs.text_model.parameters())
