"""LoRA adapters: what PEFT wrote we read, what we write PEFT reads, and the base comes back to the bit."""

import json
import logging
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from adapters import adapter_parameters
from qvl.model.lora import (
    LoraConfig,
    LoraLinear,
    add_adapter,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from qvl.model.padded import KEYS, batch_from_padded
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import load, save
from tests.golden import case_inputs, folder, redraw, reference

CASE = "two_videos_image"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYWHERE = [*ATTENTION, "gate_proj", "up_proj", "down_proj", "qkv", "proj", "linear_fc1", "linear_fc2"]


def hf_model(name: str) -> Any:
    """A transformers model of its own, because PEFT rebuilds the one it gets."""
    hf_class = Qwen3VLMoeForConditionalGeneration if name.startswith("moe") else Qwen3VLForConditionalGeneration
    return hf_class.from_pretrained(folder(name), attn_implementation="eager", dtype=torch.float32).eval()


def peft_adapter(path: Path, name: str = "dense_tied", **settings: Any) -> Tensor:
    """Saves an adapter whose A and B are random; returns its model's logits."""
    settings = dict(r=4, lora_alpha=8, target_modules=EVERYWHERE) | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it found a Conv3d, and that a path is no name on the hub
        model: Any = get_peft_model(hf_model(name), PeftConfig(**settings)).eval()
        draw = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_" in key:
                    weight.copy_(0.3 * torch.randn(weight.shape, generator=draw) * weight[0].numel() ** -0.5)
        model.save_pretrained(path)
    return hf_logits(model)


@torch.no_grad()
def hf_logits(model: Any) -> Tensor:
    return model(**case_inputs(CASE), use_cache=False).logits[0]


def ours(case: str) -> dict[str, Tensor]:
    """The case without the token types that transformers wants beside the ids."""
    return {key: value for key, value in case_inputs(case).items() if key in KEYS}


@torch.no_grad()
def our_logits(model: Qwen3VL) -> Tensor:
    return model.logits(model(batch_from_padded(ours(CASE), model.config)))


@cache
def base_logits(name: str) -> Tensor:
    return hf_logits(reference(name))


def parameters(model: Qwen3VL) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dense_tied", {}),
        ("dense_untied", dict(use_rslora=True)),
        ("dense_untied", dict(target_modules=ATTENTION, layers_to_transform=[1, 3], lora_dropout=0.1)),
        ("dense_tied", dict(rank_pattern={"qkv": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 32})),
        ("dense_tied", dict(target_modules=r".*visual.*\.(qkv|linear_fc1)")),
        ("moe", dict(target_modules="all-linear")),
        ("moe_mixed", {}),
    ],
    ids=["everywhere", "rslora", "two layers", "patterns", "vision only", "moe", "moe with a dense layer"],
)
def test_an_adapter_that_peft_wrote_gives_the_same_logits_attached_and_merged(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = peft_adapter(tmp_path, name, **settings)
    model = load(folder(name))
    before = parameters(model)

    load_adapter(model, tmp_path)
    assert distance(our_logits(model), theirs) < 1e-4
    assert distance(theirs, base_logits(name)) > 0.1

    merge(model)
    assert distance(our_logits(model), theirs) < 1e-4
    changed = [key for key, value in parameters(model).items() if not torch.equal(value, before[key])]
    assert len(changed) == len(load_file(tmp_path / "adapter_model.safetensors")) // 2

    unload(model)
    assert same(parameters(model), before)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_an_adapter_of_a_text_only_qwen3_fits_our_text_twin(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    base = Qwen3ForCausalLM(config).eval()
    redraw(base, seed=3)
    base.save_pretrained(tmp_path / "base")
    peft: Any = get_peft_model(base, PeftConfig(r=4, target_modules=ATTENTION, init_lora_weights=False)).eval()
    peft.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(0))

    model = load(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")

    with torch.no_grad():
        ours = model.logits(model(batch_from_padded({"input_ids": ids}, model.config)))
        assert distance(ours, peft(input_ids=ids).logits[0]) < 1e-4


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("dense_tied", LoraConfig(r=4, alpha=8)),
        ("dense_untied", LoraConfig(r=3, alpha=6, target_modules="all-linear", use_rslora=True)),
        ("dense_tied", LoraConfig(r=2, alpha=8, target_modules=("patch_embed.proj", "layers.1.mlp.up_proj"))),
        ("moe_mixed", LoraConfig(r=4, alpha=8)),
    ],
    ids=["decoder", "all-linear rslora", "patch embedding and one layer", "moe"],
)
@pytest.mark.parametrize("is_merged", [False, True], ids=["attached", "merged"])
def test_an_adapter_that_we_wrote_peft_loads_to_the_same_logits(
    name: str, config: LoraConfig, is_merged: bool, tmp_path: Path
) -> None:
    model = load(folder(name))
    add_adapter(model, config)
    randomise(model)
    if is_merged:
        merge(model)

    save_adapter(model, tmp_path, base="Qwen/Qwen3-VL")

    theirs: Any = PeftModel.from_pretrained(hf_model(name), str(tmp_path)).eval()
    assert distance(hf_logits(theirs), our_logits(model)) < 1e-4
    assert distance(our_logits(model), base_logits(name)) > 0.1
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_we_wrote_we_read_to_the_bit_with_its_patterns(tmp_path: Path) -> None:
    peft_adapter(
        tmp_path / "peft",
        rank_pattern={"merger.linear_fc1": 7},
        alpha_pattern={"layers.0.self_attn.q_proj": 30, "merger.linear_fc1": 5},
    )
    first, second = load(folder("dense_tied")), load(folder("dense_tied"))
    load_adapter(first, tmp_path / "peft")
    save_adapter(first, tmp_path / "ours")
    load_adapter(second, tmp_path / "ours")
    assert same(parameters(first), parameters(second))
    assert torch.equal(our_logits(first), our_logits(second))


def randomise(model: Qwen3VL, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter_parameters(model).values():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=draw) * weight[0].numel() ** -0.5)


def test_a_new_adapter_changes_nothing_and_only_its_matrices_train() -> None:
    model = load(folder("dense_tied"))
    before = our_logits(model)
    add_adapter(model, LoraConfig(r=4, target_modules=("q_proj", "qkv")))
    assert torch.equal(our_logits(model), before)

    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(adapter_parameters(model))
    assert "language_model.layers.0.self_attn.q_proj.lora_down" in names
    assert len(names) == 2 * (4 + 6)  # four decoder layers, six vision blocks

    randomise(model)
    model(batch_from_padded(ours(CASE), model.config)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names
    assert all(bool(p.grad.any()) for p in adapter_parameters(model).values() if p.grad is not None)


def test_training_an_adapter_lowers_the_loss_and_leaves_the_base() -> None:
    model = load(folder("dense_tied"))
    before = parameters(model)
    add_adapter(model, LoraConfig(r=4, alpha=16))
    batch = batch_from_padded(ours("image"), model.config)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model.logits(model(batch))[:-1], batch.token_T[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    unload(model)
    assert same(parameters(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_seed_draws_the_same_adapter() -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = load(folder("dense_tied"))
        add_adapter(model, LoraConfig(r=2, seed=seed))
        drawn.append({name: p.detach() for name, p in adapter_parameters(model).items()})
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])


def test_dropout_is_on_in_training_only() -> None:
    model = load(folder("dense_tied"))
    add_adapter(model, LoraConfig(r=4, dropout=0.5))
    randomise(model)
    assert torch.equal(our_logits(model), our_logits(model))
    model.train()
    assert not torch.equal(our_logits(model), our_logits(model))


def test_unmerge_restores_the_base_to_the_bit_in_bf16_and_goes_on_training_the_same_parameters() -> None:
    model = load(folder("dense_tied"), dtype=torch.bfloat16)
    before = parameters(model)
    add_adapter(model, LoraConfig(r=4))
    randomise(model)
    trained, attached = adapter_parameters(model), parameters(model)
    assert {p.dtype for p in trained.values()} == {torch.float32}

    merge(model)
    assert parameters(model).keys() == before.keys()
    assert not same(parameters(model), before)
    merge(model)  # a second time is nothing
    unmerge(model)

    assert same(parameters(model), attached)
    assert all(adapter_parameters(model)[name] is p for name, p in trained.items())
    unload(model)
    assert same(parameters(model), before)


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_merged_model_saves_as_a_plain_checkpoint(keep_base: bool, tmp_path: Path) -> None:
    theirs = peft_adapter(tmp_path / "adapter")
    model = load(folder("dense_tied"))
    load_adapter(model, tmp_path / "adapter")
    merge(model, keep_base=keep_base)
    save(model, tmp_path / "merged")
    assert distance(our_logits(load(tmp_path / "merged")), theirs) < 1e-4
    assert any(isinstance(m, LoraLinear) for m in model.modules()) == keep_base


def test_a_folder_saved_with_an_adapter_attached_never_passes_for_a_checkpoint(tmp_path: Path) -> None:
    model = load(folder("dense_tied"))
    add_adapter(model, LoraConfig(r=4))
    with pytest.raises(ValueError):
        save(model, tmp_path / "out")
        load(tmp_path / "out")


def test_an_adapter_that_changes_nothing_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(folder("dense_tied"))
    add_adapter(model, LoraConfig(r=4))
    save_adapter(model, tmp_path)
    unload(model)
    with caplog.at_level(logging.WARNING, logger="qvl"):
        load_adapter(model, tmp_path)
        assert "changes nothing: every lora_B is zero" in caplog.text
        merge(model)
        assert "merging changed 0 of 28 weights" in caplog.text


def test_an_update_lost_in_rounding_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = load(folder("dense_tied"), dtype=torch.bfloat16)
    add_adapter(model, LoraConfig(r=4, target_modules=("q_proj",)))
    with torch.no_grad():
        for name, weight in adapter_parameters(model).items():
            weight.fill_(1e-6 if "layers.0." in name else 0.5)
    with caplog.at_level(logging.WARNING, logger="qvl"):
        merge(model)
    assert "merging changed 3 of 4 weights" in caplog.text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, "use_dora = true, which is not implemented"),
        ({"bias": "all"}, 'bias = "all", which is not implemented'),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save = \["lm_head"\], which is not implemented'),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters = .* is not implemented"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = .* is not implemented"),
        ({"use_something_new": {"a": 1}}, "use_something_new = .* is not implemented"),
        ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights = "pissa_niter_4", which is not implemented'),
        ({"peft_type": "IA3"}, "describes 'IA3'; only peft_type LORA"),
        ({"r": 0}, "rank r = 0; it must be a whole number from 1"),
        ({"r": None}, "rank r = None; it must be a whole number from 1"),
        ({"lora_alpha": "8"}, "alpha = '8'; it must be a number above 0"),
        ({"lora_dropout": 1.0}, "dropout = 1.0; it must be at least 0 and below 1"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern in .* has rank r = 1.5"),
        ({"alpha_pattern": {"(a+)+": 2}}, "alpha_pattern that is not made of plain module names"),
        ({"r": 5}, r"shapes \(4, 64\) and \(128, 4\); this model and rank 5 need \(5, 64\) and \(128, 5\)"),
    ],
)
def test_what_is_not_implemented_or_does_not_fit_is_refused_before_anything_changes(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, config=change)
    assert_refused(tmp_path, sentence)


def write_adapter(
    path: Path, *, config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None
) -> None:
    """A small adapter of one module; `config` and `tensors` change or add entries, None in `tensors` is not written."""
    stem = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    whole = {f"{stem}.lora_A.weight": torch.ones(4, 64), f"{stem}.lora_B.weight": torch.ones(128, 4)} | (tensors or {})
    save_file(whole, path / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(plain | (config or {})))


def assert_refused(path: Path, sentence: str) -> None:
    model = load(folder("dense_tied"))
    before = parameters(model)
    with pytest.raises(ValueError, match=sentence):
        load_adapter(model, path)
    assert same(parameters(model), before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("key", "shape", "sentence"),
    [
        ("model.language_model.layers.9.self_attn.q_proj.lora_A.weight", (4, 64), "half an adapter for .*layers.9"),
        ("model.language_model.layers.0.mlp.up_proj.lora_magnitude_vector", (160,), "only lora_A and lora_B matrices"),
        ("model.language_model.embed_tokens.lora_embedding_A", (4, 512), "only lora_A and lora_B matrices"),
    ],
)
def test_a_tensor_that_is_no_half_of_a_pair_is_refused(
    key: str, shape: tuple[int, ...], sentence: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, tensors={f"base_model.model.{key}": torch.ones(shape)})
    assert_refused(tmp_path, sentence)


@pytest.mark.parametrize(
    "module",
    [
        "model.language_model.layers.9.self_attn.q_proj",
        "lm_head",
        "model.language_model.layers.0.mlp.experts.0.up_proj",
    ],
)
def test_an_adapter_of_a_module_this_model_lacks_is_refused(module: str, tmp_path: Path) -> None:
    stem = f"base_model.model.{module}"
    write_adapter(
        tmp_path, tensors={f"{stem}.lora_A.weight": torch.ones(4, 64), f"{stem}.lora_B.weight": torch.ones(8, 4)}
    )
    assert_refused(tmp_path, f"adapts {module}, which is no Linear of this model")


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    peft_adapter(tmp_path, "dense_untied")
    assert_refused(tmp_path, "It was trained on another model")


def test_an_adapter_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    write_adapter(tmp_path, tensors={key: torch.full((4, 64), torch.nan)})
    assert_refused(tmp_path, "not finite; its training went wrong")


def test_a_pickled_adapter_is_never_read(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert_refused(tmp_path, r"no adapter_model.safetensors; adapter_model.bin is a pickle, which can run code")


def test_broken_files_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "adapter_config.json is missing")
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not a tensor")
    assert_refused(tmp_path, "is not a whole safetensors file")
    (tmp_path / "adapter_config.json").write_text("{")
    assert_refused(tmp_path, "adapter_config.json is not valid JSON")


def test_one_adapter_at_a_time(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    model = load(folder("dense_tied"))
    for function in (merge, unmerge, unload):
        with pytest.raises(ValueError, match="the model has no adapter"):
            function(model)
    with pytest.raises(ValueError, match="the model has no adapter"):
        save_adapter(model, tmp_path / "out")
    load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(model, tmp_path)
    merge(model, keep_base=False)
    add_adapter(model, LoraConfig(r=4))


@pytest.mark.parametrize(
    ("name", "wanted", "sentence"),
    [
        ("dense_tied", ("q_prj",), "target_modules 'q_prj' match no Linear .* down_proj, gate_proj, k_proj"),
        ("dense_tied", ("q_proj", "lm_head"), "target_modules 'lm_head' match no Linear"),
        ("dense_tied", ("embed_tokens",), "target_modules 'embed_tokens' match no Linear"),
        ("dense_tied", ".*nothing", "target_modules '.*nothing' match no Linear"),
        ("dense_tied", (), "target_modules are empty, which match no Linear"),
        ("moe", ("q_proj", "down_proj"), "target_modules 'down_proj' match no Linear .*fused experts cannot"),
        ("moe", ("gate",), "target_modules 'gate' match no Linear"),
    ],
)
def test_a_target_that_cannot_carry_an_adapter_is_refused(
    name: str, wanted: str | tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        add_adapter(load(folder(name)), LoraConfig(target_modules=wanted))


def test_settings_of_a_new_adapter_are_checked() -> None:
    with pytest.raises(ValueError, match="rank r = 0; it must be a whole number from 1"):
        LoraConfig(r=0)
    with pytest.raises(ValueError, match="alpha = -1; it must be a number above 0"):
        LoraConfig(alpha=-1)
