"""What the engine is made of: penalties and biases of a draw, arithmetic in tiles of fixed shape, thoughts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvl.engine.answer import Thought
from qvl.engine.exact import KEYS, Segment, Tiled, by_tiles
from qvl.engine.request import ThinkingBudget
from qvl.engine.sampling import Sampler, Sampling
from qvl.model.attention import Packed, reference
from qvl.model.moe import Experts, by_loop

NOTHING = torch.zeros(0, dtype=torch.int64)


# ---- draws


def greedy(size: int = 3, **settings: object) -> Sampler:
    return Sampler(Sampling(temperature=0.0, **settings), NOTHING, size)  # type: ignore[arg-type]


def test_the_frequency_penalty_is_subtracted_once_for_each_time_a_token_is_in_the_answer() -> None:
    sampler = greedy(frequency_penalty=0.6)
    logits_V = torch.tensor([0.0, 2.0, 1.0])
    # 2.0; 1.4; 0.8 < 1.0; 0.8 > 0.4; 0.2 < 0.4; 0.2 > -0.2
    assert [sampler(logits_V).token for _ in range(6)] == [1, 1, 2, 1, 2, 1]


def test_frequency_and_presence_penalties_add_up() -> None:
    sampler = greedy(frequency_penalty=0.5, presence_penalty=0.6)
    logits_V = torch.tensor([0.0, 2.0, 1.0])
    # 2.0; 2.0 - 1.1 = 0.9 < 1.0; 0.9 > 1.0 - 1.1; 2.0 - 1.6 = 0.4; then -0.1 ties nothing and 0.0 is the largest
    assert [sampler(logits_V).token for _ in range(5)] == [1, 2, 1, 1, 0]


def test_a_bias_is_added_to_its_tokens_logit_and_leaves_the_logprobs_the_models_own() -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0])
    draw = greedy(logit_bias=((0, 3.0), (1, -100.0)))(logits_V)
    assert draw.token == 0
    assert draw.logprob == float(logits_V.log_softmax(0)[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_a_mask_forbids_and_what_it_does_not_reach_is_forbidden(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, seed=1), NOTHING, 40)
    allowed = torch.zeros(20, dtype=torch.bool)
    allowed[[3, 7, 11]] = True
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(0))
    drawn = {sampler(logits_V, allowed=allowed).token for _ in range(60)}
    assert drawn <= {3, 7, 11}
    assert temperature == 0.0 or len(drawn) == 3


def test_a_forced_token_is_taken_with_the_models_own_logprob_and_counts_as_said() -> None:
    sampler = greedy(presence_penalty=2.0)
    logits_V = torch.tensor([0.0, 2.0, 1.5])
    assert sampler(logits_V, forced=1).logprob == float(logits_V.log_softmax(0)[1])
    assert sampler(logits_V).token == 2


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("frequency_penalty", 2.5, "between -2 and 2"),
        ("logit_bias", ((3, 101.0),), "pairs of a token and -100 to 100"),
    ],
)
def test_new_settings_out_of_range_are_refused(name: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; it must be {expected}"):
        Sampling(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logit_bias names token 40; the model knows 0 to 39"):
        Sampler(Sampling(logit_bias=((40, 1.0),)), NOTHING, 40)


# ---- thoughts


def said(budget: ThinkingBudget, prompt: list[int], wishes: list[int]) -> list[int]:
    """What comes out when the model would say `wishes`."""
    thought, out = Thought(budget, prompt), []
    for wish in wishes:
        token = thought.forced()
        out.append(wish if token is None else token)
        thought.note(out[-1])
    return out


def test_the_budget_counts_tokens_of_thought_alone() -> None:
    budget = ThinkingBudget(open=1, close=2, max_tokens=3, last_words=(8, 9))
    assert said(budget, [1], [5] * 8) == [5, 5, 5, 8, 9, 2, 5, 5]
    assert said(budget, [1], [5, 2, 5, 5, 5, 5]) == [5, 2, 5, 5, 5, 5]  # it ended by itself
    assert said(budget, [4], [5, 1, 5, 5, 5, 5]) == [5, 1, 5, 5, 5, 8]
    assert said(budget, [1, 6, 2], [5] * 4) == [5] * 4  # the prompt's thought is closed
    assert said(ThinkingBudget(open=1, close=2), [1], [5] * 8) == [5] * 8
    with pytest.raises(ValueError, match="a thinking budget of -1 tokens came"):
        ThinkingBudget(open=1, close=2, max_tokens=-1)


# ---- tiles


@given(
    past=st.sampled_from([0, 1, 63, KEYS - 1, KEYS, 700]),
    count=st.integers(1, 70),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    queries=st.sampled_from([1, 32]),
    seed=st.integers(0, 99),
)
def test_attention_in_tiles_is_the_references_and_does_not_read_what_nobody_wrote(
    past: int, count: int, kv_heads: int, groups: int, queries: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    total, heads = past + count, kv_heads * groups
    q_TNH = torch.randn(total, heads, 16, generator=draw)
    k_TKH, v_TKH = (torch.randn(total, kv_heads, 16, generator=draw) for _ in range(2))
    pool = torch.full((1, 30, 32, kv_heads, 16), torch.nan)
    slots = torch.randperm(30 * 32, generator=draw)[:total]
    layout = Tiled(pool, pool.clone(), (Segment(2, past, count, slots),), queries)
    for target, source in ((layout.key_LBZKH, k_TKH), (layout.value_LBZKH, v_TKH)):
        target[0].flatten(0, 1)[slots[:past]] = source[:past]
    rows = [
        torch.cat((torch.zeros(2, *x.shape[1:]), x[past:], torch.zeros(3, *x.shape[1:]))) for x in (q_TNH, k_TKH, v_TKH)
    ]
    out = layout.attend(*rows, layer=0)
    expected = reference(q_TNH, k_TKH, v_TKH, Packed((total,), is_causal=True))[past:]
    torch.testing.assert_close(out[2 : 2 + count], expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(layout.value_LBZKH[0].flatten(0, 1)[slots], v_TKH)


def test_a_query_gets_the_same_bits_wherever_it_stands_and_however_far_others_see() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(600, n, 32, generator=draw) for n in (4, 2, 2))

    def rows(cuts: list[int]) -> torch.Tensor:
        """All 600 tokens, cut into chunks."""
        pool = torch.zeros(1, 10, 64, 2, 32)
        layout_pool, outs = (pool, pool.clone()), []
        for low, high in zip([0, *cuts], [*cuts, 600], strict=True):
            segment = Segment(0, low, high - low, torch.arange(high))
            layout = Tiled(*layout_pool, (segment,), 32)
            outs.append(layout.attend(q[low:high], k[low:high], v[low:high], layer=0))
        return torch.cat(outs)

    whole = rows([])
    for cuts in ([1], [255, 256, 257], [100, 101, 513], list(range(37, 600, 37))):
        assert torch.equal(rows(cuts), whole)


def test_experts_in_tiles_give_what_the_loop_gives_and_the_same_bits_in_every_row() -> None:
    draw = torch.Generator().manual_seed(0)
    experts = Experts(4, 24, 12)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        x_TD = torch.randn(16, 24, generator=draw)
        chosen = torch.stack([torch.randperm(4, generator=draw)[:2] for _ in range(16)])
        weight = torch.rand(16, 2, generator=draw)
        out = by_tiles(x_TD, chosen, weight, experts)
        torch.testing.assert_close(out, by_loop(x_TD, chosen, weight, experts), atol=1e-5, rtol=1e-5)
        for shift in range(1, 16):
            moved = by_tiles(x_TD.roll(shift, 0), chosen.roll(shift, 0), weight.roll(shift, 0), experts)
            assert torch.equal(moved.roll(-shift, 0), out)
