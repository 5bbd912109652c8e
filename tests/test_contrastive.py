"""V0: the sigmoid loss is SigLIP's, ranks do not change it, and a tower trained by it knows pictures at any size."""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import SiglipConfig, SiglipModel

from contrastive_ranks import Picture, captioned, captions, drawn_pictures, model, text_config, tiny
from qvl.core.log import read_jsonl
from qvl.model import vision as vision_module
from qvl.model.qwen3vl import new_model
from qvl.model.siglip import Tower, fill_tower
from qvl.model.siglip_text import fixed_length
from qvl.parallel.data_parallel import World
from qvl.train.checkpoint import newest
from qvl.train.contrastive import (
    V0_RATES,
    CaptionPack,
    Contrastive,
    caption_id,
    load_contrastive,
    new_contrastive,
    pair_losses,
    picture_batch,
    zero_shot,
)
from qvl.train.loop import LoopConfig, fit
from qvl.train.optimizer import OptimizerConfig
from qvl.train.parameters import freeze, groups, part_of
from test_start import SIDE, at_origin, our_patches, redraw_tower
from test_train import Drawn, small

HERE = Path(__file__).parent
ALONE = World(0, 1, torch.device("cpu"))


def test_the_loss_is_the_formula_pair_by_pair_and_equal_captions_are_all_right() -> None:
    objective = tiny()
    pack = captioned(drawn_pictures(5, seed=3), [0, 1, 2, 1, 4])
    with torch.no_grad():
        prepared = objective.prepare(pack)
        outcome = objective(prepared, prepared.denominator, ALONE)
        images, texts = objective.embed_pictures(pack.batch), objective.embed_captions(pack.caption_ST)
    total = 0.0
    for i in range(5):
        for j in range(5):
            z = 1 if i == j or {i, j} == {1, 3} else -1
            total += math.log1p(math.exp(-z * (10 * float(images[i] @ texts[j]) - 10)))
    assert objective.prepare(pack).denominator == 5
    assert float(outcome.loss) == pytest.approx(total / 5, rel=1e-5)
    assert outcome.sums["loss"] == (pytest.approx(total, rel=1e-5), 5)
    assert outcome.sums["loss/a"][1] + outcome.sums["loss/b"][1] == 5


def test_right_pairs_are_pulled_and_wrong_ones_pushed_by_the_numbers() -> None:
    logit = torch.tensor([[2.0, -3.0], [0.0, 1.0]])
    is_right = torch.tensor([[True, False], [False, True]])
    softplus = [math.log1p(math.exp(x)) for x in (-2, -3, 0, -1)]
    assert pair_losses(logit, is_right).tolist() == pytest.approx([sum(softplus[:2]), sum(softplus[2:])])


def siglip() -> SiglipModel:
    eyes: dict[str, Any] = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
    words: dict[str, Any] = dict(hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3)
    theirs = SiglipModel(
        SiglipConfig(
            vision_config=eyes | dict(patch_size=16, image_size=16 * SIDE),
            text_config=words | dict(vocab_size=99, max_position_embeddings=8, bos_token_id=2, eos_token_id=1),
        )
    )
    redraw_tower(theirs)
    with torch.no_grad():
        theirs.logit_scale.fill_(2.5)
        theirs.logit_bias.fill_(-6.0)
    return theirs.eval()


def test_from_a_siglip_folder_vectors_and_loss_are_transformers_but_for_the_rotary_angles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = siglip()
    theirs.save_pretrained(tmp_path)
    config = small()
    assert config.vision is not None
    vision = replace(config.vision, depth=3, hidden_size=48, num_heads=4, intermediate_size=80)
    qwen = new_model(replace(config, vision=replace(vision, num_position_embeddings=SIDE**2)))
    with torch.no_grad():
        fill_tower(qwen.visual, Tower.open(tmp_path))
    objective = load_contrastive(qwen, tmp_path)
    turn = vision_module.rotary_2d
    monkeypatch.setattr(vision_module, "rotary_2d", lambda places, width: turn(at_origin(places), width))

    rasters = torch.randn(4, 3, 16 * SIDE, 16 * SIDE, generator=torch.Generator().manual_seed(2))
    token_ST = fixed_length([[7, 8], [9], [3, 4, 5], [60] * 9], length=8, eos_id=1, pad_id=0)
    pack = CaptionPack(
        batch=picture_batch([(our_patches(raster[None]), torch.tensor([[1, SIDE, SIDE]])) for raster in rasters]),
        ids=("a", "b", "c", "d"),
        categories=("x",) * 4,
        caption_ST=token_ST,
        caption_id_S=torch.arange(4),
    )
    with torch.no_grad():
        expected = theirs(input_ids=token_ST, pixel_values=rasters, return_loss=True)
        outcome = objective(objective.prepare(pack), 4.0, ALONE)
        assert (objective.embed_pictures(pack.batch) - expected.image_embeds).abs().max() <= 1e-5
        assert (objective.embed_captions(token_ST) - expected.text_embeds).abs().max() <= 1e-5
    assert float(outcome.loss) == pytest.approx(float(expected.loss), rel=1e-5)


def test_the_mergers_read_the_patch_states_that_v0_trains() -> None:
    qwen = model()
    batch = picture_batch(drawn_pictures(3, seed=1))
    assert batch.patch_PX is not None and batch.grid_I3 is not None
    given = batch.patch_PX, batch.grid_I3, batch.frame_lengths
    with torch.no_grad():
        assert torch.equal(qwen.visual.merger(qwen.visual.patch_states(*given)), qwen.visual(*given).merged_MD)


def test_packs_of_one_step_do_not_see_each_other() -> None:
    objective = tiny()
    pictures = drawn_pictures(4, seed=5)
    halves = [captioned(pictures[:2], [0, 1]), captioned(pictures[2:], [2, 3])]
    with torch.no_grad():
        whole = float(objective(objective.prepare(captioned(pictures, [0, 1, 2, 3])), 4.0, ALONE).loss)
        apart = sum(float(objective(objective.prepare(half), 4.0, ALONE).loss) for half in halves)
        alone = sum(float(objective(objective.prepare(half), 2.0, ALONE).loss) for half in halves) / 2
    assert apart == pytest.approx(alone)
    assert apart < whole


def run(out: Path, ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(HERE / "contrastive_ranks.py"), str(out)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_with_uneven_shares_are_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, 1)
    run(two, 2)
    rows = [read_jsonl(out / "log.jsonl") for out in (one, two)]
    for key, rel in (("loss", 1e-6), ("retrieval", 1e-9), ("grad_norm", 1e-4)):
        assert [row[key] for row in rows[1]] == pytest.approx([row[key] for row in rows[0]], rel=rel), key
    first, second = newest(one), newest(two)
    assert first is not None and second is not None
    for name, weight in first.weights.items():
        here, there = (without_key_bias(name, w) for w in (weight, second.weights[name]))
        torch.testing.assert_close(there, here, atol=2e-5, rtol=1e-4, msg=name)


def without_key_bias(name: str, weight: Tensor) -> Tensor:
    """A bias on all keys alike moves no softmax: its gradient is rounding noise, which Adam blows up to whole steps."""
    if name.endswith("k_proj.bias"):
        return weight[:0]
    if name.endswith(("qkv.bias", "in_proj_bias")):
        query, _, value = weight.chunk(3)
        return torch.cat((query, value))
    return weight


class Fixed:
    """The same packs in turn, one a step."""

    def __init__(self, packs: Sequence[CaptionPack]) -> None:
        self.packs, self.step = packs, 0

    def next_step(self) -> Sequence[CaptionPack]:
        self.step += 1
        return [self.packs[self.step % len(self.packs)]]

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def train(objective: Contrastive, packs: Sequence[CaptionPack], out: Path, *, steps: int, lr: float = 3e-3) -> Any:
    fit(objective, Fixed(packs), LoopConfig(steps=steps, optimizer=OptimizerConfig(lr=lr, rates=V0_RATES)), out, ALONE)
    return read_jsonl(out / "log.jsonl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_pictures_find_their_captions(tmp_path: Path, dtype: torch.dtype) -> None:
    objective = tiny(dtype)
    assert {p.dtype for p in objective.parameters()} == {dtype}
    rows = train(objective, [captioned(drawn_pictures(8, seed=4), range(8))], tmp_path, steps=40)
    assert rows[0]["retrieval"] < 0.5
    assert rows[-1]["retrieval"] > 0.9
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_vision_and_helpers_learn_mergers_and_language_stay(tmp_path: Path) -> None:
    objective = tiny()
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    train(objective, [captioned(drawn_pictures(4, seed=4), range(4))], tmp_path, steps=2)
    moved = {n for n, p in objective.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if part_of(n) in ("vision", "helpers")}
    helpers = {n.split(".")[0] for n in moved if part_of(n) == "helpers"}
    assert helpers == {"text", "pool", "post_norm", "log_scale", "bias"}


def test_muon_takes_no_table_probe_or_norm_of_the_helpers() -> None:
    objective = tiny()
    freeze(objective.model, V0_RATES)
    taken = {n for g in groups(objective) if g.part == "helpers" and g.is_matrix for n in g.names}
    assert {n.removeprefix("text.encoder.layers.0.") for n in taken} == {
        "pool.attention.in_proj_weight",
        "pool.attention.out_proj.weight",
        "pool.mlp.fc1.weight",
        "pool.mlp.fc2.weight",
        "text.head.weight",
        *(f"self_attn.{part}_proj.weight" for part in ("q", "k", "v", "out")),
        "mlp.fc1.weight",
        "mlp.fc2.weight",
    }


COLOURS = torch.tensor([[0.9, -0.8, -0.8], [-0.8, 0.8, -0.8], [-0.7, -0.7, 0.9], [0.8, 0.8, -0.8]])


def scene(colour: int, side: int, g: torch.Generator) -> Picture:
    """A coloured square, half the picture wide, anywhere on noise: side x side pixels, cut into patches."""
    raster = torch.randn(3, side, side, generator=g) * 0.2
    row, column = (int(torch.randint(0, side // 2 + 1, (), generator=g)) for _ in range(2))
    raster[:, row : row + side // 2, column : column + side // 2] += COLOURS[colour, :, None, None]
    count = side // 16
    blocks = raster.unflatten(1, (count // 2, 2, 16)).unflatten(-1, (count // 2, 2, 16))
    patches = blocks.permute(1, 4, 2, 5, 0, 3, 6)  # block row, block column, row, column, channel, y, x
    twice = patches.unsqueeze(-3).expand(*patches.shape[:-2], 2, 16, 16)
    return twice.flatten(0, 3).flatten(1), torch.tensor([[1, count, count]])


def scenes(sides: Sequence[int], seed: int) -> CaptionPack:
    g = torch.Generator().manual_seed(seed)
    colours = [i % 4 for i in range(len(sides))]
    return captioned([scene(c, side, g) for c, side in zip(colours, sides, strict=True)], colours)


def test_unseen_pictures_are_named_at_half_full_and_double_size(tmp_path: Path) -> None:
    objective = tiny()
    held_out = {side: scenes([side] * 24, seed=900 + side) for side in (32, 64, 128)}
    words, class_id_S = captions(range(4)), torch.arange(4)
    before = [zero_shot(objective, words, class_id_S, [pack]) for pack in held_out.values()]
    train(objective, [scenes([32, 64, 128] * 4, seed=s) for s in range(20)], tmp_path, steps=60)
    after = [zero_shot(objective, words, class_id_S, [pack]) for pack in held_out.values()]
    assert max(before) < 0.6
    assert min(after) > 0.9


def test_captions_of_one_class_are_averaged() -> None:
    objective = tiny()
    pack = captioned(drawn_pictures(3, seed=2), [0, 1, 2])
    once = zero_shot(objective, captions([0, 1, 2]), torch.tensor([0, 1, 2]), [pack])
    twice = zero_shot(objective, captions([2, 0, 1, 0, 1, 2]), torch.tensor([2, 0, 1, 0, 1, 2]), [pack])
    assert once == twice
    with torch.no_grad():
        image, text = objective.embed_pictures(pack.batch), objective.embed_captions(captions([0, 1, 2, 3]))
    classes = torch.stack([text[0] + text[3], text[1], text[2]])
    nearest = (image @ torch.nn.functional.normalize(classes, dim=-1).T).argmax(1)
    found = zero_shot(objective, captions([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0]), [pack])
    assert found == pytest.approx(float((nearest == torch.arange(3)).float().mean()))


def test_handing_over_puts_the_trained_norm_where_the_merger_begins(tmp_path: Path) -> None:
    objective = tiny()
    train(objective, [captioned(drawn_pictures(4, seed=4), range(4))], tmp_path, steps=2)
    norm = objective.model.visual.merger.norm
    assert not torch.equal(norm.weight, objective.post_norm.weight)
    objective.hand_over()
    assert torch.equal(norm.weight, objective.post_norm.weight)
    assert torch.equal(norm.bias, objective.post_norm.bias)


def test_equal_captions_have_equal_ids_everywhere() -> None:
    assert caption_id("a red circle") == caption_id("a red circle") != caption_id("a red square")
    assert caption_id("a red circle") == 5070956507599001626
    assert torch.tensor([caption_id("x")]).dtype == torch.int64


def test_packs_without_one_caption_a_still_picture_are_refused() -> None:
    pictures = drawn_pictures(2, seed=0)
    with pytest.raises(ValueError, match="3 captions came for 2 visual items of 2 frames"):
        replace(captioned(pictures, [0, 1]), caption_ST=captions([0, 1, 2]))
    with pytest.raises(ValueError, match="2 captions came with 1 caption ids"):
        replace(captioned(pictures, [0, 1]), caption_id_S=torch.tensor([0]))
    film = (torch.zeros(8, 1536), torch.tensor([[2, 2, 2]]))
    with pytest.raises(ValueError, match="1 captions came for 1 visual items of 2 frames"):
        captioned([film], [0])
    with pytest.raises(ValueError, match="needs at least one picture"):
        picture_batch([])


def test_other_packs_and_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="a Pack came; the vision pre-stage learns from CaptionPack"):
        tiny().prepare(Drawn(small()).next_step()[0])
    with pytest.raises(ValueError, match="the text tower ends in 16 numbers and the pool in 32"):
        new_contrastive(model(), text_config(16))
    with pytest.raises(ValueError, match="this model is text-only"):
        new_contrastive(new_model(replace(small(), vision=None)), text_config())


def test_a_folder_without_its_text_half_is_refused(tmp_path: Path) -> None:
    siglip().vision_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks logit_scale; expected a whole SigLIP"):
        load_contrastive(model(), tmp_path)
