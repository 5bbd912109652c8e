"""Rotary angles: the axes share the spectrum, the numbers are transformers', and no cast can round them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from qvl.model.config import RopeConfig, Yarn, preset
from qvl.model.rope import Rotary, axis_of_frequency, inverse_frequencies, rotate
from qvl.model.weights import load
from tests.golden import folder, reference, rope, text_config

PUBLISHED = RopeConfig(theta=5e6, scheme="interleaved", section=(24, 20, 20))
YARN = Yarn(factor=3.0, original_max_position_embeddings=262144)


def random_positions(count: int, highest: int) -> torch.Tensor:
    return torch.randint(0, highest, (3, count), generator=torch.Generator().manual_seed(7))


def share_of_spectrum(config: RopeConfig) -> list[float]:
    """For each axis: slowest over fastest of its frequencies, in logs, as a share of the whole range."""
    inverse, _ = inverse_frequencies(config, 128)
    axes = axis_of_frequency(config)
    whole = math.log(inverse[0] / inverse[-1])
    spans = []
    for axis in range(3):
        own = [f for f, a in zip(inverse, axes, strict=True) if a == axis]
        spans.append(math.log(max(own) / min(own)) / whole)
    return spans


def test_interleaved_each_axis_spans_nine_tenths_of_the_spectrum() -> None:
    assert min(share_of_spectrum(PUBLISHED)) >= 0.9


def test_chunked_no_axis_does() -> None:
    assert max(share_of_spectrum(replace(PUBLISHED, scheme="chunked"))) < 0.4


def test_the_published_order_is_thw_twenty_times_and_then_four_of_time() -> None:
    assert axis_of_frequency(PUBLISHED) == [0, 1, 2] * 20 + [0] * 4


@pytest.mark.parametrize("section", [(24, 20, 20), (8, 4, 4), (6, 5, 5), (11, 11, 10), (16, 8, 8)])
def test_interleaving_gives_each_axis_as_many_frequencies_as_its_section_says(section: tuple[int, int, int]) -> None:
    axes = axis_of_frequency(replace(PUBLISHED, section=section))
    assert tuple(axes.count(axis) for axis in range(3)) == section


@pytest.mark.parametrize("yarn", [None, YARN], ids=["default", "yarn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interleaved_angles_equal_transformers_to_the_bit(yarn: Yarn | None, dtype: torch.dtype) -> None:
    scaling = rope([24, 20, 20])
    if yarn:
        scaling |= dict(rope_type="yarn", factor=yarn.factor, original_max_position_embeddings=262144)
    text = text_config(head_dim=128, max_position_embeddings=262144 * 3, rope_parameters=scaling)
    position_3T = random_positions(400, 262144 * 3)
    theirs = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**text))
    cos, sin = theirs(torch.empty(0, dtype=dtype), position_3T[:, None])

    cos_TH, sin_TH = Rotary(replace(PUBLISHED, yarn=yarn), 128)(position_3T, dtype)

    assert torch.equal(cos_TH, cos[0])
    assert torch.equal(sin_TH, sin[0])


def test_chunked_angles_equal_qwen2_vl_to_the_bit() -> None:
    section = (16, 24, 24)
    scaling: dict[str, Any] = dict(rope_type="default", rope_theta=1e6, mrope_section=list(section))
    config: Any = Qwen2VLTextConfig(hidden_size=512, num_attention_heads=4, rope_parameters=scaling)
    position_3T = random_positions(400, 32768)
    cos, sin = Qwen2VLRotaryEmbedding(config)(torch.empty(0), position_3T[:, None])

    ours = Rotary(RopeConfig(theta=1e6, scheme="chunked", section=section), 128)
    cos_TH, sin_TH = ours(position_3T, torch.float32)

    assert torch.equal(cos_TH, cos[0])
    assert torch.equal(sin_TH, sin[0])


def test_plain_angles_read_the_time_axis_alone() -> None:
    ours = Rotary(RopeConfig(theta=1e6, scheme="plain", section=(64, 0, 0)), 128)
    position_3T = random_positions(50, 4096)
    elsewhere_3T = position_3T.clone()
    elsewhere_3T[1:] += 17
    assert torch.equal(ours(position_3T, torch.float32)[0], ours(elsewhere_3T, torch.float32)[0])


def test_yarn_stretches_slow_frequencies_by_the_factor_and_leaves_fast_ones() -> None:
    plain, one = inverse_frequencies(PUBLISHED, 128)
    stretched, factor = inverse_frequencies(replace(PUBLISHED, yarn=YARN), 128)
    assert one == 1.0
    assert factor == pytest.approx(0.1 * math.log(3.0) + 1.0)
    assert stretched[0] == pytest.approx(plain[0], rel=1e-6)
    assert stretched[-1] == pytest.approx(plain[-1] / 3.0, rel=1e-6)


def test_a_dot_product_depends_on_the_distance_alone() -> None:
    draw = torch.Generator().manual_seed(3)
    q_TNH, k_TNH = torch.randn(2, 1, 1, 128, generator=draw, dtype=torch.float64)
    ours = Rotary(PUBLISHED, 128)

    def score(q_place: list[int], k_place: list[int]) -> torch.Tensor:
        turned = [
            rotate(x_TNH, *ours(torch.tensor(place)[:, None], torch.float64))
            for x_TNH, place in ((q_TNH, q_place), (k_TNH, k_place))
        ]
        return (turned[0] * turned[1]).sum()

    near = score([9, 5, 6], [4, 3, 1])
    far = score([1009, 405, 706], [1004, 403, 701])
    assert near.item() == pytest.approx(far.item(), abs=2e-4)
    assert abs(near.item() - score([9, 5, 7], [4, 3, 1]).item()) > 1e-2


def test_casting_the_model_to_bfloat16_leaves_the_angles_exact() -> None:
    """transformers' rotary buffers are rounded by `.to(bfloat16)`; ours are not in the module tree."""
    position_3T = random_positions(200, 4096)
    model = load(folder("dense_untied")).to(torch.bfloat16)
    rotary = reference("dense_untied").model.language_model.rotary_emb
    cos, sin = rotary(torch.empty(0), position_3T[:, None])

    cos_TH, sin_TH = model_rotary(model)(position_3T, torch.float32)

    assert torch.equal(cos_TH, cos[0])
    assert torch.equal(sin_TH, sin[0])
    assert not any("freq" in name or "rotary" in name for name, _ in model.named_buffers())


def model_rotary(model: torch.nn.Module) -> Rotary:
    """The one Rotary a model holds for its decoder."""
    found = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Rotary)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("size", ["2B", "8B", "235B-A22B"])
def test_every_published_size_turns_the_same_angles(size: str) -> None:
    assert preset(size).text.rope == PUBLISHED
