"""Answers: token for token transformers' own, the same alone as in company, cut where they should be."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qvl.core.batch import Sample
from qvl.engine import generate as module
from qvl.engine.generate import Event, Generation, TextOutput, generate, stream
from qvl.engine.kv_cache import KVCache, new_cache
from qvl.engine.sampling import Sampling
from qvl.model.pack import pack
from qvl.model.padded import KEYS, batch_from_padded, split
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import load
from tests.golden import EOS, case_inputs, folder, reference

GREEDY = Sampling(temperature=0.0, max_tokens=12)
CASES = ("text", "image", "multi_image", "video", "two_videos_image")


@cache
def model(name: str) -> Qwen3VL:
    return load(folder(name))


def ours(case: str) -> dict[str, Tensor]:
    """The case without the token types that transformers wants beside the ids."""
    return {key: value for key, value in case_inputs(case).items() if key in KEYS}


def samples(case: str, name: str = "dense_untied") -> list[Sample]:
    """A golden case's rows, one Sample each."""
    batch = batch_from_padded(ours(case), model(name).config)
    whole = Sample(token_T=batch.token_T, patch_PX=batch.patch_PX, grid_I3=batch.grid_I3)
    return split(whole, batch.lengths, model(name).config)


def mixed(name: str = "dense_untied") -> list[Sample]:
    """Text, pictures and video: five prompts of five lengths."""
    return [sample for case in CASES for sample in samples(case, name)]


def theirs(name: str, inputs: dict[str, Tensor], eos: int | None = None, **more: Any) -> Any:
    hf = reference(name)
    hf.model.rope_deltas = None
    settings = dict(do_sample=False, max_new_tokens=12, return_dict_in_generate=True, output_logits=True)
    return hf.generate(**inputs, **settings, eos_token_id=eos, pad_token_id=0, **more)


class Letters:
    """A text stream in which a token is a letter."""

    def push(self, id: int) -> str:
        return letter(id)

    def end(self) -> str:
        return ""


def letter(token: int) -> str:
    return chr(ord("a") + token % 26)


def text_of(tokens: Sequence[int]) -> str:
    return "".join(map(letter, tokens))


# A logprob near -10 has 1e-6 between two fp32 numbers, hence the relative part.
NEAR: dict[str, float] = dict(atol=1e-5, rtol=5e-6)


def assert_same(a: Generation, b: Generation) -> None:
    assert a.tokens == b.tokens
    assert a.finish == b.finish
    assert a.text == b.text
    torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), **NEAR)


# ---- the same as transformers


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["dense_tied", "dense_untied", "moe", "moe_mixed"])
def test_greedy_tokens_equal_transformers(name: str, case: str) -> None:
    expected = theirs(name, case_inputs(case))
    first_new = case_inputs(case)["input_ids"].shape[1]
    scores = torch.cat(expected.logits)
    best = scores.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3  # no step is so close that rounding may decide it

    [found] = generate(model(name), samples(case, name), GREEDY)

    assert list(found.tokens) == expected.sequences[0, first_new:].tolist()
    own = scores.log_softmax(-1)[torch.arange(12), torch.tensor(found.tokens)]
    torch.testing.assert_close(torch.tensor(found.logprobs), own, atol=2e-4, rtol=0)
    assert found.finish == "length"


@pytest.mark.parametrize("name", ["dense_untied", "moe"])
def test_greedy_tokens_of_several_prompts_equal_transformers_padded_batch(name: str) -> None:
    inputs = case_inputs("batch_left")
    expected = theirs(name, inputs).sequences[:, inputs["input_ids"].shape[1] :]
    found = generate(model(name), samples("batch_left", name), GREEDY)
    assert [list(g.tokens) for g in found] == expected.tolist()


def test_the_end_token_ends_an_answer_where_transformers_ends_it() -> None:
    inputs = case_inputs("image")
    expected = theirs("moe_mixed", inputs, eos=EOS).sequences[0, inputs["input_ids"].shape[1] :].tolist()
    [found] = generate(model("moe_mixed"), samples("image", "moe_mixed"), GREEDY, end_tokens=frozenset({EOS}))
    assert list(found.tokens) == expected
    assert found.tokens[-1] == EOS
    assert len(found.tokens) < 12
    assert found.finish == "stop"


def test_penalties_and_sampling_filters_equal_transformers_greedy_with_the_same_penalty() -> None:
    inputs = case_inputs("image")
    expected = theirs("dense_untied", inputs, repetition_penalty=1.7).sequences[0, inputs["input_ids"].shape[1] :]
    [found] = generate(model("dense_untied"), samples("image"), replace(GREEDY, repetition_penalty=1.7))
    assert list(found.tokens) == expected.tolist()
    [plain] = generate(model("dense_untied"), samples("image"), GREEDY)
    assert found.tokens != plain.tokens


# ---- the same as the packed forward, alone, in company, in chunks


@pytest.mark.parametrize("name", ["dense_untied", "moe"])
def test_logprobs_equal_the_packed_forwards(name: str) -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=3, max_tokens=10, num_logprobs=3)
    prompts = mixed(name)
    for prompt, answer in zip(prompts, generate(model(name), prompts, sampling), strict=True):
        whole = replace(prompt, token_T=torch.cat((prompt.token_T, torch.tensor(answer.tokens))))
        with torch.no_grad():
            logits = model(name).logits(model(name)(pack([whole], model(name).config)))
        own = logits[prompt.num_tokens - 1 : -1].log_softmax(-1)
        expected = own[torch.arange(len(answer.tokens)), torch.tensor(answer.tokens)]
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, **NEAR)
        for step, alternatives in enumerate(answer.top_logprobs):
            assert [token for token, _ in alternatives] == own[step].topk(3).indices.tolist()


@pytest.mark.parametrize("name", ["dense_untied", "moe"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.3, top_k=30, max_tokens=12, seed=11)])
def test_an_answer_in_company_is_the_answer_alone(name: str, sampling: Sampling) -> None:
    prompts = mixed(name)
    together = generate(model(name), prompts, sampling)
    for prompt, answer in zip(prompts, together, strict=True):
        [alone] = generate(model(name), [prompt], sampling)
        assert_same(answer, alone)


def test_a_seed_gives_the_same_answer_whoever_else_is_there() -> None:
    prompt, others = samples("image")[0], [*samples("text"), *samples("video")]
    seeded = Sampling(temperature=1.5, seed=7, max_tokens=16)

    def answer(place: int, company: list[Sample]) -> tuple[int, ...]:
        prompts = [*company[:place], prompt, *company[place:]]
        each = [
            Sampling(temperature=1.5, max_tokens=5 + 9 * i) for i in range(len(prompts))
        ]  # the others draw unseeded
        each[place] = seeded
        return generate(model("dense_untied"), prompts, each)[place].tokens

    alone = answer(0, [])
    assert answer(0, others) == answer(1, others) == answer(2, others) == alone
    [other] = generate(model("dense_untied"), [prompt], replace(seeded, seed=8))
    assert other.tokens != alone


@pytest.mark.parametrize("name", ["dense_untied", "moe"])
def test_a_prompt_in_chunks_of_any_size_is_the_whole_prompt(name: str) -> None:
    prompts = [*samples("two_videos_image", name), *samples("image", name)]
    total = sum(p.num_tokens for p in prompts)
    whole = generate(model(name), prompts, GREEDY, max_prefill_tokens=total)
    for size in (1, 2, 3, 5, 7, 16, 33, prompts[0].num_tokens, prompts[0].num_tokens + 1, total - 1):
        for answer, expected in zip(
            generate(model(name), prompts, GREEDY, max_prefill_tokens=size), whole, strict=True
        ):
            assert_same(answer, expected)


@pytest.mark.parametrize("block_size", [1, 3, 16, 500])
def test_the_size_of_cache_blocks_changes_nothing(block_size: int) -> None:
    def tokens(size: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in mixed()]
        for event in stream(model("dense_untied"), mixed(), GREEDY, block_size=size):
            answers[event.request].append(event.draw.token)
        return answers

    assert tokens(block_size) == tokens(64)


def test_scattered_cache_blocks_give_the_same_answers_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[Generation]:
        return generate(model("moe"), mixed("moe"), GREEDY)

    def shuffled_cache(*args: Any, **settings: Any) -> KVCache:
        cache = new_cache(*args, **settings | dict(num_blocks=settings["num_blocks"] * 16, block_size=4))
        random.Random(0).shuffle(cache.free)
        return cache

    in_a_row = answers()
    monkeypatch.setattr(module, "new_cache", shuffled_cache)
    assert answers() == in_a_row


def test_answers_of_different_lengths_leave_the_batch_one_by_one() -> None:
    each = [replace(GREEDY, max_tokens=n) for n in (1, 9, 3, 12, 5)]
    found = generate(model("dense_untied"), mixed(), each)
    whole = generate(model("dense_untied"), mixed(), GREEDY)
    assert [len(g.tokens) for g in found] == [1, 9, 3, 12, 5]
    assert [g.tokens for g in found] == [w.tokens[: len(g.tokens)] for g, w in zip(found, whole, strict=True)]
    assert {g.finish for g in found} == {"length"}


# ---- where an answer ends


def greedy_tokens() -> tuple[int, ...]:
    """dense_untied's answer to the golden text: 12 tokens, no two alike."""
    [found] = generate(model("dense_untied"), samples("text"), GREEDY)
    assert len(set(found.tokens)) == 12
    return found.tokens


def test_the_end_token_is_counted_but_not_shown() -> None:
    tokens = greedy_tokens()
    [found] = generate(
        model("dense_untied"), samples("text"), GREEDY, end_tokens=frozenset({tokens[3]}), text_stream=Letters
    )
    assert found.tokens == tokens[:4]
    assert found.text == text_of(tokens[:3])
    assert found.finish == "stop"


def test_ignore_eos_goes_on_to_the_last_token() -> None:
    tokens = greedy_tokens()
    sampling = replace(GREEDY, ignore_eos=True)
    [found] = generate(model("dense_untied"), samples("text"), sampling, end_tokens=frozenset(tokens))
    assert found.tokens == tokens
    assert found.finish == "length"


def test_a_stop_string_over_several_tokens_ends_the_answer_before_it() -> None:
    tokens = greedy_tokens()
    text = text_of(tokens)
    stop = text[4:7]
    assert text.find(stop) == 4
    sampling = replace(GREEDY, stop=("ZZ", stop))
    [found] = generate(model("dense_untied"), samples("text"), sampling, text_stream=Letters)
    assert found.tokens == tokens[:7]
    assert found.text == text[:4]
    assert found.finish == "stop"


def test_the_beginning_of_a_stop_string_is_shown_when_the_answer_ends_without_the_rest() -> None:
    text = text_of(greedy_tokens())
    sampling = replace(GREEDY, stop=(text[-2:] + "!",))
    events = list(stream(model("dense_untied"), samples("text"), sampling, text_stream=Letters))
    assert [event.text for event in events] == [*text[:10], "", text[-2:]]
    assert events[-1].finish == "length"


def test_an_answer_ends_where_the_models_length_ends() -> None:
    short = load(folder("dense_untied"))
    short.config = replace(short.config, text=replace(short.config.text, max_position_embeddings=20))
    [found] = generate(short, samples("text"), GREEDY)  # the prompt has 17
    assert found.tokens == greedy_tokens()[:3]
    assert found.finish == "length"


LETTERS = st.text("ab", max_size=12)


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """Letter by letter: what stands before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=400, deadline=None, derandomize=True)
@given(pieces=st.lists(LETTERS, max_size=6), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
@example(pieces=["aabab"], stops=["abab", "ba"])
@example(pieces=["aab", "ab"], stops=["abab", "ba"])
def test_however_the_text_is_cut_what_is_shown_ends_before_the_first_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    expected, is_stopped = first_stop("".join(pieces), tuple(stops))

    class Pieces:
        def push(self, id: int) -> str:
            return pieces[id]

        def end(self) -> str:
            return ""

    output = TextOutput(tuple(stops), Pieces())
    shown = ""
    for number in range(len(pieces)):
        shown += output.push(number)
        assert expected.startswith(shown)
        if output.is_stopped:
            break
    shown += output.end()
    assert shown == expected
    assert output.is_stopped == is_stopped


def test_a_stop_string_in_what_the_stream_held_back_counts() -> None:
    class Late:
        def push(self, id: int) -> str:
            return "x"

        def end(self) -> str:
            return "<end>more"

    output = TextOutput(("<end>",), Late())
    assert output.push(0) + output.end() == "x"
    assert output.is_stopped


# ---- streaming


def test_events_come_one_a_token_and_their_texts_joined_are_the_answer() -> None:
    sampling = replace(GREEDY, stop=("zz!",))
    events: list[Event] = list(stream(model("dense_untied"), mixed(), sampling, text_stream=Letters))
    whole = generate(model("dense_untied"), mixed(), sampling, text_stream=Letters)
    for number, answer in enumerate(whole):
        own = [event for event in events if event.request == number]
        assert tuple(event.draw.token for event in own) == answer.tokens
        assert "".join(event.text for event in own) == answer.text == text_of(answer.tokens)
        assert [event.finish for event in own] == [None] * (len(own) - 1) + ["length"]


def test_a_stream_leaves_no_inference_mode_behind_while_it_waits() -> None:
    events = stream(model("dense_untied"), samples("text"), GREEDY)
    next(events)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    events.close()


def test_no_prompts_give_no_answers() -> None:
    assert generate(model("dense_untied"), [], GREEDY) == []


# ---- what is refused


def refused(sentence: str, prompts: list[Sample], sampling: Sampling | list[Sampling] = GREEDY, **more: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        generate(more.pop("model", None) or model("dense_untied"), prompts, sampling, **more)


def test_what_cannot_be_answered_is_refused_in_a_sentence() -> None:
    def words(*ids: int) -> Sample:
        return Sample(token_T=torch.tensor(ids, dtype=torch.int64))

    good = words(1, 2, 3)
    refused("prompt 1 is empty; give at least one token", [good, words()])
    refused(r"prompt 0 has token ids from 1 to 512, the model knows 0 to 511", [words(1, 512)])
    refused(r"prompt 0 has token ids from -1 to 4", [words(4, -1)])
    refused("prompt 0 has 4096 tokens, the model reads 4096 with its answer", [words(*[1] * 4096)])
    refused("1 sampling settings came for 2 prompts", [good, good], [GREEDY])
    refused("stop strings need a text_stream", [good], replace(GREEDY, stop=("x",)))
    refused("max_prefill_tokens is 0; at least 1 token", [good], max_prefill_tokens=0)


def test_weights_that_give_no_finite_logits_are_reported() -> None:
    broken = load(folder("dense_untied"))
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = torch.inf
    refused("the model's logits are not finite", samples("text"), model=broken)
