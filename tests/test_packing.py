"""A sample in a pack is the sample alone: same logits, same gradients, whatever its neighbours are."""

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qvl.core.batch import Batch, Sample
from qvl.data.loader import micro_batch
from qvl.model.attention import KERNELS, Packed
from qvl.model.layers import PLAIN_BLOCKS, Blocks
from qvl.model.moe import load_balancing_loss
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.vision import VisualFeatures, frame_chunks
from qvl.model.weights import load
from qvl.recipes.made_stream import packed
from tests.golden import IMAGE, VIDEO, VISION_END, VISION_START, folder

NAMES = ("dense_tied", "moe")


@cache
def double(name: str) -> Qwen3VL:
    """In float64, so that what is left over is not rounding. (The tower turns its angles in fp32 whatever the dtype.)"""
    return load(folder(name), dtype=torch.float64).eval()


def random_sample(seed: int) -> Sample:
    """Up to four pieces: words, an image, or a video of up to three slices. One seed in four gives text alone."""
    draw = random.Random(seed)
    tokens: list[int] = [draw.randint(1, 480) for _ in range(draw.randint(2, 5))]
    grids: list[tuple[int, int, int]] = []
    for piece in range(draw.randint(1, 4)):
        h, w = 2 * draw.randint(1, 4), 2 * draw.randint(1, 4)
        kind = draw.choice(["image", "video"] if piece == 0 else ["words", "image", "video"])
        kind = "words" if seed % 4 == 0 else kind
        if kind == "words":
            tokens += [draw.randint(1, 480) for _ in range(draw.randint(1, 9))]
            continue
        placeholder, slices = (IMAGE, 1) if kind == "image" else (VIDEO, draw.randint(1, 3))
        for _ in range(slices):
            tokens += [5, VISION_START] + [placeholder] * (h * w // 4) + [VISION_END]
            grids.append((1, h, w))
    tokens += [draw.randint(1, 480) for _ in range(2)]
    token_T = torch.tensor(tokens)
    if not grids:
        return Sample(token_T=token_T)
    num_patches = sum(t * h * w for t, h, w in grids)
    patch_PX = 0.6 * torch.randn(num_patches, 1536, generator=torch.Generator().manual_seed(seed))
    return Sample(token_T=token_T, patch_PX=patch_PX, grid_I3=torch.tensor(grids))


def logits(model: Qwen3VL, samples: list[Sample], blocks: Blocks = PLAIN_BLOCKS) -> list[Tensor]:
    """Logits of each sample of one pack."""
    batch = pack(samples, model.config)
    return list(model.logits(model(batch, blocks=blocks)).split(list(batch.lengths)))


def loss(logits: Tensor, sample: Sample) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1], sample.token_T[1:], reduction="sum")


def gradients(
    model: Qwen3VL, samples: list[Sample], counted: list[int], blocks: Blocks = PLAIN_BLOCKS
) -> dict[str, Tensor]:
    """Gradients of the summed loss of the samples `counted`, in one pack of all samples."""
    model.zero_grad()
    found = logits(model, samples, blocks)
    torch.stack([loss(found[i], samples[i]) for i in counted]).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def assert_same_gradients(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    largest = max(value.abs().max() for value in other.values())
    for name, value in other.items():
        # A gradient that is zero but for rounding is compared on the scale of the whole.
        scale = max(value.abs().max().item(), 1e-6 * largest.item())
        assert (mine[name] - value).abs().max().item() <= 1e-6 * scale, name


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seeds=st.lists(st.integers(0, 10_000), min_size=2, max_size=6))
def test_logits_in_a_pack_equal_logits_alone(name: str, seeds: list[int]) -> None:
    model, samples = double(name), [random_sample(seed) for seed in seeds]
    with torch.no_grad():
        together = logits(model, samples)
        for sample, mine in zip(samples, together, strict=True):
            assert distance(mine, logits(model, [sample])[0]) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_a_pack_is_the_sum_of_its_samples_gradients(name: str) -> None:
    model = double(name)
    for start in (0, 40, 80):
        samples = [random_sample(start + i) for i in range(5)]
        together = gradients(model, samples, counted=[0, 1, 2, 3, 4])
        alone = [gradients(model, [sample], counted=[0]) for sample in samples]
        assert_same_gradients(together, {key: torch.stack([g[key] for g in alone]).sum(0) for key in together})


@pytest.mark.parametrize("name", NAMES)
def test_changing_a_neighbour_leaves_a_samples_logits_and_gradients(name: str) -> None:
    model = double(name)
    before, sample, after = random_sample(3), random_sample(9), random_sample(14)
    stranger = random_sample(21)
    assert stranger.num_tokens != before.num_tokens
    for neighbours in ([stranger, sample, after], [before, sample, stranger], [sample]):
        place = next(i for i, s in enumerate(neighbours) if s is sample)
        with torch.no_grad():
            mine, other = logits(model, [before, sample, after])[1], logits(model, neighbours)[place]
        assert distance(mine, other) <= 1e-6
        assert_same_gradients(
            gradients(model, [before, sample, after], counted=[1]), gradients(model, neighbours, counted=[place])
        )


def test_changing_a_token_changes_its_own_sample_from_there_on_and_nothing_else() -> None:
    model = double("dense_tied")
    first, second = random_sample(3), random_sample(9)
    token_T = second.token_T.clone()
    token_T[1] = 17
    with torch.no_grad():
        old, new = logits(model, [first, second]), logits(model, [first, replace(second, token_T=token_T)])
    assert torch.equal(old[0], new[0])
    assert torch.equal(old[1][0], new[1][0])
    assert not torch.equal(old[1][1:], new[1][1:])


def picture_batch(model: Qwen3VL) -> Batch:
    batch = pack([random_sample(seed) for seed in range(12)], model.config)
    assert len(set(batch.frame_lengths)) > 3
    return batch


@pytest.mark.parametrize("max_patches", [1, 16, 70, 10_000])
def test_the_tower_in_chunks_equals_the_tower_whole(max_patches: int) -> None:
    model = double("dense_tied")
    batch = picture_batch(model)
    with torch.no_grad():
        whole, chunked = model.encode(batch), model.encode(batch, max_patches=max_patches)
        assert distance(chunked.merged_MD, whole.merged_MD) <= 1e-6
        for mine, other in zip(chunked.deepstack, whole.deepstack, strict=True):
            assert distance(mine, other) <= 1e-6
        assert distance(model(batch, features=chunked), model(batch)) <= 1e-6


def test_chunks_hold_whole_frames_in_order_and_a_large_frame_stands_alone() -> None:
    assert frame_chunks((4, 4, 16, 64, 4, 4, 4), 16) == [(4, 4), (16,), (64,), (4, 4, 4)]


def test_visual_features_of_a_picture_do_not_depend_on_the_other_pictures() -> None:
    model = double("dense_tied")
    sample, other = random_sample(9), random_sample(14)
    assert sample.patch_PX is not None and other.patch_PX is not None
    with torch.no_grad():
        alone: VisualFeatures = model.encode(pack([sample], model.config))
        pair: VisualFeatures = model.encode(pack([other, sample], model.config))
    count = alone.merged_MD.shape[0]
    assert distance(pair.merged_MD[-count:], alone.merged_MD) <= 1e-6


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name not in ("reference", "varlen")])
def test_every_cpu_kernel_equals_the_reference_with_its_block_diagonal_mask(kernel: str, is_causal: bool) -> None:
    lengths = (3, 3, 0, 1, 300, 7, 7, 7)
    draw = torch.Generator().manual_seed(5)
    q_TNH = torch.randn(sum(lengths), 6, 16, generator=draw)
    k_TKH, v_TKH = torch.randn(2, sum(lengths), 2, 16, generator=draw)
    out_TNH = Packed(lengths, is_causal, kernel).attend(q_TNH, k_TKH, v_TKH, layer=0)
    oracle_TNH = Packed(lengths, is_causal, "reference").attend(q_TNH, k_TKH, v_TKH, layer=0)
    assert (out_TNH - oracle_TNH).abs().max().item() <= 1e-5


def test_router_statistics_of_a_pack_are_the_sums_over_its_samples() -> None:
    model, samples = double("moe"), [random_sample(seed) for seed in (1, 2, 3)]
    together: list = []
    alone: list = []
    with torch.no_grad():
        model(pack(samples, model.config), router_out=together)
        for sample in samples:
            model(pack([sample], model.config), router_out=alone)
    assert sum(s.num_tokens for s in together) == sum(s.num_tokens for s in alone)
    assert load_balancing_loss(together).item() == pytest.approx(load_balancing_loss(alone).item(), rel=1e-6)


def test_targets_must_be_given_for_all_samples_or_none() -> None:
    model = double("dense_tied")
    text = Sample(token_T=torch.tensor([1, 2, 3]))
    marked = replace(text, is_target_T=torch.tensor([False, True, True]))
    assert pack([marked, marked], model.config).is_target_T is not None
    with pytest.raises(ValueError, match="give all of them is_target_T or none"):
        pack([text, marked], model.config)


def test_patches_that_do_not_fit_the_grids_are_refused() -> None:
    sample = random_sample(9)
    assert sample.patch_PX is not None
    with pytest.raises(ValueError, match=r"brings .* patches, but its grids say"):
        pack([replace(sample, patch_PX=sample.patch_PX[1:])], double("dense_tied").config)


def test_an_empty_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        pack([], double("dense_tied").config)


def test_a_micro_batch_keeps_the_order_given_and_a_made_one_puts_equal_lengths_side_by_side() -> None:
    config = double("dense_tied").config
    samples = [Sample(token_T=torch.full((length,), length)) for length in (3, 2, 3, 2)]
    names, kinds = ("a", "b", "c", "d"), ("x", "y", "x", "z")
    plain, made = micro_batch(samples, names, kinds, config), packed(samples, names, kinds, config)
    assert (plain.batch.lengths, plain.ids, plain.categories) == ((3, 2, 3, 2), names, kinds)
    assert (made.batch.lengths, made.ids, made.categories) == ((2, 2, 3, 3), ("b", "d", "a", "c"), ("y", "z", "x", "x"))
    assert made.batch.token_T.tolist() == [2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    with pytest.raises(ValueError, match="4 samples came with 3 ids and 4 categories; give each sample one of both"):
        micro_batch(samples, names[:3], kinds, config)
