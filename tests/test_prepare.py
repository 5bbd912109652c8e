"""Packed weights change nothing but the time: the same logits to the bit, the plain weights back on demand."""

from pathlib import Path

import pytest
import torch

from qvl.core.batch import Sample
from qvl.engine.generate import generate
from qvl.engine.prepare import drop, prepare, refresh
from qvl.engine.sampling import Sampling
from qvl.model.config import preset
from qvl.model.layers import Linear
from qvl.model.lora import LoraConfig, add_adapter
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.model.weights import save

can_pack = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="this torch has no packed linear for the CPU"
)


def picture_prompt(model: Qwen3VL) -> Sample:
    config = model.config
    assert config.image_token_id is not None
    ids = [5, 6, config.vision_start_token_id or 0, *[config.image_token_id] * 6, config.vision_end_token_id or 0, 7]
    patches = torch.randint(0, 256, (24, 1536), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Sample(token_T=torch.tensor(ids), patch_PX=patches, grid_I3=torch.tensor([[1, 4, 6]]))


@can_pack
@pytest.mark.parametrize("name", ["nano", "nano-moe"])
@pytest.mark.parametrize("free", [False, True])
def test_packed_logits_are_the_plain_ones_to_the_bit(name: str, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl.engine.runner.fits", lambda _: False)
    plain, packed = (new_model(preset(name), dtype=torch.bfloat16) for _ in range(2))
    assert prepare(packed, free=free, pack=True)
    batch = pack([picture_prompt(plain)], plain.config)
    with torch.inference_mode():
        assert torch.equal(packed.logits(packed(batch)), plain.logits(plain(batch)))
    greedy = Sampling(temperature=0, max_tokens=6)
    prompts = [picture_prompt(plain), Sample(token_T=torch.arange(9))]
    answers = [[a.tokens for a in generate(model, prompts, greedy)] for model in (plain, packed)]
    assert answers[0] == answers[1]


@can_pack
def test_training_does_not_see_the_packed_weights_and_refresh_takes_up_new_ones() -> None:
    model = new_model(preset("nano"), dtype=torch.bfloat16)
    batch = pack([picture_prompt(model)], model.config)
    prepare(model, pack=True)
    model.logits(model(batch)).float().sum().backward()
    assert model.language_model.layers[0].mlp.up_proj.weight.grad is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        with pytest.raises(RuntimeError, match="refresh"):
            model(batch)
        refresh(model)
        fresh = model.logits(model(batch))
        drop(model)
        plain = model.logits(model(batch))
    assert torch.equal(fresh, plain)
    assert all(m.packed is None for m in model.modules() if isinstance(m, Linear))


@can_pack
def test_a_model_whose_plain_weights_were_freed_refuses_to_train_or_to_be_packed_anew() -> None:
    model = new_model(preset("nano"), dtype=torch.bfloat16)
    batch = pack([picture_prompt(model)], model.config)
    prepare(model, free=True, pack=True)
    with pytest.raises(RuntimeError, match="load the folder again"):
        model(batch)
    for change in (refresh, drop, prepare, lambda m: add_adapter(m, LoraConfig(r=2))):
        with pytest.raises(ValueError, match="load its folder again"):
            change(model)


def test_an_fp32_model_is_left_as_it_is() -> None:
    model = new_model(preset("nano"))
    assert not prepare(model, pack=True)
    assert model.packed_head is None


@can_pack
def test_a_model_whose_plain_weights_were_freed_cannot_be_saved(tmp_path: Path) -> None:
    model = new_model(preset("nano"), dtype=torch.bfloat16)
    prepare(model, free=True, pack=True)
    with pytest.raises(ValueError, match="load its folder again"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_engines_own_kernels_take_further_is_left_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model(preset("nano"), dtype=torch.bfloat16)
    monkeypatch.setattr("qvl.engine.kernels.fits", lambda _: True)
    assert not prepare(model, free=True)
    assert model.packed_head is None and not any(p.is_meta for p in model.parameters())
