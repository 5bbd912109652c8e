"""Attention: every kernel gives what the plain masked reference gives, packed, chunked or from the cache."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qvl.core.device import facts
from qvl.model.attention import (
    KERNELS,
    Packed,
    Paged,
    blocked_sequence,
    decode_one,
    describe,
    equal_runs,
    pick_kernel,
    reference,
)

GROUPS = st.sampled_from([1, 2, 4, 8])
"""Query heads that share one key head."""


def draw(
    tokens: int, groups: int, *, kv_heads: int = 2, width: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose scores spread far enough that a wrong mask shows."""
    generator = torch.Generator().manual_seed(seed)
    q_TNH = 2 * torch.randn(tokens, kv_heads * groups, width, generator=generator)
    k_TKH = torch.randn(tokens, kv_heads, width, generator=generator)
    v_TKH = torch.randn(tokens, kv_heads, width, generator=generator)
    return q_TNH, k_TKH, v_TKH


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query of one head over its keys, spelled out."""
    scores = [math.exp(float(q @ key) / math.sqrt(len(q))) for key in k]
    return torch.stack([score * value for score, value in zip(scores, v, strict=True)]).sum(0) / sum(scores)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_reference_is_the_definition(is_causal: bool) -> None:
    q_TNH, k_TKH, v_TKH = draw(7, groups=3)
    out_TNH = reference(q_TNH, k_TKH, v_TKH, Packed((4, 3), is_causal=is_causal))
    for token in range(7):
        first, last = (0, 4) if token < 4 else (4, 7)
        seen = slice(first, token + 1 if is_causal else last)
        for head in range(6):
            kv_head = head // 3
            expected = attend_by_hand(q_TNH[token, head], k_TKH[seen, kv_head], v_TKH[seen, kv_head])
            torch.testing.assert_close(out_TNH[token, head], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["sdpa", "blocked"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    groups=GROUPS,
    kv_heads=st.sampled_from([1, 2]),
    is_causal=st.booleans(),
    seed=st.integers(0, 99),
)
@example(lengths=[], groups=1, kv_heads=1, is_causal=True, seed=0)
@example(lengths=[0, 0], groups=2, kv_heads=2, is_causal=False, seed=0)
@example(lengths=[0, 5, 0, 5, 5, 0], groups=2, kv_heads=2, is_causal=True, seed=0)
@example(lengths=[1, 1, 1], groups=8, kv_heads=1, is_causal=True, seed=0)
@example(lengths=[31, 32, 33, 64, 65], groups=8, kv_heads=1, is_causal=True, seed=0)  # a block is 256 / 8 = 32 queries
@example(lengths=[255, 256, 257], groups=1, kv_heads=1, is_causal=True, seed=0)
@example(lengths=[127, 128, 129, 300], groups=2, kv_heads=2, is_causal=False, seed=0)
def test_every_kernel_gives_what_the_reference_gives(
    kernel: str, lengths: list[int], groups: int, kv_heads: int, is_causal: bool, seed: int
) -> None:
    q_TNH, k_TKH, v_TKH = draw(sum(lengths), groups, kv_heads=kv_heads, seed=seed)
    layout = Packed(tuple(lengths), is_causal=is_causal)
    found = KERNELS[kernel](q_TNH, k_TKH, v_TKH, layout)
    torch.testing.assert_close(found, reference(q_TNH, k_TKH, v_TKH, layout), atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_gradient_of_sdpa_is_the_references(groups: int, is_causal: bool) -> None:
    layout = Packed((5, 5, 0, 12, 1), is_causal=is_causal)
    weight_TNH = draw(23, groups, seed=9)[0]
    gradients = []
    for kernel in ("sdpa", "reference"):
        leaves = [x.requires_grad_() for x in draw(23, groups)]
        (KERNELS[kernel](*leaves, layout) * weight_TNH).sum().backward()
        gradients.append([x.grad for x in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["reference", "sdpa", "blocked"])
def test_a_sequence_does_not_see_its_neighbours_nor_its_future(kernel: str) -> None:
    q_TNH, k_TKH, v_TKH = draw(12, groups=2)
    layout = Packed((4, 5, 3), is_causal=True, kernel=kernel)
    before = layout.attend(q_TNH, k_TKH, v_TKH, layer=0)
    k_TKH[[0, 3, 7, 8, 9]] += 100.0  # both neighbours, and the middle one's last two tokens
    v_TKH[[0, 3, 7, 8, 9]] -= 100.0
    after = layout.attend(q_TNH, k_TKH, v_TKH, layer=0)
    assert torch.equal(before[4:7], after[4:7])
    assert not torch.allclose(before[7:9], after[7:9])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(past=st.integers(0, 70), new=st.integers(1, 70), groups=GROUPS, seed=st.integers(0, 99))
@example(past=0, new=1, groups=1, seed=0)
@example(past=1, new=32, groups=8, seed=0)
@example(past=33, new=33, groups=8, seed=0)
@example(past=64, new=65, groups=4, seed=0)
@example(past=3, new=513, groups=1, seed=0)
def test_new_queries_over_a_past_are_the_last_rows_of_the_whole(past: int, new: int, groups: int, seed: int) -> None:
    q_TNH, k_TKH, v_TKH = draw(past + new, groups, seed=seed)
    whole = reference(q_TNH, k_TKH, v_TKH, Packed((past + new,), is_causal=True))
    out = torch.full_like(q_TNH[past:], torch.nan)
    blocked_sequence(q_TNH[past:], k_TKH, v_TKH, out, is_causal=True)
    torch.testing.assert_close(out, whole[past:], atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(total=st.integers(1, 130), groups=GROUPS, kv_heads=st.sampled_from([1, 2, 3]), seed=st.integers(0, 99))
def test_one_query_is_the_last_row_of_the_whole(total: int, groups: int, kv_heads: int, seed: int) -> None:
    q_TNH, k_TKH, v_TKH = draw(total, groups, kv_heads=kv_heads, seed=seed)
    whole = reference(q_TNH, k_TKH, v_TKH, Packed((total,), is_causal=True))
    torch.testing.assert_close(decode_one(q_TNH[-1], k_TKH, v_TKH), whole[-1], atol=1e-5, rtol=0)


def paged(
    blocks: list[list[int]], past: list[int], new: list[int], pool: tuple[Tensor, Tensor], size: int = 4
) -> Paged:
    slots = [
        own[i // size] * size + i % size
        for own, old, count in zip(blocks, past, new, strict=True)
        for i in range(old, old + count)
    ]
    totals = [old + count for old, count in zip(past, new, strict=True)]
    return Paged(
        key_LBZKH=pool[0],
        value_LBZKH=pool[1],
        slot_T=torch.tensor(slots),
        query_lengths=tuple(new),
        context_lengths=tuple(totals),
        blocks=tuple(tuple(own[: -(-total // size)]) for own, total in zip(blocks, totals, strict=True)),
    )


def new_pool(*, is_head_first: bool, layers: int = 2, num_blocks: int = 12, size: int = 4) -> tuple[Tensor, Tensor]:
    """Full of nan: a slot that is read before it is written shows."""
    if is_head_first:
        return tuple(torch.full((layers, 2, num_blocks, size, 8), torch.nan).permute(0, 2, 3, 1, 4) for _ in range(2))  # type: ignore[return-value]
    return tuple(torch.full((layers, num_blocks, size, 2, 8), torch.nan) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("is_head_first", [True, False])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_chunks_through_scattered_blocks_give_what_the_reference_gives(
    is_head_first: bool, data: st.DataObject
) -> None:
    """Three sequences of up to 16 tokens, each in up to 4 blocks anywhere in the pool, fed in chunks of any size."""
    order = data.draw(st.permutations(range(12)))
    blocks = [order[i * 4 : i * 4 + 4] for i in range(3)]
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=3, max_size=3))
    groups = data.draw(GROUPS)
    whole = [draw(length, groups, seed=i) for i, length in enumerate(lengths)]
    expected = [reference(*x, Packed((len(x[0]),), is_causal=True)) for x in whole]
    pool, past, layer = new_pool(is_head_first=is_head_first), [0, 0, 0], 1
    while past != lengths:
        new = [
            data.draw(st.integers(0, length - old), label="chunk") for length, old in zip(lengths, past, strict=True)
        ]
        active = [i for i in range(3) if new[i]]
        if not active:
            active = [i for i in range(3) if past[i] < lengths[i]][:1]
            new[active[0]] = 1
        q, k, v = (torch.cat([whole[i][part][past[i] : past[i] + new[i]] for i in active]) for part in range(3))
        layout = paged([blocks[i] for i in active], [past[i] for i in active], [new[i] for i in active], pool)
        found = layout.attend(q, k, v, layer=layer).split([new[i] for i in active])
        for i, out in zip(active, found, strict=True):
            torch.testing.assert_close(out, expected[i][past[i] : past[i] + new[i]], atol=1e-5, rtol=0)
            past[i] += new[i]
    assert bool(pool[0][0].isnan().all())  # the other layer is untouched


def test_blocks_in_a_row_and_scattered_blocks_give_the_same_to_the_bit() -> None:
    q_TNH, k_TKH, v_TKH = draw(11, groups=2)
    found = []
    for blocks in ([3, 4, 5], [5, 0, 9], [4, 3, 5]):
        pool = new_pool(is_head_first=False)
        first = paged([blocks], [0], [10], pool).attend(q_TNH[:10], k_TKH[:10], v_TKH[:10], layer=0)
        last = paged([blocks], [10], [1], pool).attend(q_TNH[10:], k_TKH[10:], v_TKH[10:], layer=0)
        found.append(torch.cat((first, last)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_bf16_in_blocks_is_as_near_to_the_truth_as_bf16_is_fine() -> None:
    layout = Packed((70, 9, 33), is_causal=True)
    exact = draw(112, groups=4)
    rounded = [x.bfloat16() for x in exact]
    found = KERNELS["blocked"](*rounded, layout)
    assert found.dtype == torch.bfloat16
    truth = reference(*(x.float() for x in rounded), layout)
    assert (found.float() - truth).abs().max() < 0.05
    assert (found.float() - truth).abs().mean() < 0.005


def test_the_kernel_is_picked_by_device_dtype_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_kernel("cpu", torch.float32, needs_grad=False) == "sdpa"
    assert pick_kernel("cpu", torch.float32, needs_grad=True) == "sdpa"
    assert pick_kernel("cpu", torch.bfloat16, needs_grad=False) == "blocked"
    assert pick_kernel("cpu", torch.bfloat16, needs_grad=True) == "sdpa"
    assert pick_kernel("cuda", torch.float32, needs_grad=True) == "sdpa"
    for runs, kernel in ((True, "varlen"), (False, "sdpa")):  # a T4 has torch's function and no kernel behind it
        monkeypatch.setattr("qvl.model.attention.varlen_runs", lambda runs=runs: runs)
        assert pick_kernel("cuda", torch.bfloat16, needs_grad=True) == kernel
    assert describe("cpu") == {"fp32": "sdpa", "bf16 inference": "blocked", "bf16 training": "sdpa"}


def test_neighbours_of_equal_length_make_one_run_and_empty_ones_none() -> None:
    assert list(equal_runs((4, 4, 0, 0, 3, 4))) == [(0, 2, 4), (8, 1, 3), (11, 1, 4)]
    assert list(equal_runs((0,))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not facts().varlen_attention, reason="needs CUDA of capability 8.0")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_varlen_on_cuda_gives_what_the_reference_gives_forward_and_backward(groups: int, is_causal: bool) -> None:
    layout = Packed((5, 64, 1, 200, 17), is_causal=is_causal)
    weight_TNH = draw(287, groups, width=64, seed=9)[0].cuda()
    results = []
    for kernel, dtype in (("varlen", torch.bfloat16), ("reference", torch.float32)):
        # both from the same bf16 numbers
        leaves = [x.bfloat16().to("cuda", dtype).requires_grad_() for x in draw(287, groups, width=64)]
        out = KERNELS[kernel](*leaves, layout)
        (out.float() * weight_TNH).sum().backward()
        results.append([out.float(), *(x.grad.float() for x in leaves if x.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 0.03 * theirs.abs().max()
