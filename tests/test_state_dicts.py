"""Every key and shape of the six published sizes: our modules against transformers' own, both built without memory."""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from qvl.model.config import config_from_hf, config_to_hf, preset
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import checkpoint_shapes

LARGE: dict[str, Any] = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
SO400M: dict[str, Any] = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
# size: hidden, MLP, layers, query heads, kv heads, expert MLP, tied, tower
SIZES: dict[str, tuple[int, int, int, int, int, int, bool, dict[str, Any]]] = {
    "2B": (2048, 6144, 28, 16, 8, 0, True, LARGE),
    "4B": (2560, 9728, 36, 32, 8, 0, True, LARGE),
    "8B": (4096, 12288, 36, 32, 8, 0, False, SO400M),
    "32B": (5120, 25600, 64, 64, 8, 0, False, SO400M),
    "30B-A3B": (2048, 6144, 48, 32, 4, 768, False, SO400M),
    "235B-A22B": (4096, 12288, 94, 64, 4, 1536, False, SO400M),
}
PARAMETERS = {
    "2B": 2_127_532_032,
    "4B": 4_437_815_808,
    "8B": 8_767_123_696,
    "32B": 33_357_390_064,
    "30B-A3B": 31_070_754_032,
    "235B-A22B": 235_670_022_896,
}
TENSORS = {"2B": 625, "4B": 713, "8B": 750, "32B": 1058, "30B-A3B": 882, "235B-A22B": 1388}


def published_config(size: str) -> dict[str, Any]:
    """config.json of a published size, in the spelling of the published files."""
    hidden, mlp, layers, heads, kv_heads, expert_mlp, tied, tower = SIZES[size]
    family = "qwen3_vl_moe" if expert_mlp else "qwen3_vl"
    text: dict[str, Any] = dict(
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=151643,
        dtype="bfloat16",
        eos_token_id=151645,
        head_dim=128,
        hidden_act="silu",
        hidden_size=hidden,
        initializer_range=0.02,
        intermediate_size=mlp,
        max_position_embeddings=262144,
        model_type=f"{family}_text",
        num_attention_heads=heads,
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
        rope_theta=5000000,
        use_cache=True,
        vocab_size=151936,
    )
    if tied:
        text["tie_word_embeddings"] = True
    if expert_mlp:
        text |= dict(decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, num_experts=128)
        text |= dict(num_experts_per_tok=8, moe_intermediate_size=expert_mlp)
    vision = tower | dict(
        hidden_act="gelu_pytorch_tanh",
        in_channels=3,
        initializer_range=0.02,
        model_type=family,
        num_heads=16,
        num_position_embeddings=2304,
        out_hidden_size=hidden,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    return dict(
        architectures=["Qwen3VLMoeForConditionalGeneration" if expert_mlp else "Qwen3VLForConditionalGeneration"],
        image_token_id=151655,
        model_type=family,
        text_config=text,
        tie_word_embeddings=tied,
        video_token_id=151656,
        vision_config=vision,
        vision_end_token_id=151653,
        vision_start_token_id=151652,
    )


@cache
def expected_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """What transformers 5 holds for this size: its module tree on the meta device, a tied head left out."""
    config = published_config(size)
    with torch.device("meta"):
        if config["model_type"] == "qwen3_vl_moe":
            model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config))
        else:
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return shapes


def hub_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The published files hold expert matrices for x @ W, transformers 5 for W @ x: the last two axes change places."""
    return (shape[0], shape[2], shape[1]) if ".mlp.experts." in name else shape


@cache
def empty_model(size: str) -> Qwen3VL:
    with torch.device("meta"):
        return Qwen3VL(preset(size))


@pytest.mark.parametrize("size", SIZES)
def test_the_preset_is_the_published_config(size: str) -> None:
    assert config_from_hf(published_config(size)) == preset(size)


@pytest.mark.parametrize("size", SIZES)
def test_the_config_we_write_is_the_published_config(size: str) -> None:
    written, published = config_to_hf(preset(size), layout="hub"), published_config(size)
    for part in ("text_config", "vision_config"):
        extra = {k: v for k, v in written[part].items() if k not in published[part]}
        # The one field the published files leave to the reader, at the value every reader assumes.
        assert extra in ({}, {"router_aux_loss_coef": 0.001})
        assert {k: written[part].get(k) for k in published[part]} == published[part]
    rest = [key for key in published if not key.endswith("_config")]
    assert {key: written.get(key) for key in rest} == {key: published[key] for key in rest}


@pytest.mark.parametrize("size", SIZES)
def test_keys_and_shapes_in_the_hub_layout_are_the_published_ones(size: str) -> None:
    expected = {name: hub_shape(name, shape) for name, shape in expected_shapes(size).items()}
    assert as_tuples(checkpoint_shapes(empty_model(size), layout="hub")) == expected


@pytest.mark.parametrize("size", SIZES)
def test_keys_and_shapes_in_the_v5_layout_are_those_of_transformers_5(size: str) -> None:
    assert as_tuples(checkpoint_shapes(empty_model(size), layout="v5")) == expected_shapes(size)


@pytest.mark.parametrize("size", SIZES)
def test_the_number_of_parameters_is_the_published_one(size: str) -> None:
    assert sum(p.numel() for p in empty_model(size).parameters()) == PARAMETERS[size]
    assert len(checkpoint_shapes(empty_model(size), layout="hub")) == TENSORS[size]


def test_two_tensors_of_30b_a3b_as_the_hub_has_them() -> None:
    shapes = as_tuples(checkpoint_shapes(empty_model("30B-A3B"), layout="hub"))
    experts = "model.language_model.layers.47.mlp.experts"
    assert shapes[f"{experts}.gate_up_proj"] == (128, 2048, 1536)
    assert shapes[f"{experts}.down_proj"] == (128, 768, 2048)


def as_tuples(shapes: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in shapes.items()}
