"""The judge beside a tuning run: held-out text and records before, during and after, and the rule that stops."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_files import processor, texts, write_shards
from qvl.commands import cli
from qvl.core.batch import Sample
from qvl.data.index import fingerprint
from qvl.data.loader import micro_batch
from qvl.data.mixture import SourceConfig, mixture_from_dict
from qvl.data.packing import PackBudget
from qvl.data.source import Source, open_source
from qvl.data.store import Store
from qvl.finetune import text_guard
from qvl.finetune.text_guard import TextGuard, TextLostError, built_in_text, held_out_text
from qvl.finetune.tune_data import contents, open_data, split
from qvl.model.weights import load, save
from qvl.parallel.data_parallel import World
from qvl.prompt.processor import Processor
from qvl.train.checkpoint import newest, read_run
from qvl.train.language import bits_per_byte
from qvl.train.loop import StepReport
from qvl.train.objective import NextToken
from tune_files import small_config, small_model

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def small(tmp_path: Path) -> Processor:
    return processor(tmp_path / "tokenizer")


# ---- bits a byte --------------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_pays_the_log_of_its_vocabulary_for_each_token(small: Processor) -> None:
    model = small_model(small)
    with torch.no_grad():
        model.head_weight.zero_()
    # one token a byte here; the first of each window of 4 is charged as a draw from the 282 ids there are
    bits = 3 * math.log2(model.config.text.vocab_size) + math.log2(282)
    assert bits_per_byte(model, small.tokenizer, "abcdabcd", window=4) == pytest.approx(bits / 4, rel=1e-5)


def test_the_objective_gives_the_bits_that_the_model_gives(small: Processor, tmp_path: Path) -> None:
    model = small_model(small)
    guard = TextGuard(NextToken(model), small.tokenizer, "A few words.", ALONE, tmp_path, every=1, most=1.05)
    assert guard.judge(0).bits_per_byte == pytest.approx(
        bits_per_byte(model, small.tokenizer, "A few words."), rel=1e-6
    )
    assert guard.judge(0).held_out_loss is None
    assert guard.objective.training, "judging leaves the mode as it was"


# ---- the text -----------------------------------------------------------------------------------------------------


def test_the_built_in_text_is_sixteen_kilobytes_of_prose() -> None:
    text = built_in_text()
    assert 15_000 < len(text.encode()) <= 16_000
    assert "::=" not in text and ">>>" not in text
    assert text.count(". ") > 60


def test_a_text_comes_from_a_file_or_from_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n{"other": 1}\n{"text": "Two."}\n')
    (tmp_path / "empty.txt").write_text(" ")
    assert held_out_text(tmp_path / "a.txt") == "One."
    assert held_out_text(tmp_path / "a.jsonl") == "One.\n\nTwo."
    for name in ("empty.txt", "missing.jsonl"):
        with pytest.raises(ValueError, match=r"holds no text; give a plain text, or \.jsonl rows"):
            held_out_text(tmp_path / name)


# ---- held-out records ---------------------------------------------------------------------------------------------


def opened(folder: Path, small: Processor) -> Source:
    return open_source(SourceConfig(path=str(folder)), fingerprint(small), Store())


def test_a_twentieth_is_held_out_by_content_whatever_is_added(small: Processor, tmp_path: Path) -> None:
    entries = texts(400)
    write_shards(tmp_path / "some", entries[:200], small)
    write_shards(tmp_path / "more", entries, small)

    def digests(source: Source) -> set[int]:
        return set(contents(source).tolist())

    trained, held = split(opened(tmp_path / "some", small), 0.05)
    assert 3 <= held.lengths.num_records <= 20
    assert trained.lengths.num_records + held.lengths.num_records == 200
    assert not digests(trained) & digests(held)
    trained_more, held_more = split(opened(tmp_path / "more", small), 0.05)
    assert digests(held) <= digests(held_more) and digests(trained) <= digests(trained_more)


def test_what_a_record_is_called_and_where_it_stands_does_not_count(small: Processor, tmp_path: Path) -> None:
    entries = texts(200)
    renamed = [
        (replace(record, id=f"other-{i}", source="elsewhere"), media) for i, (record, media) in enumerate(entries)
    ]
    write_shards(tmp_path / "some", entries, small)
    write_shards(tmp_path / "twice", [*renamed[::-1], *entries], small)
    _, held = split(opened(tmp_path / "some", small), 0.05)
    trained, both = split(opened(tmp_path / "twice", small), 0.05)
    assert both.lengths.num_records == 2 * held.lengths.num_records > 0
    assert not set(contents(trained).tolist()) & set(contents(held).tolist())


def test_held_out_records_are_never_trained_on(small: Processor, tmp_path: Path) -> None:
    write_shards(tmp_path / "mine", texts(60), small)
    write_shards(tmp_path / "old", texts(60, name="old"), small)
    (tmp_path / "old.yaml").write_text("sources: [{path: old}]")
    mixture = mixture_from_dict(
        {
            "sources": [{"path": "mine"}],
            "replay": [{"path": "old.yaml", "share": 0.2}],
            "folder": str(tmp_path),
        }
    )
    loader, held_out = open_data(
        mixture,
        small,
        small_config(small),
        PackBudget(tokens=512, patches=64),
        packs_per_step=2,
        held_out=0.2,
        seed=0,
        world=ALONE,
        workers=0,
        out=tmp_path / "out",
    )
    with loader:
        kept = {id for micro in held_out.packs() for id in micro.ids}
        trained = {id for _ in range(120) for micro in loader.next_step() for id in micro.ids}
    assert len(kept) == held_out.num_records > 3
    assert not kept & trained
    assert len(trained) == 120 - 2 * len(kept), (
        "all others come; what is replayed holds the same texts, whose copies do not"
    )
    assert all(id.startswith("text-") for id in kept)


# ---- the rule -----------------------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, *bits: float) -> None:
    values: Iterator[float] = iter(bits)
    monkeypatch.setattr(text_guard, "bits_per_byte", lambda *_, **__: next(values))


def guard_of(small: Processor, out: Path, *, most: float = 1.05) -> TextGuard:
    model = small_model(small)
    sample = Sample(token_T=torch.tensor([5, 6, 7]), is_target_T=torch.tensor([False, True, True]))
    micro = micro_batch([sample], ["a"], ["chat"], model.config)
    return TextGuard(NextToken(model), small.tokenizer, "x", ALONE, out, every=2, most=most, held_out=lambda: [micro])


def at(step: int) -> StepReport:
    return StepReport(step, 9, {"loss": float(step)}, None)


def test_the_run_stops_when_text_costs_more_than_the_limit(
    small: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 1.0, 1.04, 1.06)
    guard = guard_of(small, tmp_path)
    guard.begin(0)
    for step in (1, 2, 3):
        guard(at(step))
    with pytest.raises(
        TextLostError, match=r"stopped at step 4: held-out text costs 1\.060 bits a byte, 1\.06 times the 1\.000"
    ):
        guard(at(4))
    assert guard.good_steps == {0, 2}
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["step"], row["bits_per_byte"]) for row in report["rows"]] == [(0, 1.0), (2, 1.04), (4, 1.06)]
    assert all(row["held_out_loss"] > 0 for row in report["rows"])
    assert [row["train_loss"] for row in report["rows"]] == [None, 1.5, 3.5]
    assert report["stopped"].startswith("stopped at step 4")


def test_a_checkpoint_of_a_pause_is_judged_like_any_other(
    small: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 1.0, 1.01, 1.06)
    guard = guard_of(small, tmp_path)
    guard.begin(0)
    guard(replace(at(3), is_saved=True))
    with pytest.raises(TextLostError):
        guard(at(4))
    assert guard.good_steps == {0, 3}


def test_the_last_step_is_judged_too_and_a_text_that_is_no_number_is_lost(
    small: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 1.0, math.nan)
    guard = guard_of(small, tmp_path)
    guard.begin(0)
    with pytest.raises(TextLostError):
        guard(at(9))


def test_a_limit_of_0_measures_and_never_stops(
    small: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 1.0, 3.0)
    guard = guard_of(small, tmp_path, most=0)
    guard.begin(0)
    guard(at(2))
    assert guard.stopped is None and guard.good_steps == {0, 2}
    with pytest.raises(ValueError, match=r"max_text_loss is 0\.9; expected a ratio above 1"):
        guard_of(small, tmp_path, most=0.9)


def test_a_run_that_goes_on_compares_with_the_model_before_its_first_step(
    small: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 1.0, 1.01, 1.02)
    first = guard_of(small, tmp_path)
    first.begin(0)
    first(at(2))
    first(at(4))
    scripted(monkeypatch)  # nothing is measured again
    second = guard_of(small, tmp_path)
    second.begin(2)
    assert {step: row.bits_per_byte for step, row in second.rows.items()} == {0: 1.0, 2: 1.01}


def test_the_command_exports_the_last_good_checkpoint_and_sets_the_lost_ones_aside(
    small: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(small_model(small), tmp_path / "model")
    small.save(tmp_path / "model")
    write_shards(tmp_path / "mine", texts(40), Processor.from_folder(tmp_path / "model"))
    (tmp_path / "mine.yaml").write_text("sources: [{path: mine}]")
    options = "--steps 8 --pack-tokens 128 --packs-per-step 1 --lr 1e-3 --replay none --dtype float32 --workers 0 --lora-rank 2"
    monkeypatch.chdir(tmp_path)
    train = ["train", "--model", "model", "--data", "mine.yaml", "--out", "run", *options.split()]

    scripted(monkeypatch, 2.0, 2.0, 2.0, 2.2)
    assert cli.main(train) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "stopped at step 6: held-out text costs 2.200 bits a byte, 1.10 times the 2.000 of before" in told
    assert "run/export and run/adapter, the weights of step 4" in told
    assert (tmp_path / "run" / "lost-step-00000006").is_dir()
    saved = newest(tmp_path / "run")
    assert saved is not None and saved.step == 4
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["exported_step"] == 4 and report["held_out_records"] > 0

    # What was exported is the adapter of step 4 in the base, not that of step 6.
    name = "model.language_model.layers.0.mlp.down_proj"
    base, out = load(tmp_path / "model"), load(tmp_path / "run" / "export")
    change = saved.weights[f"{name}.lora_up"] @ saved.weights[f"{name}.lora_down"] * 2.0
    inner = name.removeprefix("model.") + ".weight"
    merged = dict(base.named_parameters())[inner] + change
    assert torch.equal(dict(out.named_parameters())[inner], merged.bfloat16().float())
    lost = read_run(tmp_path / "run" / "lost-step-00000006")
    assert not torch.equal(lost.weights[f"{name}.lora_up"], saved.weights[f"{name}.lora_up"])

    # Under a looser limit the same command goes on from there.
    scripted(monkeypatch, 2.2, 2.2)
    assert cli.main([*train, "--max-text-loss", "1.2"]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["exported_step"] == 8


def test_without_a_good_checkpoint_nothing_is_exported(
    small: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(small_model(small), tmp_path / "model")
    small.save(tmp_path / "model")
    write_shards(tmp_path / "mine", texts(40), Processor.from_folder(tmp_path / "model"))
    (tmp_path / "mine.yaml").write_text("sources: [{path: mine}]")
    (tmp_path / "prose.txt").write_text("A text that is in no training data, and that is lost at once. " * 8)
    options = "--steps 8 --pack-tokens 128 --packs-per-step 1 --lr 0.3 --warmup-steps 1 --replay none --dtype float32"
    monkeypatch.chdir(tmp_path)
    train = ["train", "--model", "model", "--data", "mine.yaml", "--out", "run", *options.split()]
    assert cli.main([*train, "--held-out-text", "prose.txt"]) == 1, "a rate of 0.3 wrecks a model"
    assert "no checkpoint lies before it, so nothing was exported" in capsys.readouterr().out
    assert not (tmp_path / "run" / "export").exists()
