"""What is replayed beside the user's data: files of theirs, or what the model writes itself before it learns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_files import processor, texts, write_shards
from qvl.data.index import fingerprint, read_index
from qvl.data.mixture import Mixture, mixture_from_dict
from qvl.engine.generate import Generation
from qvl.finetune.rehearsal import rehearse, whole_sentences
from qvl.finetune.replay import ReplayChoice, with_replay
from qvl.model.qwen3vl import Qwen3VL
from qvl.parallel.data_parallel import World
from qvl.prompt.processor import Processor
from qvl.session import Session
from tune_files import small_model

ALONE = World(0, 1, torch.device("cpu"))


def choice(folder: Path, what: str = "auto", **changes: Any) -> ReplayChoice:
    given = {"model": "base", "share": 0.1, "samples": 512, "run_tokens": 4000, "pack_tokens": 64, "seed": 0} | changes
    return ReplayChoice(what=what, folder=folder / "replay", **given)


@pytest.fixture
def small(tmp_path: Path) -> Processor:
    return processor(tmp_path / "model")


@pytest.fixture
def model(small: Processor) -> Qwen3VL:
    return small_model(small)


def mine(folder: Path, small: Processor, **more: Any) -> Mixture:
    write_shards(folder / "mine", texts(4), small)
    return mixture_from_dict({"sources": [{"path": "mine"}], "folder": str(folder), **more})


def shares(mixture: Mixture) -> dict[str, float]:
    return {Path(source.path).name.split("-")[0]: round(source.weight, 6) for source in mixture.resolved()}


def written(text: str, finish: str, small: Processor) -> Generation:
    ids = small.tokenizer.encode_control(text)
    return Generation(
        tokens=tuple(ids),
        logprobs=(),
        top_logprobs=(),
        is_forced=(),
        text=text,
        finish=finish,  # type: ignore[arg-type]
    )


# ---- what the model writes ----------------------------------------------------------------------------------------


def test_what_the_model_writes_becomes_texts_and_chats(
    small: Processor, model: Qwen3VL, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(
        [
            [written("The sea is calm. The boats are", "length", small), written("All is said.", "stop", small)],
            [
                written("Why is it calm?", "stop", small),
                written(" ", "stop", small),
                written("And why", "length", small),
            ],
            [written("No wind.", "stop", small), written("Because the", "length", small)],
        ]
    )
    prompts = []

    def scripted(session: Session, samples: Any, sampling: Any) -> list[Generation]:
        prompts.append([small.tokenizer.decode(sample.token_T.tolist()) for sample in samples])
        return next(said)

    monkeypatch.setattr(Session, "generate", scripted)
    records = rehearse(model, small, [0, 1], [0, 1, 2], pack_tokens=64, seed=0)

    assert prompts[:2] == [["<|endoftext|>"] * 2, ["<|im_start|>user\n"] * 3]
    assert prompts[2][0] == "<|im_start|>user\nWhy is it calm?<|im_end|>\n<|im_start|>assistant\n"
    assert [(r.id, r.kind, r.category, r.messages[-1]) for r in records] == [
        ("replay-text-0", "pretrain", "replay/text", {"role": "document", "content": "The sea is calm."}),
        ("replay-text-1", "pretrain", "replay/text", {"role": "document", "content": "All is said."}),
        ("replay-chat-0", "sft", "replay/chat", {"role": "assistant", "content": "No wind."}),
    ], "a text is cut after a whole sentence, an empty question and an answer without an end are left out"


def test_a_thought_stays_a_thought(tmp_path: Path, model: Qwen3VL, monkeypatch: pytest.MonkeyPatch) -> None:
    thinking = processor(tmp_path / "thinking", template="thinking")
    said = iter([[written("Two and two?", "stop", thinking)], [written("Add.\n</think>\n\nFour.", "stop", thinking)]])
    monkeypatch.setattr(Session, "generate", lambda *_: next(said))
    (record,) = rehearse(model, thinking, [], [0], pack_tokens=64, seed=0)
    assert record.messages[-1] == {"role": "assistant", "content": "Four.", "thinking": "Add."}


def test_the_same_seed_writes_the_same_texts_however_the_numbers_are_dealt(small: Processor, model: Qwen3VL) -> None:
    def told(numbers: list[int], seed: int) -> dict[str, Any]:
        records = rehearse(model, small, numbers, [], pack_tokens=16, seed=seed)
        return {record.id: record.messages[0]["content"] for record in records}

    together = told([0, 1, 2], 0)
    assert together == told([0, 2], 0) | told([1], 0)
    assert together != told([0, 1, 2], 1)


def test_a_text_is_cut_after_its_last_whole_sentence() -> None:
    assert whole_sentences('He said "no." Then he') == 'He said "no."'
    assert whole_sentences("Pi is 3.14 and a bit") == "Pi is 3.14 and a bit"
    assert whole_sentences("\u4f60\u597d\u3002 \u6211") == "\u4f60\u597d\u3002"


# ---- the mixture --------------------------------------------------------------------------------------------------


def test_by_default_the_model_writes_its_own_and_a_run_that_goes_on_finds_it_written(
    tmp_path: Path, small: Processor, model: Qwen3VL, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = with_replay(mine(tmp_path, small), choice(tmp_path), model, small, ALONE)
    (shard,) = (tmp_path / "replay").glob("self-*/*.tar")
    tokens = int(read_index(str(shard), fingerprint(small)).text_S.sum())
    share = min(0.1, 4 * tokens / 4000)
    assert share > 0 and shares(first) == {"mine": round(1 - share, 6), "self": round(share, 6)}

    monkeypatch.setattr("qvl.finetune.replay.rehearse", None)  # would fail if it were called
    again = with_replay(mine(tmp_path / "b", small), choice(tmp_path), model, small, ALONE)
    assert shares(again) == shares(first)
    with pytest.raises(TypeError, match="not callable"):  # other wishes are other texts
        with_replay(mine(tmp_path / "c", small), choice(tmp_path, model="another"), model, small, ALONE)


def test_own_texts_come_round_at_most_four_times(
    tmp_path: Path,
    small: Processor,
    model: Qwen3VL,
    caplog: pytest.LogCaptureFixture,
) -> None:
    many = choice(tmp_path, run_tokens=10**6, samples=8)
    mixed = with_replay(mine(tmp_path, small), many, model, small, ALONE)
    (shard,) = (tmp_path / "replay").glob("self-*/*.tar")
    tokens = int(read_index(str(shard), None).text_S.sum())
    assert mixed.replay[0].share == pytest.approx(4 * tokens / 10**6)
    assert "less than the share of 0.1 that was asked for" in caplog.text


@pytest.mark.parametrize("name", ["old.txt", "old.jsonl"])
def test_a_file_of_text_or_rows_is_imported_and_takes_its_share(
    tmp_path: Path, small: Processor, model: Qwen3VL, name: str
) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    (tmp_path / name).write_text("Once there was a text." if name.endswith("txt") else json.dumps(row) + "\n")
    given = choice(tmp_path, str(tmp_path / name), share=0.25)
    mixed = with_replay(mine(tmp_path, small), given, model, small, ALONE)
    assert shares(mixed) == {"mine": 0.75, "file": 0.25}


def test_a_file_that_was_changed_is_imported_anew(tmp_path: Path, small: Processor, model: Qwen3VL) -> None:
    def tokens() -> int:
        mixed = with_replay(mixture, given, model, small, ALONE)
        (source,) = [s for s in mixed.resolved() if "file-" in s.path]
        return sum(int(read_index(str(shard), None).text_S.sum()) for shard in Path(source.path).glob("*.tar"))

    given, mixture = choice(tmp_path, str(tmp_path / "old.txt")), mine(tmp_path, small)
    (tmp_path / "old.txt").write_text("Once there was a text.")
    first = tokens()
    assert tokens() == first
    (tmp_path / "old.txt").write_text("Once there was a text. " * 9)
    assert tokens() > 2 * first


def test_the_mixtures_own_replay_comes_first_and_nothing_is_added_to_it(
    tmp_path: Path, small: Processor, model: Qwen3VL
) -> None:
    (tmp_path / "old.txt").write_text("Once there was a text.")
    mixture = mine(tmp_path, small, replay=[{"path": "old.txt", "share": 0.2}])
    assert shares(with_replay(mixture, choice(tmp_path), model, small, ALONE)) == {"mine": 0.8, "file": 0.2}
    assert shares(with_replay(mixture, choice(tmp_path, "none"), model, small, ALONE)) == {"mine": 1.0}


def test_shards_are_replayed_where_they_lie(tmp_path: Path, small: Processor, model: Qwen3VL) -> None:
    write_shards(tmp_path / "old", texts(3), small)
    mixed = with_replay(mine(tmp_path, small), choice(tmp_path, str(tmp_path / "old")), model, small, ALONE)
    assert shares(mixed) == {"mine": 0.9, "old": 0.1}


def test_a_path_that_is_not_there_is_answered_with_what_may_stand(
    tmp_path: Path, small: Processor, model: Qwen3VL
) -> None:
    with pytest.raises(ValueError, match="slef, which does not exist; give auto, self, none, a mixture file"):
        with_replay(mine(tmp_path, small), choice(tmp_path, "slef"), model, small, ALONE)
