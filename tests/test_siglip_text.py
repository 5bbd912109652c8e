"""The text tower and the pooling head give transformers' vectors, from every form of checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Siglip2Config,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2TextModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from qvl.model.pool import load_pool, new_pool
from qvl.model.siglip_text import TextTowerConfig, fixed_length, load_text_tower, new_text_tower

FORMS = ("siglip", "siglip2", "siglip_text", "siglip2_text")
WORDS: dict[str, Any] = dict(
    hidden_size=40,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=5,
    vocab_size=99,
    max_position_embeddings=16,
    projection_size=48,
    bos_token_id=2,
    eos_token_id=1,
)
EYES: dict[str, Any] = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4)


def checkpoint(form: str) -> Any:
    both: dict[str, Any] = dict(text_config=WORDS, vision_config=EYES)
    if form == "siglip":
        model = SiglipModel(SiglipConfig(**both))
    elif form == "siglip2":
        model = Siglip2Model(Siglip2Config(**both))
    elif form == "siglip_text":
        model = SiglipTextModel(SiglipTextConfig(**WORDS))
    elif form == "siglip2_text":
        model = Siglip2TextModel(Siglip2TextConfig(**WORDS))
    elif form == "siglip_eyes":
        model = SiglipVisionModel(SiglipVisionConfig(**EYES))
    elif form == "siglip2_eyes":
        model = Siglip2VisionModel(Siglip2VisionConfig(**EYES))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**EYES, vision_use_head=False))
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            value = torch.randn(weight.shape, generator=draw)
            is_norm = "norm" in name and name.endswith("weight")
            weight.copy_(1 + 0.2 * value if is_norm else value * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("siglip")
    for form in (*FORMS, "siglip_eyes", "siglip2_eyes", "headless"):
        checkpoint(form).save_pretrained(root / form)
    return root


CAPTIONS = [[5, 6, 7], [8], [], list(range(10, 40))]


@pytest.mark.parametrize("form", FORMS)
def test_captions_get_transformers_vectors(form: str, folders: Path) -> None:
    token_ST = fixed_length(CAPTIONS, length=16, eos_id=1, pad_id=0)
    theirs = checkpoint(form)
    theirs = theirs if form.endswith("text") else theirs.text_model
    with torch.no_grad():
        expected = theirs(input_ids=token_ST).pooler_output
        ours = load_text_tower(folders / form)(token_ST)
    assert ours.shape == (4, 48)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_caption_has_the_same_vector_in_any_company(folders: Path) -> None:
    tower = load_text_tower(folders / "siglip2")
    token_ST = fixed_length(CAPTIONS, length=16, eos_id=1, pad_id=0)
    with torch.no_grad():
        together, alone = tower(token_ST), torch.cat([tower(row[None]) for row in token_ST])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_captions_are_cut_ended_and_padded_to_one_length() -> None:
    rows = fixed_length([[5, 6, 7, 8, 9], [5], []], length=4, eos_id=1, pad_id=0)
    assert rows.tolist() == [[5, 6, 7, 1], [5, 1, 0, 0], [1, 0, 0, 0]]


def test_padding_is_seen_as_siglip_was_trained_so_another_length_is_refused(folders: Path) -> None:
    tower = load_text_tower(folders / "siglip")
    with torch.no_grad():
        vectors = [tower(fixed_length([[5, 6]], length=16, eos_id=1, pad_id=pad)) for pad in (0, 3)]
    assert (vectors[0] - vectors[1]).abs().max() > 0.01
    with pytest.raises(ValueError, match="captions of 8 tokens came; this tower reads exactly 16"):
        tower(fixed_length([[5, 6]], length=8, eos_id=1, pad_id=0))


def test_a_new_tower_is_drawn_from_its_seed() -> None:
    config = TextTowerConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, projection_size=8, max_length=6
    )
    first, again, other = (new_text_tower(config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not first["head.bias"].any()
    assert torch.equal(first["final_layer_norm.weight"], torch.ones(16))


def test_folders_without_a_text_half_and_odd_sizes_are_refused(folders: Path) -> None:
    with pytest.raises(ValueError, match="model_type 'siglip_vision_model'; the text tower comes from"):
        load_text_tower(folders / "siglip_eyes")
    with pytest.raises(ValueError, match="text width 16 does not divide into 3 heads"):
        TextTowerConfig(
            vocab_size=30, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=3, projection_size=8
        )


LENGTHS = (4, 4, 12, 8, 8, 8, 4)


def patches() -> Tensor:
    return torch.randn(sum(LENGTHS), 48, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("form", ["siglip", "siglip2", "siglip_eyes", "siglip2_eyes"])
def test_the_pool_gives_each_frame_transformers_vector_whatever_the_frames_sizes(form: str, folders: Path) -> None:
    model = checkpoint(form)
    head = (model if form.endswith("eyes") else model.vision_model).head
    with torch.no_grad():
        expected = torch.cat([head(frame[None]) for frame in patches().split(LENGTHS)])
        ours = load_pool(folders / form)(patches(), LENGTHS)
    assert ours.shape == (7, 48)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_pools_gradients_are_those_of_torchs_attention_frame_by_frame() -> None:
    pool = new_pool(48, 80, 4, seed=2).double()
    plain = nn.MultiheadAttention(48, 4, batch_first=True).double()
    plain.load_state_dict(pool.attention.state_dict())
    probe = pool.probe.detach().clone().requires_grad_()
    x = patches().double()
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(4)).double()
    outs = [plain(probe[None, None], frame[None], frame[None])[0][0] for frame in x.split(LENGTHS)]
    (torch.cat(outs) * weight).sum().backward()
    (pool.attention(pool.probe, x, LENGTHS) * weight).sum().backward()
    torch.testing.assert_close(pool.probe.grad, probe.grad)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(pool.attention.get_parameter(name).grad, parameter.grad, msg=name)


def test_a_checkpoint_without_a_head_is_refused(folders: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks head\.probe"):
        load_pool(folders / "headless")
