"""Prompts: what an rl record asks and is judged by, and a stream of them that any ranks share and any step resumes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_files import chats, clip, mixture, model_config, picture, processor, write_shards
from media_files import pdf
from qvl.data.index import read_index
from qvl.data.loader import make_loader
from qvl.data.mixture import Mixture, mixture_from_dict
from qvl.data.prompts import Prompt, PromptStream, make_prompts, prompt_of
from qvl.data.record import Record, record_from_dict
from qvl.data.shard import Entry
from qvl.outside.workers import InProcess
from qvl.prompt.message import user
from qvl.prompt.processor import Processor
from qvl.scoring.registry import score_answers


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Processor:
    return processor(tmp_path_factory.mktemp("model"))


REWARD = {"scorer": "exact", "truth": {"answer": "cat"}}


def asked(content: Any, *more: dict[str, Any], **changes: Any) -> Record:
    data = {"id": "q", "kind": "rl", "category": "vqa", "messages": [{"role": "user", "content": content}, *more]}
    return record_from_dict(data | {"reward": REWARD} | changes)


IMAGE = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "Which?"}]
SIZE = {"0.png": {"w": 96, "h": 64}}


# ---- one record


def test_a_prompt_ends_where_the_assistant_begins_and_has_no_targets(small) -> None:
    prompt = prompt_of(Entry(record=asked(IMAGE, media=SIZE), media={"0.png": picture(1)}), small)
    expected = small([{"role": "user", "content": [{"type": "image", "image": picture(1)}, IMAGE[1]]}]).sample
    assert torch.equal(prompt.sample.token_T, expected.token_T)
    assert torch.equal(prompt.sample.patch_PX, expected.patch_PX)
    assert torch.equal(prompt.sample.grid_I3, expected.grid_I3)
    assert prompt.sample.is_target_T is None
    assert small.tokenizer.decode(prompt.sample.token_T.tolist()).endswith("Which?<|im_end|>\n<|im_start|>assistant\n")


def test_a_text_prompt_is_its_ids_alone(small) -> None:
    prompt = prompt_of(Entry(record=asked("Hi"), media={}), small)
    assert small.tokenizer.decode(prompt.sample.token_T.tolist()) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.sample.patch_PX is None and prompt.example.messages == (user("Hi"),)


def test_the_answer_of_a_record_is_no_part_of_its_prompt(small) -> None:
    answer = {"role": "assistant", "content": "a cat"}
    without, with_it = (prompt_of(Entry(record=asked("Hi", *more), media={}), small) for more in ((), (answer,)))
    assert torch.equal(without.sample.token_T, with_it.sample.token_T)
    assert without.example.messages == with_it.example.messages
    assert (without.example.answer, with_it.example.answer) == ("", "a cat")
    told = asked("Hi", answer, reward=REWARD | {"answer": "cat"})
    assert prompt_of(Entry(record=told, media={}), small).example.answer == "cat"


def test_an_episode_is_continued_after_the_tool_has_answered(small) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    prompt = prompt_of(Entry(record=asked("Hi", call, {"role": "tool", "content": "42"}), media={}), small)
    text = small.tokenizer.decode(prompt.sample.token_T.tolist())
    assert text.endswith("42\n</tool_response><|im_end|>\n<|im_start|>assistant\n") and "<tool_call>" in text


def test_the_thinking_template_opens_the_thought(tmp_path) -> None:
    prompt = prompt_of(Entry(record=asked("Hi"), media={}), thinking := processor(tmp_path, template="thinking"))
    assert thinking.tokenizer.decode(prompt.sample.token_T.tolist()).endswith("assistant\n<think>\n")


def test_the_example_is_rebuilt_and_judged_by_its_scorer(small) -> None:
    example = prompt_of(Entry(record=asked(IMAGE, media=SIZE), media={"0.png": picture(1)}), small).example
    assert (example.id, example.category, example.scorer, example.truth) == ("q", "vqa", "exact", REWARD["truth"])
    right, wrong = score_answers(example, ["cat", "dog"])
    assert (right.value, wrong.value) == (1.0, 0.0)


FRAMES = {"type": "video", "video": ["0.png", "1.png"], "fps": 1.0}


@pytest.mark.parametrize(
    ("block", "facts", "media"),
    [
        ({"type": "image", "image": "0.png", "max_tokens": 4}, SIZE, {"0.png": picture(1)}),
        (
            {"type": "video", "video": "0.mp4"},
            {"0.mp4": {"w": 96, "h": 64, "num_frames": 8, "fps": 4.0}},
            {"0.mp4": clip(8)},
        ),
        (FRAMES, {"0.png": SIZE["0.png"], "1.png": SIZE["0.png"]}, {"0.png": picture(1), "1.png": picture(2)}),
        (
            {"type": "document", "document": "0.pdf", "pages": "2"},
            {"0.pdf": {"page_sizes": [[200, 100], [100, 200]]}},
            {"0.pdf": pdf([(200, 100), (100, 200)])},
        ),
    ],
)
def test_the_example_s_messages_give_the_prompt_again(small, block, facts, media) -> None:
    record = asked([block, {"type": "text", "text": "?"}], media=facts, time_style="hms")
    prompt = prompt_of(Entry(record=record, media=media), small)
    again = small(prompt.example.messages, label_style="hms").sample
    assert torch.equal(again.token_T, prompt.sample.token_T) and torch.equal(again.grid_I3, prompt.sample.grid_I3)
    assert torch.equal(again.patch_PX, prompt.sample.patch_PX)


def test_a_prompt_is_made_of_rl_records_alone(small) -> None:
    record, media = chats(1)[0]
    with pytest.raises(ValueError, match="record 'chat-0' is of kind sft; prompts are made of rl records"):
        prompt_of(Entry(record=record, media=media), small)


# ---- a stream


@pytest.fixture(scope="module")
def data(tmp_path_factory, small) -> Path:
    """24 prompts on images in two shards, 40 of text."""
    folder = tmp_path_factory.mktemp("data")
    seen = [(asked(IMAGE, id=f"seen-{i}", media=SIZE), {"0.png": picture(i)}) for i in range(24)]
    write_shards(folder / "seen", seen, small, max_records=16)
    read = [(asked("word " * (1 + i % 7), id=f"read-{i}", category="text"), {}) for i in range(40)]
    write_shards(folder / "read", read, small)
    return folder


def stream(where: Mixture | Path, small: Processor, **more: Any) -> PromptStream:
    made = mixture(where / "seen", where / "read") if isinstance(where, Path) else where
    options = {"prompts_per_step": 8, "max_tokens": 200, "max_patches": 100, "seed": 3, "decoder": InProcess()} | more
    return make_prompts(made, small, model_config(small), **options)


def ids(made: PromptStream, count: int) -> list[list[str]]:
    return [[prompt.id for prompt in made.next_step()] for _ in range(count)]


def test_a_step_gives_prompts_with_their_ids_and_categories(data, small) -> None:
    with stream(data, small) as made:
        prompts = [prompt for _ in range(8) for prompt in made.next_step()]
        assert made.num_prompts == 64 and made.num_rejected == 0 and made.step == 8
    assert len(prompts) == 64 and all(isinstance(prompt, Prompt) for prompt in prompts)
    assert all(prompt.category == ("vqa" if prompt.id.startswith("seen") else "text") for prompt in prompts)
    assert [int(prompt.sample.patch_PX is not None) for prompt in prompts] == [p.id.startswith("seen") for p in prompts]


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_each_step_has_its_sources_in_their_shares(data, small, weight: float) -> None:
    sources = [{"path": str(data / "seen"), "weight": weight, "category": "mine"}, {"path": str(data / "read")}]
    with stream(mixture_from_dict({"sources": sources}), small) as made:
        counts = [Counter(prompt.category for prompt in made.next_step()) for _ in range(6)]
    assert counts == [Counter({"mine": round(8 * weight / (1 + weight)), "text": round(8 / (1 + weight))})] * 6


def test_an_epoch_brings_every_prompt_once_in_an_order_of_the_seed(data, small) -> None:
    sources = [{"path": str(data / name), "max_epochs": 1} for name in ("seen", "read")]
    orders = []
    for seed in (3, 4):
        with stream(mixture_from_dict({"sources": sources}), small, seed=seed) as made:
            orders.append([id for step in iter(made.next_step, []) for id in (prompt.id for prompt in step)])
    assert (
        sorted(orders[0])
        == sorted(orders[1])
        == sorted([f"seen-{i}" for i in range(24)] + [f"read-{i}" for i in range(40)])
    )
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 2)])
def test_ranks_get_disjoint_prompts_whose_union_is_one_rank_s(data, small, world_size: int, workers: int) -> None:
    with stream(data, small) as alone:
        expected, state = ids(alone, 5), alone.state()
    shared: list[list[str]] = [[] for _ in range(5)]
    for rank in range(world_size):
        with stream(data, small, rank=rank, world_size=world_size, workers=workers) as made:
            for number, step in enumerate(ids(made, 5)):
                assert len(step) == 8 // world_size and not set(step) & set(shared[number])
                shared[number] += step
            assert made.state() == state
    assert [sorted(step) for step in shared] == [sorted(step) for step in expected]


@given(stop=st.integers(0, 9), ranks=st.sampled_from([1, 2]), workers=st.sampled_from([0, 2]), seed=st.integers(0, 9))
@settings(max_examples=8, deadline=None)
@pytest.mark.no_shape_hook
def test_resuming_at_any_step_is_as_if_it_had_never_stopped(data, small, stop, ranks, workers, seed) -> None:
    with stream(data, small, seed=seed) as whole:
        expected = ids(whole, 10)
    with stream(data, small, seed=seed, workers=workers) as first:
        assert ids(first, stop) == expected[:stop]
        state = json.loads(json.dumps(first.state()))
    rest: list[list[str]] = [[] for _ in range(10 - stop)]
    for rank in range(ranks):
        with stream(data, small, seed=seed, rank=rank, world_size=ranks) as second:
            second.restore(state)
            for number, step in enumerate(ids(second, 10 - stop)):
                rest[number] += step
    assert [sorted(step) for step in rest] == [sorted(step) for step in expected[stop:]]


def test_too_long_prompts_are_rejected_and_counted(data, small) -> None:
    with stream(data, small, max_tokens=45) as made:
        assert made.num_rejected == 10 and made.num_prompts == 54
        made.restore(made.state())
    with stream(data, small) as other, pytest.raises(ValueError, match="saved with another records"):
        other.restore(made.state())
    with pytest.raises(
        ValueError, match=r"all 24 prompts of .* have more than 200 tokens or 23 patches; raise max_tok"
    ):
        stream(data, small, max_patches=23)


def test_a_prompt_that_cannot_be_read_is_replaced_by_one_of_its_source(small, tmp_path) -> None:
    good = [(asked(IMAGE, id=f"good-{i}", media=SIZE), {"0.png": picture(i)}) for i in range(8)]
    bad = (asked(IMAGE, id="bad", media=SIZE), {"0.png": b"no picture"})
    write_shards(tmp_path / "d", [*good[:4], bad, *good[4:]], small)
    write_shards(tmp_path / "text", [(asked("Hi", id="text", category="text"), {})], small)
    with stream(
        mixture(tmp_path / "d", tmp_path / "text"), small, prompts_per_step=2, max_bad_rate=1.0, out=tmp_path / "out"
    ) as made:
        steps = [made.next_step() for _ in range(18)]
    assert all({prompt.category for prompt in step} == {"vqa", "text"} for step in steps)
    assert "bad" not in {prompt.id for step in steps for prompt in step}
    assert json.loads((tmp_path / "out/quarantine.jsonl").read_text().splitlines()[0])["id"] == "bad"


def test_the_index_counts_the_prompt_alone(small, tmp_path) -> None:
    answer = {"role": "assistant", "content": "x" * 50}
    (shard,) = write_shards(tmp_path, [(asked("Hi"), {}), (asked("Hi", answer), {})], small)
    index = read_index(str(shard), None)
    assert index.text_S[0] == index.text_S[1] and not index.target_S.any()


@pytest.mark.parametrize("kind", ["rl", "pref"])
def test_the_loader_of_packs_refuses_prompts_and_pairs_in_one_sentence(small, tmp_path, kind: str) -> None:
    record = asked("Hi")
    if kind == "pref":
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        data = {"id": "p", "kind": "pref", "messages": turns, "rejected": [{"role": "assistant", "content": "c"}]}
        record = record_from_dict(data)
    write_shards(tmp_path / "d", [(record, {})], small)
    options: dict[str, Any] = {"pack_tokens": 64, "pack_patches": 64, "packs_per_step": 1, "seed": 0}
    with pytest.raises(ValueError, match=f"holds {kind} records; the loader takes pretrain and sft records"):
        make_loader(mixture(tmp_path / "d"), small, model_config(small), **options)


def test_a_stream_of_prompts_refuses_other_records_and_odd_splits(data, small, tmp_path) -> None:
    write_shards(tmp_path / "sft", chats(2), small)
    with pytest.raises(ValueError, match="holds sft records; the loader takes rl records"):
        stream(mixture(tmp_path / "sft"), small)
    with pytest.raises(ValueError, match="rank 0 of 3 with 8 prompts a step"):
        stream(data, small, world_size=3)
