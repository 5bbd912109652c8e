"""The next token: what is kept and how likely each is equals transformers; settings and their defaults are checked."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qvl.engine import sampling as module
from qvl.engine.sampling import Sampler, Sampling, defaults, end_tokens, from_generation_config

NOTHING = torch.zeros(0, dtype=torch.int64)


def logits(seed: int, size: int = 40) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def theirs(logits_V: Tensor, s: Sampling, seen: list[int]) -> Tensor:
    """transformers' probabilities, its processors in the order in which generate applies them."""
    steps = LogitsProcessorList()
    if s.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    steps.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        steps.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        steps.append(MinPLogitsWarper(s.min_p))
    scores: Any = steps(torch.tensor([seen], dtype=torch.int64), logits_V[None].clone())
    return scores[0].softmax(-1)


def draw_at(part: float, sampler: Sampler, logits_V: Tensor) -> int:
    """The token when the random number is `part`; the draw is forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.torch, "rand", lambda *_, **__: torch.tensor(part))
        token = sampler(logits_V).token
    sampler.is_in_answer_V.zero_()
    return token


def assert_draws_from(probability_V: Tensor, sampler: Sampler, logits_V: Tensor) -> None:
    """Random numbers from 0 to 1 must give the tokens likeliest first, each over a stretch as long as its probability."""
    order = probability_V.argsort(descending=True).tolist()
    kept = [token for token in order if probability_V[token] > 0]
    start, edge = 0.0, 2e-5
    for token in kept:
        end = start + float(probability_V[token])
        if end - start > 3 * edge:
            assert draw_at(start + edge, sampler, logits_V) == token
            assert draw_at(end - edge, sampler, logits_V) == token
        start = end
    assert draw_at(0.0, sampler, logits_V) == kept[0]
    assert draw_at(1 - 2**-24, sampler, logits_V) in kept


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 20, 100]),
    top_p=st.sampled_from([0.05, 0.5, 0.8, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    prompt=st.lists(st.integers(0, 39), max_size=6),
)
def test_kept_tokens_and_their_probabilities_equal_transformers(
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    prompt: list[int],
) -> None:
    s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    logits_V = logits(seed)
    if prompt == [] and repetition_penalty != 1.0:
        prompt = [7]  # transformers' penalty wants at least one token
    sampler = Sampler(s, torch.tensor(prompt, dtype=torch.int64), 40)
    expected_V = theirs(logits_V, s, prompt)
    assert_draws_from(expected_V, sampler, logits_V)


def test_many_draws_come_as_often_as_they_are_likely() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampler = Sampler(Sampling(seed=5), NOTHING, 4)
    count = Counter(sampler(logits_V).token for _ in range(3000))
    for token, probability in enumerate(logits_V.softmax(0).tolist()):
        assert abs(count[token] / 3000 - probability) < 4 * (probability * (1 - probability) / 3000) ** 0.5


def test_the_repetition_penalty_counts_prompt_and_answer_as_transformers_does() -> None:
    s = Sampling(temperature=0.0, repetition_penalty=1.5)
    sampler = Sampler(s, torch.tensor([3, 3, 8]), 40)
    seen = [3, 3, 8]
    for step in range(12):
        logits_V = logits(step)
        penalised: Any = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([seen]), logits_V[None].clone())
        token = sampler(logits_V).token
        assert token == int(penalised[0].argmax())
        seen.append(token)


def test_the_presence_penalty_is_subtracted_once_from_tokens_of_the_answer_only() -> None:
    sampler = Sampler(Sampling(temperature=0.0, presence_penalty=1.5), torch.tensor([1]), 3)
    logits_V = torch.tensor([0.0, 2.0, 1.0])
    # 2.0, then 2.0 - 1.5 = 0.5 against 1.0, then 0.5 against 1.0 - 1.5; from then on nothing more is subtracted
    assert [sampler(logits_V).token for _ in range(4)] == [1, 2, 1, 1]


def test_temperature_0_takes_the_likeliest_and_a_tiny_temperature_does_so_too() -> None:
    logits_V = logits(3)
    best = int(logits_V.argmax())
    for temperature in (0.0, 1e-4, 1e-20, 1e-300):
        sampler = Sampler(Sampling(temperature=temperature, top_p=0.9, top_k=5), NOTHING, 40)
        assert sampler(logits_V).token == best


def test_a_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), NOTHING, 40)
        found = []
        for step in range(30):
            torch.rand(3)  # someone else draws in between
            found.append(sampler(logits(step)).token)
        return found

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


def test_logprobs_are_the_models_own_before_penalties_and_temperature() -> None:
    s = Sampling(temperature=0.2, top_k=3, repetition_penalty=2.0, presence_penalty=1.0, num_logprobs=4, seed=0)
    logits_V = logits(1)
    found = Sampler(s, torch.tensor([2, 5]), 40)(logits_V)
    own_V = logits_V.log_softmax(0)
    assert found.logprob == own_V[found.token]
    best = own_V.topk(4)
    assert found.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits_V = logits(0)
    logits_V[17] = bad
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        Sampler(Sampling(), NOTHING, 40)(logits_V)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "0 or above"),
        ("temperature", float("nan"), "0 or above"),
        ("top_p", 0.0, "above 0, at most 1"),
        ("top_p", 1.1, "above 0, at most 1"),
        ("top_k", -1, r"0 \(all\) or above"),
        ("min_p", 1.5, "between 0 and 1"),
        ("repetition_penalty", 0.0, "above 0 and finite"),
        ("repetition_penalty", float("inf"), "above 0 and finite"),
        ("presence_penalty", 2.5, "between -2 and 2"),
        ("max_tokens", 0, "at least 1"),
        ("num_logprobs", 21, "between 0 and 20"),
        ("stop", ("a", ""), "strings that are not empty"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; it must be {expected}"):
        Sampling(**{name: value})


def generation_config(folder: Path, **values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_a_folders_own_settings_are_read(tmp_path: Path) -> None:
    folder = generation_config(tmp_path, do_sample=True, temperature=0.7, top_p=0.8, top_k=20, eos_token_id=[5, 6])
    assert from_generation_config(folder) == Sampling(temperature=0.7, top_p=0.8, top_k=20)
    assert defaults(folder) == from_generation_config(folder)
    assert end_tokens(folder, default=9) == {5, 6}


def test_what_a_folder_leaves_out_is_transformers_default(tmp_path: Path) -> None:
    assert from_generation_config(tmp_path) == Sampling(temperature=0.0)
    assert end_tokens(tmp_path, default=9) == {9}
    assert end_tokens(tmp_path, default=None) == frozenset()
    generation_config(tmp_path, do_sample=True)
    assert from_generation_config(tmp_path) == Sampling(top_k=50)
    generation_config(tmp_path, temperature=0.7, repetition_penalty=1.1, eos_token_id=3)
    assert from_generation_config(tmp_path) == Sampling(temperature=0.0, repetition_penalty=1.1)
    assert end_tokens(tmp_path, default=9) == {3}


def test_a_broken_generation_config_is_refused(tmp_path: Path) -> None:
    generation_config(tmp_path, do_sample=True, top_p="high")
    with pytest.raises(ValueError, match="top_p = 'high', expected a number"):
        from_generation_config(tmp_path)
    for text, sentence in (("{", "is not valid JSON"), ("[]", "holds a list, expected a JSON object")):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            from_generation_config(tmp_path)


def test_presets_hold_the_published_settings(tmp_path: Path) -> None:
    """report 5.11 and the published repository's evaluation settings."""
    assert defaults(tmp_path, "official") == Sampling(
        temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5, max_tokens=32768, seed=3407
    )
    assert defaults(tmp_path, "official", is_thinking=True) == Sampling(
        temperature=0.6, top_p=0.95, top_k=20, max_tokens=40960, seed=1234
    )
    report = {
        (thinking, large, moe): defaults(tmp_path, "report", is_thinking=thinking, is_large=large, is_moe=moe)
        for thinking, large, moe in [
            (True, True, True),
            (True, False, False),
            (False, True, True),
            (False, False, False),
        ]
    }
    found = {key: (s.temperature, s.top_p, s.top_k, s.presence_penalty) for key, s in report.items()}
    assert found == {
        (True, True, True): (0.6, 0.95, 20, 0.0),
        (True, False, False): (1.0, 0.95, 20, 1.5),
        (False, True, True): (0.7, 0.8, 20, 1.5),
        (False, False, False): (1.0, 1.0, 40, 2.0),
    }
