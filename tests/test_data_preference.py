"""Pref records: a typed rejected answer, checked and written like messages, and the two samples a record gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_files import picture, processor, write_shards
from qvl.data.index import read_index
from qvl.data.preference import preference_samples
from qvl.data.preview import preview_page
from qvl.data.record import Record, read_record, record_from_dict, record_to_json
from qvl.data.report import verify
from qvl.data.shard import Entry
from qvl.data.store import Store
from qvl.outside.workers import InProcess
from qvl.prompt.processor import Processor


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Processor:
    return processor(tmp_path_factory.mktemp("model"))


QUESTION = {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "Which?"}]}


def pair(**changes: Any) -> dict[str, Any]:
    data = {
        "id": "p",
        "kind": "pref",
        "media": {"0.png": {"w": 96, "h": 64}},
        "messages": [QUESTION, {"role": "assistant", "content": "A cat."}],
        "rejected": [{"role": "assistant", "content": "Dog"}],
    }
    return data | changes


TEXT = {"media": {}, "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}


def of(data: dict[str, Any], **media: bytes) -> Entry:
    return Entry(record=record_from_dict(data), media={"0.png": picture(1)} | media)


def targets(small: Processor, sample: Any) -> str:
    return small.tokenizer.decode(sample.token_T[sample.is_target_T].tolist())


# ---- samples


@pytest.mark.parametrize("changes", [{}, TEXT])
def test_a_pair_is_two_samples_with_one_prompt_and_the_same_visuals(small, changes) -> None:
    chosen, rejected = preference_samples(of(pair(**changes)), small)
    start = int(chosen.is_target_T.nonzero()[0])
    assert int(rejected.is_target_T.nonzero()[0]) == start
    assert torch.equal(chosen.token_T[:start], rejected.token_T[:start])
    assert targets(small, chosen) == ("Hello!" if changes else "A cat.") + "<|im_end|>"
    assert targets(small, rejected) == "Dog<|im_end|>"
    assert small.tokenizer.decode(chosen.token_T[:start].tolist()).endswith("<|im_start|>assistant\n")
    if changes:
        assert chosen.patch_PX is None and rejected.patch_PX is None
    else:
        assert chosen.patch_PX is rejected.patch_PX and chosen.patch_PX.shape[0] == int(chosen.grid_I3.prod(1).sum())
        assert torch.equal(chosen.grid_I3, rejected.grid_I3)


class Counting(InProcess):
    """Counts what is decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[str] = []

    def run(self, name: str, *args: Any, **more: Any) -> Any:
        self.runs.append(name)
        return super().run(name, *args, **more)


def test_the_media_of_a_pair_are_decoded_once(small) -> None:
    decoder = Counting()
    preference_samples(of(pair()), small, decoder)
    assert len(decoder.runs) == 1


def test_the_chosen_sample_is_what_the_same_conversation_gives_alone(small) -> None:
    chosen, rejected = preference_samples(of(pair()), small)
    for sample, answer in ((chosen, "A cat."), (rejected, "Dog")):
        messages = [
            {"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "Which?"}]},
            {"role": "assistant", "content": answer},
        ]
        alone = small(messages, add_generation_prompt=False, targets="all").sample
        assert torch.equal(sample.token_T, alone.token_T) and torch.equal(sample.is_target_T, alone.is_target_T)
        assert torch.equal(sample.patch_PX, alone.patch_PX)


def test_turns_that_both_answers_begin_with_are_no_targets(small) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "42"}
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    good, bad = ({"role": "assistant", "content": text} for text in ("It is 42.", "No."))
    data = pair(media={}, messages=[*before, call, result, good], rejected=[call, result, bad])
    chosen, rejected = preference_samples(of(data), small)
    assert targets(small, chosen) == "It is 42.<|im_end|>" and targets(small, rejected) == "No.<|im_end|>"


def test_answers_that_part_at_a_call_are_targets_from_there_on(small) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    data = pair(rejected=[call, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "42"}])
    _, rejected = preference_samples(of(data), small)
    assert targets(small, rejected) == (
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>42<|im_end|>'
    )


def test_an_image_in_one_answer_is_that_sample_s_alone(tmp_path) -> None:
    thinking = processor(tmp_path, template="thinking")
    shows = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "Dog"}]
    media = {"0.png": {"w": 96, "h": 64}, "1.png": {"w": 64, "h": 64}}
    data = pair(media=media, rejected=[{"role": "assistant", "content": shows}])
    chosen, rejected = preference_samples(of(data, **{"1.png": picture(2, 64, 64)}), thinking)
    count = int(chosen.grid_I3.prod(1).sum())
    assert chosen.patch_PX.shape[0] == count and rejected.patch_PX.shape[0] == count + 16
    assert torch.equal(chosen.patch_PX, rejected.patch_PX[:count])


def test_an_answer_without_a_target_is_refused(small) -> None:
    data = pair(rejected=[{"role": "assistant", "content": "Dog", "weight": 0}])
    with pytest.raises(ValueError, match="record 'p' has nothing to train in its rejected answer"):
        preference_samples(of(data), small)


def test_only_pref_records_are_pairs(small) -> None:
    data = pair(kind="sft")
    del data["rejected"]
    with pytest.raises(ValueError, match="record 'p' is of kind sft; only pref records are pairs"):
        preference_samples(of(data), small)


# ---- records


def test_the_rejected_answer_survives_json() -> None:
    record = record_from_dict(pair())
    assert record.rejected == ({"role": "assistant", "content": "Dog"},)
    assert read_record(record_to_json(record)) == record


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rejected": []}, "record 'p' has no rejected messages; expected at least one"),
        ({"rejected": "Dog"}, "rejected is a str; expected a list"),
        ({"rejected": [{"role": "bot", "content": ""}]}, r"rejected\[0\] has the role 'bot'; expected one of system"),
        ({"rejected": [{"role": "assistant", "contents": ""}]}, r"rejected\[0\] has an unknown key 'contents'"),
        (
            {"rejected": [{"role": "assistant", "content": [{"type": "image", "image": "9.png"}]}]},
            r"rejected\[0\].content\[0\] shows '9.png', which is not among the record's media",
        ),
        (
            {"rejected": [QUESTION, {"role": "assistant", "content": "Dog"}]},
            "rejected messages of the roles user, assis",
        ),
        (
            {"rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]},
            "that is the chosen one",
        ),
        ({"messages": [QUESTION]}, "without a question and an answer"),
        ({"kind": "sft"}, "is a sft record with rejected messages; only pref records have them"),
    ],
)
def test_what_is_wrong_with_a_pair_is_said_in_a_sentence(changes, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        record_from_dict(pair(**changes))


def before_the_field(rejected: Any) -> bytes:
    data = pair(extra={"rejected": rejected, "found": 3})
    del data["rejected"]
    return json.dumps(data).encode()


def test_an_older_record_s_rejected_text_moves_into_its_field() -> None:
    record = read_record(before_the_field("Dog"))
    assert record.rejected == ({"role": "assistant", "content": "Dog"},) and record.extra == {"found": 3}


@pytest.mark.parametrize("rejected", [[{"role": "assistant", "content": "x"}], "<think>\nx\n</think>\n\ny"])
def test_an_older_record_whose_rejected_answer_is_a_row_s_is_refused(rejected) -> None:
    with pytest.raises(
        ValueError, match="record 'p' keeps its rejected answer in extra, in the form of the row it came"
    ):
        read_record(before_the_field(rejected))


# ---- index


def test_the_index_counts_both_conversations_and_verify_reads_both(small, tmp_path: Path) -> None:
    entries: list[tuple[Record, dict[str, bytes]]] = [(record_from_dict(pair()), {"0.png": picture(1)})]
    (shard,) = write_shards(tmp_path, entries, small)
    index = read_index(str(shard), None)
    chosen, rejected = preference_samples(of(pair()), small)
    assert int(index.text_S[0] + index.visual_S[0]) == chosen.num_tokens + rejected.num_tokens
    assert int(index.target_S[0]) == len("A cat.") + 1 + len("Dog") + 1
    assert list(verify([index], small, InProcess(), Store())) == []


def test_the_preview_shows_both_answers_as_learned(small) -> None:
    page = preview_page([of(pair())], small, InProcess(), title="pairs")
    assert page.count("Which?") == 2 and "the chosen answer, then the rejected one" in page
    assert '<span class="learned">A cat.</span>' in page and '<span class="learned">Dog</span>' in page
