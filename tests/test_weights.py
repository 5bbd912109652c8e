"""Checkpoints in and out: what loads, how much memory it takes, what transformers reads back, and what is refused."""

import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from qvl.commands import cli
from qvl.core.batch import Sample
from qvl.model.config import ModelConfig, config_from_hf, config_to_hf, preset, read_config
from qvl.model.pack import pack
from qvl.model.padded import batch_from_padded
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.model.weights import Layout, checkpoint_shapes, load, save
from tests.golden import LAYOUTS, MODELS, answer, case_inputs, folder, redraw, to_hub_layout


def hf_load(path: Path) -> Any:
    hf_class = Qwen3VLMoeForConditionalGeneration if read_config(path).text.moe else Qwen3VLForConditionalGeneration
    return hf_class.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()


def same_weights(a: Qwen3VL, b: Qwen3VL) -> bool:
    mine, other = dict(a.named_parameters()), dict(b.named_parameters())
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 200_000], ids=["one file", "shards"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_what_we_save_transformers_loads_to_the_same_weights_and_logits(
    name: str, layout: Layout, max_shard_bytes: int, tmp_path: Path
) -> None:
    save(load(folder(name)), tmp_path / "out", layout=layout, max_shard_bytes=max_shard_bytes)

    theirs = hf_load(tmp_path / "out")

    golden = answer(name, "batch_left")
    with torch.no_grad():
        assert torch.equal(theirs(**golden.inputs, use_cache=False).logits, golden.logits)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1 or max_shard_bytes == 200_000
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (max_shard_bytes == 200_000)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_export_then_import_is_the_identity(name: str, layout: Layout, tmp_path: Path) -> None:
    model = load(folder(name))
    save(model, tmp_path / "out", layout=layout, max_shard_bytes=300_000)
    again = load(tmp_path / "out")
    assert same_weights(model, again)
    assert again.config == model.config


@pytest.mark.parametrize("name", MODELS)
def test_import_then_export_writes_the_file_that_came(name: str, tmp_path: Path) -> None:
    for layout in LAYOUTS:
        save(load(folder(name, layout)), tmp_path / layout, layout=layout)
        came, written = (load_file(p / "model.safetensors") for p in (folder(name, layout), tmp_path / layout))
        assert came.keys() == written.keys()
        assert all(torch.equal(came[key], written[key]) for key in came)
        assert checkpoint_shapes(load(tmp_path / layout), layout) == {k: tuple(v.shape) for k, v in came.items()}


def test_weights_arrive_in_the_dtype_asked_for_and_leave_in_the_one_they_have(tmp_path: Path) -> None:
    model = load(folder("dense_tied"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save(model, tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["dtype"] == "bfloat16"


def test_saving_over_a_folder_leaves_no_shard_of_the_old_one(tmp_path: Path) -> None:
    model = load(folder("dense_tied"))
    save(model, tmp_path / "out", max_shard_bytes=100_000)
    save(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert same_weights(model, load(tmp_path / "out"))


def test_who_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        save(new_model(preset("nano")), tmp_path)
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == 0o640


def test_tokenizer_files_travel_with_a_conversion(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "old" / "secrets.txt").write_text("stays")
    save(load(folder("dense_tied")), tmp_path / "new", companions=tmp_path / "old")
    assert (tmp_path / "new" / "tokenizer.json").read_text() == '{"a": 1}'
    assert not (tmp_path / "new" / "secrets.txt").exists()


# Text-only Qwen3, the report's starting point


def text_model(kind: str) -> Any:
    sizes: dict[str, Any] = dict(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
    )
    sizes |= dict(num_key_value_heads=2, head_dim=32, bos_token_id=500, eos_token_id=501)
    if kind.startswith("moe"):
        experts: dict[str, Any] = dict(
            num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, mlp_only_layers=[1]
        )
        config = Qwen3MoeConfig(**sizes, **experts, norm_topk_prob=kind == "moe", tie_word_embeddings=False)
        model = Qwen3MoeForCausalLM(config)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=kind == "dense_tied"))
    redraw(model, seed=8)
    return model.float().eval()


@pytest.mark.parametrize("kind", ["dense_tied", "dense_untied", "moe", "moe_without_renormalising"])
def test_text_only_checkpoints_of_transformers_agree_in_logits(kind: str, tmp_path: Path) -> None:
    theirs = text_model(kind)
    theirs.save_pretrained(tmp_path / "v5")
    if kind.startswith("moe"):  # one tensor an expert, as published
        assert any(".experts.7.gate_proj." in key for key in load_file(tmp_path / "v5" / "model.safetensors"))
    rows = [[5, 6, 7, 8, 9, 10, 11], [401, 402, 403]]

    ours = load(tmp_path / "v5")

    batch = pack([Sample(token_T=torch.tensor(row)) for row in rows], ours.config)
    with torch.no_grad():
        logits = ours.logits(ours(batch)).split([7, 3])
        for row, mine in zip(rows, logits, strict=True):
            assert (mine - theirs(torch.tensor([row])).logits[0]).abs().max().item() <= 1e-4


@pytest.mark.parametrize("kind", ["dense_tied", "dense_untied", "moe"])
def test_text_only_checkpoints_go_out_again(kind: str, tmp_path: Path) -> None:
    theirs = text_model(kind)
    theirs.save_pretrained(tmp_path / "in")
    save(load(tmp_path / "in"), tmp_path / "out")
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("in", "out")]
    assert names[0] == names[1] == checkpoint_shapes(load(tmp_path / "in")).keys()
    again = type(theirs).from_pretrained(tmp_path / "out")
    old, new = theirs.state_dict(), again.state_dict()
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_text_only_folder_in_the_old_config_spelling_loads_too(tmp_path: Path) -> None:
    text_model("dense_tied").save_pretrained(tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "hub")
    to_hub_layout(tmp_path / "hub")
    assert "rope_theta" in json.loads((tmp_path / "hub" / "config.json").read_text())
    assert same_weights(load(tmp_path / "in"), load(tmp_path / "hub"))


# Memory

MEASURE = """
import sys, torch
from pathlib import Path
from qvl.model.weights import load

def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

torch.zeros(8) @ torch.zeros(8)
before = anonymous()
model = load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((anonymous() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def large_config(is_moe: bool) -> ModelConfig:
    """Some 60 million parameters: seconds to draw, and large enough that the interpreter's own memory does not count."""
    small = preset("nano-moe" if is_moe else "nano")
    text = replace(small.text, vocab_size=152_000 if small.tie_word_embeddings else 60_000, num_hidden_layers=10)
    if text.moe:
        text = replace(text, num_hidden_layers=4, moe=replace(text.moe, num_experts=48))
    return replace(small, text=text, image_token_id=505, video_token_id=506)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
@pytest.mark.parametrize(
    ("is_moe", "dtype"),
    [(False, "float32"), pytest.param(True, "float32", marks=pytest.mark.slow), (True, "bfloat16")],
)
def test_loading_takes_at_most_15_percent_more_memory_than_the_weights(
    is_moe: bool, dtype: str, tmp_path: Path
) -> None:
    model = new_model(large_config(is_moe), dtype=torch.float32)
    save(model, tmp_path / "large", layout="hub", max_shard_bytes=10**8)
    del model
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), dtype]
    share = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{share:.3f} of the weights")
    assert 0.8 <= share <= 1.15


MEASURE_FILES = """
import sys
from pathlib import Path
from qvl.model import weights

def file_pages() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) * 1024

weights.MAPPED_BYTES = int(sys.argv[2])
most, copy = [file_pages()], weights._copy

def watched(*arguments) -> None:
    copy(*arguments)
    most.append(file_pages())

weights._copy = watched
weights.load(sys.argv[1])
print(max(most) - most[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
def test_a_file_is_let_go_while_it_is_read(tmp_path: Path) -> None:
    small = preset("nano")
    save(
        new_model(replace(small, text=replace(small.text, vocab_size=600, num_hidden_layers=30), vision=None)),
        tmp_path / "model",
    )
    size = (tmp_path / "model" / "model.safetensors").stat().st_size

    def most(mapped_bytes: int) -> int:
        command = [sys.executable, "-c", MEASURE_FILES, str(tmp_path / "model"), str(mapped_bytes)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert most(2**40) > 0.95 * size
    assert most(2**20) < 0.25 * size


# What is refused, each in one sentence


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A sharded copy of a good checkpoint, to be damaged."""
    save(load(folder("moe")), tmp_path / "broken", max_shard_bytes=200_000)
    return tmp_path / "broken"


def edit_config(path: Path, **changes: Any) -> None:
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | changes))


def edit_index(path: Path, old: str, new: object) -> None:
    index = path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"] = {k: new if v == old else v for k, v in raw["weight_map"].items()}
    index.write_text(json.dumps(raw))


def first_shard(path: Path) -> Path:
    return min(path.glob("*.safetensors"))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(path) | {k: v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for word in words:
        assert word in message


def test_a_truncated_file_is_refused(broken: Path) -> None:
    shard = first_shard(broken)
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_refused(broken, shard.name, "not a whole safetensors file", "download it again")


def test_an_empty_file_is_refused(broken: Path) -> None:
    first_shard(broken).write_bytes(b"")
    assert_refused(broken, "not a whole safetensors file")


@pytest.mark.parametrize(
    "header", [b"garbage", b"{}" * 9, b'{"a": {"dtype": "F32", "shape": [1e9], "data_offsets": [0, 4]}}']
)
def test_a_garbage_header_is_refused(broken: Path, header: bytes) -> None:
    first_shard(broken).write_bytes(struct.pack("<Q", len(header)) + header)
    assert_refused(broken, "not a whole safetensors file")


def test_a_header_that_claims_to_be_larger_than_the_file_is_refused(broken: Path) -> None:
    first_shard(broken).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert_refused(broken, "not a whole safetensors file")


@pytest.mark.parametrize("name", ["../{}", "/etc/{}", "sub/{}", "..", "model.bin", 7, None])
def test_a_shard_name_that_leaves_the_folder_is_refused(broken: Path, name: Any) -> None:
    shard = first_shard(broken)
    shutil.copy(shard, broken.parent / shard.name)
    edit_index(broken, shard.name, name.format(shard.name) if isinstance(name, str) else name)
    assert_refused(broken, "names the shard", "in the same folder")


def test_a_missing_shard_is_refused(broken: Path) -> None:
    first_shard(broken).unlink()
    assert_refused(broken, "which is missing")


def test_an_index_that_is_not_one_is_refused(broken: Path) -> None:
    (broken / "model.safetensors.index.json").write_text("[1, 2]")
    assert_refused(broken, "is not an index with a weight_map")


def test_pickled_weights_are_never_read(broken: Path) -> None:
    for file in (*broken.glob("*.safetensors"), broken / "model.safetensors.index.json"):
        file.unlink()
    torch.save({}, broken / "pytorch_model.bin")
    assert_refused(broken, "pytorch_model.bin is a pickle", "never read")


def test_a_missing_tensor_is_refused_by_name(broken: Path) -> None:
    shard = first_shard(broken)
    gone = next(iter(load_file(shard)))
    edit_tensors(shard, **{gone: None})
    assert_refused(broken, "lacks 1 tensors", gone)


def test_an_extra_tensor_is_refused_by_name(broken: Path) -> None:
    edit_tensors(first_shard(broken), **{"model.language_model.layers.9.mlp.gate.weight": torch.zeros(8, 64)})
    assert_refused(broken, "1 tensors its config.json does not know", "layers.9")


def test_a_tensor_in_two_shards_is_refused(broken: Path) -> None:
    first, second, *_ = sorted(broken.glob("*.safetensors"))
    name, value = next(iter(load_file(first).items()))
    edit_tensors(second, **{name: value})
    assert_refused(broken, name, "stands in both")


def test_a_wrong_shape_is_refused_with_both_shapes(broken: Path) -> None:
    shard, name = next(
        (path, key) for path in broken.glob("*.safetensors") for key in load_file(path) if "q_proj" in key
    )
    shape = tuple(load_file(shard)[name].shape)
    edit_tensors(shard, **{name: torch.zeros(shape[0], shape[1] + 1)})
    assert_refused(broken, name, str(shape), str((shape[0], shape[1] + 1)))


def test_experts_of_a_third_shape_are_refused(broken: Path) -> None:
    shard, name = next(
        (path, key) for path in broken.glob("*.safetensors") for key in load_file(path) if key.endswith("down_proj")
    )
    edit_tensors(shard, **{name: torch.zeros(8, 25, 64)})
    assert_refused(broken, name, "(8, 25, 64)")


def test_whole_numbers_in_place_of_weights_are_refused(broken: Path) -> None:
    shard = first_shard(broken)
    name, value = next(iter(load_file(shard).items()))
    edit_tensors(shard, **{name: torch.zeros(value.shape, dtype=torch.int32)})
    assert_refused(broken, name, "torch.int32", "floating-point")


def test_square_expert_matrices_are_refused_until_the_layout_is_said(tmp_path: Path) -> None:
    nano = preset("nano-moe")
    assert nano.text.moe is not None
    square = replace(
        nano, text=replace(nano.text, moe=replace(nano.text.moe, intermediate_size=nano.text.hidden_size // 2))
    )
    small = replace(square, text=replace(square.text, vocab_size=512, num_hidden_layers=3), image_token_id=505)
    model = new_model(replace(small, video_token_id=506))
    for layout in LAYOUTS:
        save(model, tmp_path / layout, layout=layout)
        assert_refused(tmp_path / layout, "square", "expert_layout")
        assert same_weights(model, load(tmp_path / layout, expert_layout=layout))


def test_a_head_of_its_own_under_a_tied_config_is_refused(tmp_path: Path) -> None:
    shutil.copytree(folder("dense_tied"), tmp_path / "tied")
    file = tmp_path / "tied" / "model.safetensors"
    table = load_file(file)["model.language_model.embed_tokens.weight"]
    edit_tensors(file, **{"lm_head.weight": table.clone()})
    assert same_weights(load(tmp_path / "tied"), load(folder("dense_tied")))
    edit_tensors(file, **{"lm_head.weight": table + 1})
    assert_refused(tmp_path / "tied", "a head of its own", "tie_word_embeddings")


def test_a_folder_without_config_or_with_another_models_is_refused(broken: Path) -> None:
    edit_config(broken, model_type="llama")
    assert_refused(broken, "'llama'")
    (broken / "config.json").write_text("{")
    assert_refused(broken, "not valid JSON")
    (broken / "config.json").unlink()
    assert_refused(broken, "config.json")


@pytest.mark.parametrize("name", [*MODELS, "yarn"])
def test_both_config_spellings_mean_the_same_and_either_can_be_written(name: str) -> None:
    config = read_config(folder(name, "v5"))
    assert read_config(folder(name, "hub")) == config
    for layout in LAYOUTS:
        assert config_from_hf(json.loads(json.dumps(config_to_hf(config, layout=layout)))) == config


def test_a_loaded_model_answers_without_gradients_flowing_into_the_file() -> None:
    before = load_file(folder("dense_tied") / "model.safetensors")["model.language_model.norm.weight"].clone()
    model = load(folder("dense_tied"))
    with torch.no_grad():
        model.language_model.norm.weight.add_(1)
        model(batch_from_padded(case_inputs("text"), model.config))
    after = load_file(folder("dense_tied") / "model.safetensors")["model.language_model.norm.weight"]
    assert torch.equal(before, after)


def test_convert_loses_no_weights_unless_told_to(tmp_path, capsys) -> None:
    argv = ["convert", "--model", str(folder(MODELS[0])), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    (kept,) = (tmp_path / "out").glob("*.safetensors")
    before = kept.read_bytes()
    assert load_file(kept)["model.language_model.norm.weight"].dtype == torch.float32, "as the source's files"
    assert "float32)" in capsys.readouterr().out
    assert cli.main([*argv, "--dtype", "bfloat16"]) == 2
    assert "holds weights already; name another folder, or say --replace" in " ".join(capsys.readouterr().err.split())
    assert kept.read_bytes() == before
    assert cli.main([*argv, "--dtype", "bfloat16", "--replace"]) == 0
    assert kept.read_bytes() != before
    assert cli.main(["convert", "--model", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 0
    assert load_file(tmp_path / "again" / kept.name)["model.language_model.norm.weight"].dtype == torch.bfloat16
