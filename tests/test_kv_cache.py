"""The cache: blocks are never lost, never in two hands, and tokens land in the slots their sequence owns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.engine.kv_cache import KVCache, NewTokens, new_cache
from qvl.model.config import TextConfig
from qvl.model.weights import load
from tests.golden import folder


def text_config() -> TextConfig:
    return load(folder("dense_tied")).config.text


def cache_of(num_blocks: int, block_size: int = 4) -> KVCache:
    pool = torch.zeros(1, num_blocks, block_size, 1, 2)
    return KVCache(pool, pool.clone(), list(range(num_blocks - 1, -1, -1)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(num_blocks=st.integers(0, 20), steps=st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=40))
def test_taking_and_giving_back_never_loses_or_doubles_a_block(num_blocks: int, steps: list[tuple[bool, int]]) -> None:
    cache, hands = cache_of(num_blocks), []
    for is_take, number in steps:
        if is_take and number > len(cache.free):
            with pytest.raises(ValueError, match=f"{number} cache blocks are needed, {len(cache.free)} are free"):
                cache.take(number)
        elif is_take:
            hands.append(cache.take(number))
        elif hands:
            cache.give_back(hands.pop(number % len(hands)))
        everywhere = [*cache.free, *(block for own in hands for block in own)]
        assert sorted(everywhere) == list(range(num_blocks))


def test_blocks_come_in_ascending_order_lowest_first() -> None:
    cache = cache_of(8)
    first, second = cache.take(3), cache.take(2)
    assert (first, second) == ((0, 1, 2), (3, 4))
    cache.give_back(first)
    assert cache.take(4) == (0, 1, 2, 5)


def test_a_block_given_back_twice_is_noticed() -> None:
    cache = cache_of(4)
    blocks = cache.take(2)
    cache.give_back(blocks)
    with pytest.raises(AssertionError, match="came back twice"):
        cache.give_back(blocks)
    assert sorted(cache.free) == [0, 1, 2, 3]


def test_tokens_need_whole_blocks() -> None:
    cache = cache_of(4, block_size=4)
    assert [cache.num_blocks_for(tokens) for tokens in (0, 1, 4, 5, 16)] == [0, 1, 1, 2, 4]


def test_new_tokens_go_where_their_sequence_goes_on() -> None:
    cache = cache_of(8, block_size=4)
    layout = cache.layout([NewTokens((6, 2), past=2, count=4), NewTokens((5, 0, 1), past=0, count=1)])
    # tokens 2, 3 in block 6 and 4, 5 in block 2; then token 0 in block 5
    assert layout.slot_T.tolist() == [26, 27, 8, 9, 20]
    assert layout.query_lengths == (4, 1)
    assert layout.context_lengths == (6, 1)
    assert layout.blocks == ((6, 2), (5,))  # only what the context fills


def test_the_pool_has_the_models_shape_and_no_block_in_a_hand() -> None:
    cache = new_cache(text_config(), num_blocks=5, block_size=16, dtype=torch.bfloat16, device="cpu")
    # layers, blocks, slots, key heads, head width
    assert cache.key_LBZKH.shape == cache.value_LBZKH.shape == (4, 5, 16, 2, 32)
    assert cache.key_LBZKH.dtype == cache.value_LBZKH.dtype == torch.bfloat16
    assert cache.key_LBZKH.data_ptr() != cache.value_LBZKH.data_ptr()
    assert cache.block_size == 16
    assert cache.take(5) == (0, 1, 2, 3, 4)


def test_what_is_written_into_a_pool_is_what_is_read_whatever_its_strides() -> None:
    """On a CPU a head's slots lie together, so slots and heads are interleaved in memory; the write must still reach the pool itself."""
    cache = new_cache(text_config(), num_blocks=3, block_size=4, dtype=torch.float32, device="cpu")
    layout = cache.layout([NewTokens((2, 0), past=0, count=6)])
    k_TKH = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(0))
    layout.attend(torch.zeros(6, 4, 32), k_TKH, -k_TKH, layer=3)
    assert torch.equal(cache.key_LBZKH[3, 2], k_TKH[:4])
    assert torch.equal(cache.key_LBZKH[3, 0, :2], k_TKH[4:])
    assert torch.equal(cache.value_LBZKH[3, 2], -k_TKH[:4])
