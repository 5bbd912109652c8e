"""The plan of the data: order, mixture by tokens, packing, dealing, resuming."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.data.deal import Cost, deal
from qvl.data.order import permuted
from qvl.data.packing import PackBudget, Packer
from qvl.data.plan import Item, Lengths, Pack, Plan

COST = Cost(token=1.0, token_squared=0.001, patch=0.5, patch_squared=0.0001)


def lengths(tokens: list[int], *, patches: list[int] | None = None, text: bool = False, epochs: float | None = None):
    token_S = np.array(tokens, np.int32)
    patch_S = np.zeros_like(token_S) if patches is None else np.array(patches, np.int32)
    return Lengths(
        token_S=token_S,
        patch_S=patch_S,
        square_S=patch_S.astype(np.int64) * 100,
        is_text_S=np.full(len(tokens), text),
        max_epochs=epochs,
    )


def mix(count: int, seed: int = 0) -> Lengths:
    """Lengths as a vision-language mix has them: 45 % questions on pictures, 30 % text, 20 % documents, 5 % video."""
    rng = random.Random(seed)
    tokens, patches = [], []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.45:
            words, visual = rng.lognormvariate(4.8, 0.7), rng.choice((256, 400, 576, 768, 1024, 1280))
        elif kind < 0.75:
            words, visual = rng.lognormvariate(6.8, 1.0), 0
        elif kind < 0.95:
            words, visual = rng.lognormvariate(6.6, 0.8), rng.randint(1, 6) * rng.choice((256, 576, 1024))
        else:
            words, visual = rng.lognormvariate(5, 0.6), rng.randint(2000, 7500)
        tokens.append(min(8192, int(words) + 8 + visual))
        patches.append(4 * visual)
    return lengths(tokens, patches=patches)


def plan(
    *sources: Lengths, weights: list[float] | None = None, tokens: int = 100, step: int = 4, seed: int = 7, **more
):
    stages = more.pop("stages", [(more.pop("limit", None), weights or [1.0] * len(sources))])
    budget = PackBudget(tokens=tokens, patches=more.pop("patches", 4 * tokens), buffer=more.pop("buffer", 16))
    return Plan(sources, stages, budget, packs_per_step=step, seed=seed)


def places(packs: list[Pack]) -> list[list[tuple[int, int, int]]]:
    return [[(i.source, i.draw, i.piece) for i in pack] for pack in packs]


# ---- order


@given(length=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60)
def test_a_permutation_names_every_place_once(length: int, key: int) -> None:
    assert sorted(permuted(np.arange(length), length, key).tolist()) == list(range(length))


def test_a_place_far_away_is_computed_alone() -> None:
    everything = permuted(np.arange(5000), 5000, 3)
    assert permuted(np.array([4321]), 5000, 3).tolist() == [everything[4321]]
    assert permuted(np.array([10**12]), 10**13, 3)[0] < 10**13


def test_keys_give_different_orders_that_look_random() -> None:
    one, two = permuted(np.arange(1000), 1000, 1), permuted(np.arange(1000), 1000, 2)
    assert (one == two).mean() < 0.01
    assert abs(np.corrcoef(np.arange(1000), one)[0, 1]) < 0.1


# ---- packing


@pytest.mark.parametrize(("pack_tokens", "samples"), [(8192, 20_000), (32768, 40_000)])
@pytest.mark.no_shape_hook
def test_packs_of_a_real_mix_are_filled_to_995_in_a_thousand(pack_tokens: int, samples: int) -> None:
    source = mix(samples)
    packer: Packer[Item] = Packer(PackBudget(tokens=pack_tokens, patches=4 * pack_tokens))
    filled = packs = 0
    for record in range(samples):
        tokens, patches = int(source.token_S[record]), int(source.patch_S[record])
        packer.push(
            Item(source=0, draw=record, piece=0, record=record, tokens=tokens, patches=patches, square=0, is_long=False)
        )
        if packer.is_full:
            filled += sum(item.tokens for item in packer.pop())
            packs += 1
    assert filled / (packs * pack_tokens) >= 0.995
    assert 1500 < source.token_S.mean() < 2000


def item(number: int, tokens: int, patches: int = 0) -> Item:
    return Item(source=0, draw=number, piece=0, record=number, tokens=tokens, patches=patches, square=0, is_long=False)


def test_the_oldest_comes_first_and_the_largest_that_fit_beside_it() -> None:
    packer = Packer(
        PackBudget(tokens=100, patches=100), [item(0, 10), item(1, 60), item(2, 80), item(3, 90), item(4, 10)]
    )
    assert [i.draw for i in packer.pop()] == [0, 3]
    assert [i.draw for i in packer.pop()] == [1, 4]
    assert [i.draw for i in packer.pop()] == [2]


def test_among_equals_the_one_that_waited_longest_is_taken() -> None:
    packer = Packer(PackBudget(tokens=100, patches=100), [item(0, 60), item(1, 40), item(2, 40)])
    assert [i.draw for i in packer.pop()] == [0, 1]


def test_a_pack_keeps_to_the_patch_budget_too() -> None:
    packer = Packer(PackBudget(tokens=100, patches=50), [item(0, 10, 40), item(1, 50, 20), item(2, 20, 10)])
    assert [i.draw for i in packer.pop()] == [0, 2]


def test_a_sample_larger_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 101 tokens and 0 patches is larger than a pack of 100"):
        Packer(PackBudget(tokens=100, patches=50)).push(item(0, 101))


# ---- mixing


def test_sources_are_mixed_by_tokens_and_not_by_samples() -> None:
    made = plan(lengths([10] * 50), lengths([50] * 50), weights=[0.5, 0.5])
    for _ in range(100):
        made.next_step()
    assert made.draws[0] == pytest.approx(5 * made.draws[1], rel=0.02)
    assert made.tokens[0] / sum(made.tokens) == pytest.approx(0.5, abs=0.002)


def test_a_share_is_kept_from_the_first_steps_on() -> None:
    made = plan(lengths([20] * 40), lengths([20] * 40), weights=[0.9, 0.1], buffer=1)
    made.next_step()
    assert made.tokens[1] / sum(made.tokens) == pytest.approx(0.1, abs=0.05)


def test_each_epoch_brings_every_record_once_in_another_order() -> None:
    made = plan(lengths([10] * 30))
    epochs = [[made.record_of(0, draw) for draw in range(30 * e, 30 * e + 30)] for e in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_stages_change_the_weights_after_their_tokens() -> None:
    made = plan(lengths([10] * 50), lengths([10] * 50), stages=[(4000, [1.0, 0.0]), (4000, [0.25, 0.75])], buffer=4)
    while made.next_step():
        pass
    assert made.tokens[0] == pytest.approx(5000, abs=400) and made.tokens[1] == pytest.approx(3000, abs=400)


def test_a_source_leaves_the_mixture_after_its_epochs() -> None:
    made = plan(lengths([10] * 20, epochs=2), lengths([10] * 50), weights=[0.9, 0.1])
    for _ in range(30):
        made.next_step()
    assert made.draws[0] == 40


# ---- the end


@given(count=st.integers(1, 60), step=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_one_epoch_brings_every_record_and_whole_steps(count: int, step: int, seed: int) -> None:
    made = plan(lengths([7 + 13 * (i % 6) for i in range(count)], epochs=1), step=step, seed=seed)
    seen: list[int] = []
    while packs := made.next_step():
        assert len(packs) == step
        seen += [i.record for pack in packs for i in pack]
    assert set(seen) == set(range(count))
    assert made.next_step() == []


def test_a_token_budget_ends_the_data() -> None:
    made = plan(lengths([10] * 50), limit=1000)
    steps = 0
    while made.next_step():
        steps += 1
    assert steps == 3  # ten packs of 100 tokens, four a step, the third filled up


# ---- long samples


def test_a_long_text_comes_in_pieces_and_none_is_lost() -> None:
    made = plan(lengths([250], text=True, epochs=1), step=1)
    packs = []
    while step := made.next_step():
        packs += step
    assert sorted((i.piece, i.tokens) for pack in packs for i in pack) == [(0, 100), (1, 100), (2, 50)]


def test_a_long_chat_takes_a_whole_pack() -> None:
    made = plan(lengths([250], patches=[900], epochs=1), step=1, patches=400)
    [[one]] = made.next_step()
    assert (one.tokens, one.patches, one.is_long) == (100, 400, True)


# ---- resuming


@given(
    seed=st.integers(0, 1000),
    stop=st.integers(0, 25),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    ends=st.booleans(),
)
@settings(max_examples=30)
def test_resuming_at_any_step_is_as_if_it_had_never_stopped(
    seed: int, stop: int, counts: list[int], ends: bool
) -> None:
    def fresh() -> Plan:
        rng = random.Random(seed)
        sources = [lengths([rng.randint(1, 130) for _ in range(n)], text=rng.random() < 0.5) for n in counts]
        return plan(*sources, seed=seed, step=3, limit=4000 if ends else None)

    whole = fresh()
    steps = [places(whole.next_step()) for _ in range(30)]
    first = fresh()
    assert [places(first.next_step()) for _ in range(stop)] == steps[:stop]
    second = fresh()
    second.restore(json.loads(json.dumps(first.state())))
    assert [places(second.next_step()) for _ in range(30 - stop)] == steps[stop:]


def test_the_state_is_small() -> None:
    made = plan(mix(5000), tokens=8192, step=32, buffer=256)
    for _ in range(40):
        made.next_step()
    assert len(json.dumps(made.state())) < 6000


def test_a_state_of_another_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="the state was saved with seed 1 and version 1, this plan has seed 2"):
        plan(lengths([5]), seed=2).restore(plan(lengths([5]), seed=1).state())


# ---- dealing


@given(ranks=st.sampled_from([1, 2, 3, 4, 6, 12]), seed=st.integers(0, 50))
@settings(max_examples=30)
def test_ranks_share_the_same_global_batch_equally(ranks: int, seed: int) -> None:
    packs = plan(mix(400, seed), tokens=8192, step=12, seed=seed).next_step()
    hands = deal([COST.of(pack) for pack in packs], ranks, equally=True)
    assert sorted(i for hand in hands for i in hand) == list(range(12))
    assert {len(hand) for hand in hands} == {12 // ranks}


def test_costly_packs_are_spread() -> None:
    packs = [(item(i, tokens),) for i, tokens in enumerate([8000, 100, 7000, 200])]
    assert deal([COST.of(pack) for pack in packs], 2, equally=True) == [[0, 1], [2, 3]]


def test_packs_that_cannot_be_dealt_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="5 packs a step cannot be dealt to 2 ranks"):
        deal([1.0] * 5, 2, equally=True)
