"""A starting checkpoint writes as its Qwen3 and sees as its SigLIP-2, whichever form those come in."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from qvl.commands.init import Init, run
from qvl.core.batch import Sample
from qvl.model import vision as vision_module
from qvl.model.config import preset, read_config, spread_levels
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.siglip import lift_patches, resize_table
from qvl.model.start import start, start_config
from qvl.model.vision import PatchPlaces, interpolate_table, patch_places
from qvl.model.weights import load
from tests.golden import redraw

IDS = dict(image_token_id=505, video_token_id=506, vision_start_token_id=502, vision_end_token_id=503)
TOWERS = ("siglip", "siglip_with_text", "siglip2", "siglip2_with_text")
SIDE = 6
"""Of the tiny SigLIPs' position table: 6 x 6 patches, 96 x 96 pixels."""


def tower(form: str) -> Any:
    sizes: dict[str, Any] = dict(
        hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4, patch_size=16
    )
    if form.startswith("siglip2"):
        sizes |= dict(num_patches=SIDE**2)
    else:
        sizes |= dict(image_size=16 * SIDE)
    if form.endswith("text"):
        words: dict[str, Any] = dict(
            hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, vocab_size=99
        )
        words |= dict(bos_token_id=1, eos_token_id=2)
        both: dict[str, Any] = dict(text_config=words, vision_config=sizes)
        model = Siglip2Model(Siglip2Config(**both)) if form.startswith("siglip2") else SiglipModel(SiglipConfig(**both))
    elif form == "siglip2":
        model = Siglip2VisionModel(Siglip2VisionConfig(**sizes))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**sizes))
    redraw_tower(model)
    return model.eval()


def redraw_tower(model: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(21)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            value = torch.randn(weight.shape, generator=draw)
            is_norm = "norm" in name and name.endswith("weight")
            weight.copy_(1 + 0.2 * value if is_norm else value * (0.2 if weight.ndim == 1 else 0.1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each form of text and vision checkpoint."""
    root = tmp_path_factory.mktemp("start")
    sizes: dict[str, Any] = dict(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
    )
    sizes |= dict(num_key_value_heads=2, head_dim=32, bos_token_id=500, eos_token_id=501)
    experts: dict[str, Any] = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
    texts: dict[str, Any] = {
        "tied": Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True)),
        "untied": Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=False)),
        "moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, tie_word_embeddings=False)),
    }
    for name, model in texts.items():
        redraw(model, seed=4)
        model.save_pretrained(root / name)
        added = [dict(content=word, id=id_) for word, id_ in zip(WORDS, IDS.values(), strict=True)]
        (root / name / "tokenizer.json").write_text(json.dumps(dict(added_tokens=added)))
        (root / name / "tokenizer_config.json").write_text(json.dumps(dict(chat_template="text only", eos_token="x")))
    for form in TOWERS:
        tower(form).save_pretrained(root / form)
    return root


WORDS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


@pytest.mark.parametrize("vision", TOWERS)
@pytest.mark.parametrize("text", ["tied", "untied", "moe"])
def test_without_pictures_it_answers_as_the_text_model(text: str, vision: str, folders: Path) -> None:
    model = start(folders / text, folders / vision)
    row = [5, 6, 7, 8, 300, 301, 302]
    hf_class = Qwen3MoeForCausalLM if text == "moe" else Qwen3ForCausalLM
    with torch.no_grad():
        theirs = hf_class.from_pretrained(folders / text, dtype=torch.float32)(torch.tensor([row])).logits[0]
        ours = model.logits(model(pack([Sample(token_T=torch.tensor(row))], model.config)))
    assert (ours - theirs).abs().max().item() <= 1e-4


def raster() -> Tensor:
    """A picture of 96 x 96 pixels, already normalised."""
    return torch.randn(1, 3, 16 * SIDE, 16 * SIDE, generator=torch.Generator().manual_seed(2))


def our_patches(picture: Tensor) -> Tensor:
    """(P, X): 2x2 merge-block order, the one frame twice."""
    blocks = picture[0].unflatten(1, (SIDE // 2, 2, 16)).unflatten(-1, (SIDE // 2, 2, 16))
    patches = blocks.permute(1, 4, 2, 5, 0, 3, 6)  # block row, block column, row, column, channel, y, x
    return patches.unsqueeze(-3).expand(*patches.shape[:-2], 2, 16, 16).flatten(0, 3).flatten(1)


def their_hidden_states(form: str, picture: Tensor) -> tuple[Tensor, Tensor]:
    """(states after the embeddings and after each block, what the last LayerNorm makes of them), rows left to right."""
    model = tower(form)
    model = model.vision_model if form.endswith("text") else model
    states: list[Tensor] = []
    model.encoder.layers[0].register_forward_pre_hook(lambda _, given: states.append(given[0]))
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda _, __, out: states.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        if form.startswith("siglip2"):
            grid = picture[0].unflatten(1, (SIDE, 16)).unflatten(-1, (SIDE, 16))
            pixels = grid.permute(1, 3, 2, 4, 0).flatten(0, 1).flatten(1)[None]  # a patch is (row, column, channel)
            shape, mask = torch.tensor([[SIDE, SIDE]]), torch.ones(1, SIDE**2, dtype=torch.long)
            last = model(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shape).last_hidden_state
        else:
            last = model(pixel_values=picture).last_hidden_state
    return torch.stack([state[0] for state in states]), last[0]


@pytest.mark.parametrize("grid_side", [SIDE, 12, 48])
@pytest.mark.parametrize("form", TOWERS)
def test_with_its_rotary_angles_at_zero_the_tower_has_siglips_hidden_states(
    form: str, grid_side: int, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A square picture at SigLIP's own resolution. 2D-RoPE is what Qwen3-VL adds, so it is taken out; all else must agree."""
    model = start(
        folders / "tied",
        folders / form,
        config=start_config(folders / "tied", folders / form, grid_side=grid_side),
    )
    visual, states = model.visual, []
    turn = vision_module.rotary_2d
    monkeypatch.setattr(vision_module, "rotary_2d", lambda places, width: turn(at_origin(places), width))
    visual.blocks[0].register_forward_pre_hook(lambda _, given: states.append(given[0]))
    for block in visual.blocks:
        block.register_forward_hook(lambda _, __, out: states.append(out))
    grid = torch.tensor([[1, SIDE, SIDE]])
    with torch.no_grad():
        visual(our_patches(raster()), grid, (SIDE**2,))
        ours = torch.stack(states)
        normed = visual.merger.norm(ours[-1])
    theirs, last = their_hidden_states(form, raster())

    places = patch_places(grid, (SIDE**2,), 2)
    order = places.row_P * SIDE + places.column_P
    assert ours.shape == (5, SIDE**2, 48)
    assert worst(ours, theirs[:, order]) <= 1e-5
    assert worst(normed, last[order]) <= 1e-5


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def at_origin(places: PatchPlaces) -> PatchPlaces:
    zero = torch.zeros_like(places.row_P)
    return PatchPlaces(zero, zero, places.height_P, places.width_P)


def test_a_still_picture_gives_what_one_frame_gave_and_a_video_the_mean_of_its_frames(folders: Path) -> None:
    model = start(folders / "tied", folders / "siglip")
    assert model.config.vision is not None
    kernel = tower("siglip").embeddings.patch_embedding
    first, second = torch.randn(2, 5, 3, 1, 16, 16, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        for frames, expected in (
            ((first, first), kernel(first[:, :, 0])),
            ((first, second), (kernel(first[:, :, 0]) + kernel(second[:, :, 0])) / 2),
        ):
            ours = model.visual.patch_embed(torch.cat(frames, dim=2).flatten(1))
            assert (ours - expected[:, :, 0, 0]).abs().max().item() <= 1e-5


def read_table(table: Tensor, side: int) -> Tensor:
    """What the network reads for a picture of side x side patches, rows left to right."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    size = torch.full((side * side,), side)
    return interpolate_table(table, PatchPlaces(row.flatten(), column.flatten(), size, size))


@pytest.mark.parametrize("old", [14, 16, 24, 32])
def test_a_resized_table_reads_the_old_numbers_at_the_old_resolution(old: int) -> None:
    table = torch.randn(old * old, 8, generator=torch.Generator().manual_seed(old))
    resized = resize_table(table, 48)
    assert resized.shape == (2304, 8)
    assert (read_table(resized, old) - table).abs().max().item() <= 1e-5


def test_a_resized_table_is_as_smooth_as_the_old_one() -> None:
    place = torch.linspace(0, 3, 16)
    table = (place[:, None].sin() + place[None, :].cos()).reshape(256, 1)
    finer = torch.linspace(0, 3, 48)
    expected = (finer[:, None].sin() + finer[None, :].cos()).reshape(2304, 1)
    assert (resize_table(table, 48) - expected).abs().max().item() <= 0.03


def test_a_table_of_the_right_size_is_left_alone() -> None:
    table = torch.randn(2304, 4)
    assert torch.equal(resize_table(table, 48), table)


def test_the_two_forms_of_patch_embedding_lift_to_the_same_kernel() -> None:
    vision = preset("nano").vision
    assert vision is not None
    kernel = torch.randn(4, 3, 16, 16)
    assert torch.equal(lift_patches(kernel, vision), lift_patches(kernel.permute(0, 2, 3, 1).flatten(1), vision))
    assert lift_patches(kernel, vision).shape == (4, 1536)


def test_deepstack_levels_of_the_published_depths_and_of_others() -> None:
    assert spread_levels(27) == (8, 16, 24)
    assert spread_levels(24) == (5, 11, 17)
    assert spread_levels(12) == (2, 5, 8)
    assert spread_levels(3) == (0, 1, 2)
    with pytest.raises(ValueError, match="2 vision blocks cannot give three DeepStack levels"):
        spread_levels(2)


@pytest.mark.parametrize("depth", range(4, 33))
def test_deepstack_levels_rise_within_the_tower_at_every_depth(depth: int) -> None:
    levels = spread_levels(depth)
    assert 0 <= levels[0] < levels[1] < levels[2] < depth
    if depth != 27:
        quarters = [depth * quarter / 4 for quarter in (1, 2, 3)]
        assert all(quarter <= level + 1 < quarter + 1 for level, quarter in zip(levels, quarters, strict=True))


def test_the_config_takes_text_from_the_text_folder_and_sizes_from_the_vision_folder(folders: Path) -> None:
    config = start_config(folders / "moe", folders / "siglip2_with_text")
    text = read_config(folders / "moe")
    assert replace(config.text, rope=text.text.rope) == text.text
    assert config.text.rope.scheme == "interleaved" and config.text.rope.section == (6, 5, 5)
    assert config.vision is not None
    assert (config.vision.depth, config.vision.hidden_size, config.vision.intermediate_size) == (4, 48, 80)
    assert (config.vision.num_position_embeddings, config.vision.deepstack_visual_indexes) == (2304, (0, 1, 2))
    assert (config.image_token_id, config.video_token_id) == (505, 506)
    assert config.model_type == "qwen3_vl_moe"


def test_from_the_published_parts_the_config_is_the_published_one(tmp_path: Path) -> None:
    """Qwen3-8B's and SigLIP2-SO400M's numbers make Qwen3-VL-8B but for the rotary base and length that long context brought."""
    for size, (depth, width, inner) in {"8B": (27, 1152, 4304), "2B": (24, 1024, 4096)}.items():
        text = tmp_path / f"text-{size}"
        text.mkdir()
        write_qwen3_config(text, size)
        vision = tmp_path / f"vision-{size}"
        shape = dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=16)
        write_empty_siglip(vision, shape)
        config = start_config(text, vision)
        published = preset(size)
        assert config.text.rope.section == published.text.rope.section
        fitted = replace(config.text, rope=published.text.rope, max_position_embeddings=262144)
        assert replace(config, text=fitted) == published


def write_qwen3_config(folder: Path, size: str) -> None:
    text = preset(size).text
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=size == "2B",
        bos_token_id=151643,
        eos_token_id=151645,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    )
    config.save_pretrained(folder)
    ids = (151655, 151656, 151652, 151653)
    added = [dict(content=word, id=id_) for word, id_ in zip(WORDS, ids, strict=True)]
    (folder / "tokenizer.json").write_text(json.dumps(dict(added_tokens=added)))


def write_empty_siglip(folder: Path, shape: dict[str, int]) -> None:
    """The tensors `start_config` reads sizes from, one number in each layer's place: nobody needs 400M weights for that."""
    folder.mkdir()
    one = torch.zeros(1, dtype=torch.bfloat16)
    tensors = {
        f"vision_model.encoder.layers.{i}.layer_norm1.weight": one.clone() for i in range(shape["num_hidden_layers"])
    }
    tensors["vision_model.encoder.layers.0.mlp.fc1.weight"] = one.new_zeros(
        shape["intermediate_size"], shape["hidden_size"]
    )
    tensors["vision_model.embeddings.patch_embedding.weight"] = one.clone()
    save_file(tensors, folder / "model.safetensors")
    SiglipConfig(vision_config=shape).save_pretrained(folder)


def test_mergers_are_fresh_and_drawn_from_the_seed(folders: Path) -> None:
    first, again, other = (mergers(start(folders / "tied", folders / "siglip", seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, value in first.items():
        if name.endswith("linear_fc1.weight") or name.endswith("linear_fc2.weight"):
            assert value.std().item() == pytest.approx(0.02, rel=0.05)
            assert not torch.equal(value, other[name])
        elif name.endswith("bias") and "norm" not in name:
            assert not value.any()
        elif name.startswith("deepstack"):
            assert torch.equal(value, torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value))
    assert sum(name.endswith("linear_fc1.weight") for name in first) == 4


def mergers(model: Qwen3VL) -> dict[str, Tensor]:
    return {name: value for name, value in model.visual.state_dict().items() if "merger" in name}


@cache
def picture_sample() -> Sample:
    grid = torch.tensor([[1, SIDE, SIDE]])
    token_T = torch.tensor([1, 502, *[505] * (SIDE**2 // 4), 503, 2, 3])
    return Sample(token_T=token_T, patch_PX=our_patches(raster()), grid_I3=grid)


@pytest.mark.parametrize("text", ["tied", "moe"])
def test_the_command_writes_a_folder_that_transformers_loads_and_answers_from_alike(
    text: str, folders: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(Init(text=str(folders / text), vision=str(folders / "siglip2"), out=out, dtype="float32"))

    model = load(out)
    sample = picture_sample()
    theirs = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    assert isinstance(theirs, Qwen3VLForConditionalGeneration) or text == "moe"
    with torch.no_grad():
        ours = model.logits(model(pack([sample], model.config)))
        kinds = (sample.token_T == 505).int()[None]
        expected = theirs(
            input_ids=sample.token_T[None],
            mm_token_type_ids=kinds,
            pixel_values=sample.patch_PX,
            image_grid_thw=sample.grid_I3,
        ).logits[0]
    assert (ours - expected).abs().max().item() <= 1e-4
    assert AutoConfig.from_pretrained(out).vision_config.deepstack_visual_indexes == [0, 1, 2]
    assert {p.name for p in out.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "chat_template.jinja",
    }
    assert json.loads((out / "tokenizer_config.json").read_text()) == dict(eos_token="x")
    assert "<|image_pad|>" in (out / "chat_template.jinja").read_text()


def test_the_command_does_not_write_over_a_folder(folders: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        run(Init(text=str(folders / "tied"), vision=str(folders / "siglip"), out=folders / "untied"))


def test_like_a_published_size_needs_that_size(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sums to 64, but head_dim 32"):
        run(Init(text=str(folders / "tied"), vision=str(folders / "siglip"), out=tmp_path / "out", like="8B"))


@pytest.mark.parametrize(
    ("text", "vision", "sentence"),
    [
        ("siglip", "siglip", "model_type 'siglip_vision_model'; this package reads"),
        ("tied", "tied", "model_type 'qwen3'; the tower starts from siglip"),
    ],
)
def test_folders_in_the_wrong_place_are_refused(text: str, vision: str, sentence: str, folders: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        start(folders / text, folders / vision)


def test_a_tokenizer_without_visual_tokens_is_refused_unless_ids_are_given(folders: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    Qwen3Config(tie_word_embeddings=True, vocab_size=512).save_pretrained(text)
    with pytest.raises(ValueError, match=r"tokenizer.json does not exist, so the ids of <\|image_pad\|>"):
        start_config(text, folders / "siglip")
    (text / "tokenizer.json").write_text('{"added_tokens": [{"content": "<|image_pad|>", "id": 5}]}')
    with pytest.raises(ValueError, match=r"lacks <\|video_pad\|>, <\|vision_start\|>"):
        start_config(text, folders / "siglip")
    assert start_config(text, folders / "siglip", token_ids=IDS).image_token_id == 505


def test_patches_of_another_size_are_refused(folders: Path, tmp_path: Path) -> None:
    config = SiglipVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4, patch_size=14, image_size=56
    )
    SiglipVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="take a patch16 checkpoint"):
        start(folders / "tied", tmp_path)


def test_a_config_of_other_sizes_is_refused(folders: Path) -> None:
    config = start_config(folders / "tied", folders / "siglip")
    assert config.vision is not None
    with pytest.raises(ValueError, match="4 blocks of width 48"):
        wrong = replace(config, vision=replace(config.vision, num_heads=3))
        start(folders / "tied", folders / "siglip", config=wrong)
    with pytest.raises(ValueError, match="does not describe the text checkpoint"):
        start(folders / "untied", folders / "siglip", config=config)
